"""Reads from DDP which buckets it made, and tells when the first of them is ready. Registers no communication hook.

DDP takes one communication hook for ever, and none repeats its built-in reduction bit for bit. With 3 ranks over 50 steps
(torch 2.13, CPU, gloo) its allreduce_hook, which divides by the world size, gave 2 of 500 equal gradients; a hook that
multiplies by 1/3 gave 500, but 14 with gradient_as_bucket_view and gradients that are kept. So DDP's reduction and the
user's hook stay as they are, and what is needed is seen from outside: DDP lists its buckets, it
starts the first one when the last of its gradients is there, and it waits for all of them in a callback at the end of
backward, around which a recorder has two of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn

COMM_BYTES: Final = "perf/comm_bytes"
COMM_BUCKETS: Final = "perf/comm_buckets"
_MAX_TRIES: Final = 5
"""DDP rebuilds its buckets after the first backward pass, with static_graph or accumulation a little later."""


class Buckets:
    """The buckets of one DDP module.

    Args:
        ddp: The DistributedDataParallel module.
        on_ready: Called when a gradient of the first bucket is there, in passes that synchronise.
    """

    def __init__(self, ddp: Any, on_ready: Callable[[], None]) -> None:
        self._ddp = ddp
        self._on_ready = on_ready
        self._num_tries = 0
        self._handles: list[Any] = []
        self._sizes: tuple[int, ...] = ()
        self._is_known = False

    def values(self) -> dict[str, float]:
        """Return what a synchronising step communicates, once DDP has settled on its buckets."""
        return {COMM_BYTES: float(sum(self._sizes)), COMM_BUCKETS: float(len(self._sizes))} if self._sizes else {}

    def look(self) -> None:
        """Ask DDP for its buckets, unless they are known. After a backward pass that synchronised."""
        if self._is_known:
            return
        self._num_tries += 1
        said = self._ddp._get_ddp_logging_data()  # noqa: SLF001 - DDP's own way to say it
        rebuilt = bool(said.get("has_rebuilt_buckets"))
        if not rebuilt and self._num_tries < _MAX_TRIES and not self._ddp.find_unused_parameters:
            return
        self._is_known = True
        self._sizes = _numbers(said.get("rebuilt_bucket_sizes" if rebuilt else "bucket_sizes", ""))
        ignored = self._ddp.parameters_to_ignore
        named = self._ddp.module.named_parameters()
        parameters = [parameter for name, parameter in named if parameter.requires_grad and name not in ignored]
        first = str(said.get("rebuilt_per_bucket_param_indices", "")).partition(",")[0]
        chosen = [parameters[i] for i in _numbers(first)] if rebuilt else self._first_by_size(parameters)
        for parameter in chosen:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._grad_is_there))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._is_known = True

    def _grad_is_there(self, _parameter: nn.Parameter) -> None:
        if self._ddp.require_backward_grad_sync:  # not under no_sync()
            self._on_ready()

    def _first_by_size(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the first bucket of DDP's initial order, from the last parameter on; nothing if the sizes disagree."""
        left, chosen = self._sizes[0] if self._sizes else 0, []
        for parameter in reversed(parameters):
            if left <= 0:
                break
            chosen.append(parameter)
            left -= parameter.numel() * parameter.element_size()
        return chosen if left == 0 else []

    def __repr__(self) -> str:
        return f"<Buckets {self._sizes or 'not known yet'}>"


def _numbers(text: Any) -> tuple[int, ...]:
    return tuple(int(word) for word in str(text).replace(",", " ").split())
