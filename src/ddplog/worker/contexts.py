"""Reads which rank this process is from libraries that are initialised in it, and imports none of them.

A library that is not in sys.modules cannot be initialised. Nothing here decides which of them is right: see `identity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Final

_HOROVOD: Final = ("horovod.torch", "horovod.tensorflow", "horovod.mxnet")
"""Each has a library of its own, with a state of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one initialised library says; None where it does not know."""

    library: str
    """`horovod` or `torch.distributed`."""
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    node_rank: int | None = None
    has_mpi: bool = False
    """Whether a Horovod can learn from mpirun who it is."""


def initialised(modules: Mapping[str, ModuleType]) -> list[Context]:
    """Return what every initialised library says; `modules` is sys.modules."""
    found = []
    for name in _HOROVOD:
        hvd = modules.get(name)
        is_built = hvd is not None and hasattr(hvd, "is_initialized")
        if hvd is not None and is_built and hvd.is_initialized():
            found.append(
                Context(
                    library="horovod",
                    rank=hvd.rank(),
                    size=hvd.size(),
                    local_rank=hvd.local_rank(),
                    local_size=hvd.local_size(),
                    node_rank=hvd.cross_rank(),
                    has_mpi=bool(hvd.mpi_built()),
                )
            )
    dist = modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        found.append(Context(library="torch.distributed", rank=dist.get_rank(), size=dist.get_world_size()))
    return found
