"""Owns what a hook of ours is to torch: it never raises, and it is left out where a graph is compiled or captured.

A hook goes where its module goes: into torch.save(model) and copy.deepcopy(model). What arrives there is `idle`: a
copy of the model, an EMA for one, is not the model that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def idle(*_: Any, **__: Any) -> None:
    """Do nothing: what a hook is in a copy of its model."""


def _make_idle() -> Callable[..., None]:
    return idle


class Hook:
    """A call as a hook.

    Args:
        call: What is to be done; what it returns is dropped.
        on_error: Takes what it raises.
        is_cuda: Whether the current stream may be one that a CUDA graph is captured from.
    """

    __slots__ = ("_call", "_is_cuda", "_on_error")

    def __init__(self, call: Callable[..., None], on_error: Callable[[Exception], None], *, is_cuda: bool) -> None:
        self._call = call
        self._on_error = on_error
        self._is_cuda = is_cuda

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            if not (self._is_cuda and torch.cuda.is_current_stream_capturing()):
                self._call(*args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - the edge: training goes on without the measurement
            self._on_error(exc)

    def __reduce__(self) -> Any:
        return _make_idle, ()


def has_hook(model: nn.Module) -> bool:
    """Return whether a model is attached: one of its hooks is ours."""
    return any(isinstance(hook, Hook) for hook in model._forward_pre_hooks.values())  # noqa: SLF001 - no public way
