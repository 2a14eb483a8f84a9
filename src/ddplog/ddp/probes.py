"""Looks at what torch was given and has: batch sizes, learning rates, the allocator, the graph of an output. Pure reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

LEARNING_RATE: Final = "optim/lr"
_MAX_DEPTH: Final = 4
_MAX_OUTPUTS: Final = 32
_ALLOCATOR: Final = {
    "cuda/alloc_peak_bytes": ("allocated_bytes", "all", "peak"),
    "cuda/reserved_bytes": ("reserved_bytes", "all", "current"),
    "cuda/alloc_retries": ("num_alloc_retries",),
    "cuda/num_ooms": ("num_ooms",),
}


def tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield the tensors in an argument or an output: itself, or those in its tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < _MAX_DEPTH and isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item, depth + 1)


def count_samples(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the batch size: the first dimension of the first tensor that forward was given; 0 if there is none."""
    for value in (*args, *kwargs.values()):
        for tensor in tensors(value):
            if tensor.dim():
                return int(tensor.shape[0])
    return 0


def on_gradient(outputs: Any, hook: Callable[[Any], None]) -> None:
    """Have the hook called when a backward pass comes to any of a forward's outputs; it lives as long as their graph."""
    num_hooks = 0
    for tensor in tensors(outputs):
        if tensor.grad_fn is not None and num_hooks < _MAX_OUTPUTS:
            tensor.register_hook(hook)
            num_hooks += 1


def queue_callback(call: Callable[[], None]) -> None:
    """Have the autograd engine call this at the end of the backward pass that runs, after those queued before.

    Its callbacks run once every gradient is there; DDP's, which waits for its buckets, is one of them.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001


def learning_rates(optimizer: Any) -> dict[str, Any]:
    """Return the learning rate, or one per parameter group, by the group's "name" or its number; tensors as they are."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {LEARNING_RATE: groups[0]["lr"]} if "lr" in groups[0] else {}
    return {f"{LEARNING_RATE}/{group.get('name', i)}": group["lr"] for i, group in enumerate(groups) if "lr" in group}


def allocator(device: torch.device) -> dict[str, float]:
    """Return the CUDA allocator's statistics. Host work only."""
    said = torch.cuda.memory_stats_as_nested_dict(device)
    found = {}
    for key, path in _ALLOCATOR.items():
        value: Any = said
        for name in path:
            value = value.get(name, {}) if isinstance(value, Mapping) else {}
        if isinstance(value, (int, float)):
            found[key] = float(value)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return where a model lives: its first parameter's device."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
