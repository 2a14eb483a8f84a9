"""Decides the gradients' norm, of replicated and of sharded parameters alike, without waiting for a device.

A rank can only see its shard. Each rank's value is the root of its gradients' squares, each divided by the number of
ranks that hold the same numbers (its copies), so that the root of the sum of squares over all ranks ("rss") counts
every number once, however unevenly it is sharded, and in HSDP and in models of which only a part is sharded. Where
nothing is sharded, a rank's own norm is the model's, and the mean of the ranks' says how far they agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

GRAD_NORM: Final = "optim/grad_norm"


def count_copies(model: nn.Module) -> dict[int, int]:
    """Return, by a parameter's id, how many ranks hold the same numbers; parameters that are not sharded are left out."""
    found = {}
    for handle in _flat_handles(model):
        if handle.uses_sharded_strategy:
            copies = max(1, _world_size() // handle.process_group.size())
            flat = handle.flat_param
            found.update(dict.fromkeys(map(id, [flat, *(getattr(flat, "_params", None) or ())]), copies))
    for parameter in model.parameters():
        placements = getattr(parameter, "placements", None)
        if placements is not None and any(placement.is_shard() for placement in placements):
            found[id(parameter)] = _copies_of_mesh(parameter.device_mesh, placements)
    return found


def is_fsdp(model: nn.Module) -> bool:
    """Return whether FSDP, 1 or 2, is around any part of a model."""
    has_handle = next(iter(_flat_handles(model)), None) is not None
    return has_handle or any(hasattr(parameter, "placements") for parameter in model.parameters())


def _flat_handles(model: nn.Module) -> Iterable[Any]:
    """Return the handles of FSDP 1's flat parameters, as its own clip_grad_norm_() finds them."""
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if handle is not None and hasattr(handle, "uses_sharded_strategy"):
            yield handle


def _copies_of_mesh(mesh: Any, placements: Iterable[Any]) -> int:
    copies = 1
    for axis, placement in enumerate(placements):
        if not placement.is_shard():
            copies *= mesh.size(axis)
    return copies


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class GradNorm:
    """The norm of what an optimizer sees.

    Args:
        model: Where the parameters' sharding is looked up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies: Mapping[int, int] = count_copies(model)
        self._num_replicas = _world_size()

    @property
    def reduce(self) -> str:
        """The reduction over ranks with which the values become the model's norm."""
        return "rss" if self._copies else "mean"

    def measure(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor | None:
        """Return this rank's value as a scalar on the gradients' device; None if there is no gradient, or a sparse one.

        Costs one norm per parameter, or a few fused kernels on a GPU, and no synchronisation.
        """
        groups: dict[tuple[int, torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            grad = parameter.grad
            if grad is None:
                continue
            copies = self._copies.get(id(parameter), self._num_replicas) if self._copies else 1
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            if local.layout != torch.strided:
                return None  # its norm needs its duplicates summed, which waits for the device
            groups[copies, local.device, local.dtype].append(local)
        if not groups:
            return None
        device = next(iter(groups))[1]
        parts = []
        for (copies, _, dtype), grads in groups.items():
            # Half precision is summed up in single: a norm rounded to 8 bits would show steps that are not there.
            wider = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
            norms = torch._foreach_norm(grads, 2.0, dtype=wider)  # noqa: SLF001 - what clip_grad_norm_() uses
            part = torch.linalg.vector_norm(torch.stack(norms))
            parts.append((part / copies**0.5 if copies > 1 else part).to(device, non_blocking=True))
        if len(parts) == 1:
            return parts[0]
        return torch.linalg.vector_norm(torch.stack([part.to(torch.float64) for part in parts]))
