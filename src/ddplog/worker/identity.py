"""Decides which rank this process is, from the environment. Never on import: some launchers set it late."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ddplog.errors import ConfigError
from ddplog.worker.current import is_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this process is in its job."""

    rank: int
    """Global."""
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    launcher: str
    """`torchrun`, `horovodrun`, `openmpi`, `slurm`, ...; `python` for a single process."""

    @property
    def has_launcher(self) -> bool:
        return self.launcher != "python"


# launcher, the variable that gives it away, rank, world size, local rank, local world size, node rank ("" = not given).
# The order is that of trust: the innermost launcher first (torchrun under srun is torchrun).
_TABLE: Final = (
    ("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE",
     "HOROVOD_CROSS_RANK"),
    ("deepspeed", "CROSS_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK"),
    ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", ""),  # its NODE_RANK numbers the processes on a node, not the nodes
    ("mvapich2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
     "MV2_COMM_WORLD_LOCAL_SIZE", ""),
    ("mpich", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""),
    ("lsf", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK",
     "JSM_NAMESPACE_LOCAL_SIZE", ""),
    ("ray", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    ("env", "LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    ("slurm", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE", "SLURM_NODEID"),
)  # fmt: skip


WHERE_TO_START: Final = (
    "without a launcher a rank is known when the framework has started all: leave the start of the run to ddplog's logger "
    "or callback, or start the script with torchrun or `ddplog run`"
)


def detect(environ: Mapping[str, str]) -> Identity:
    """Return who this process is.

    Raises:
        ConfigError: If a launcher's variables contradict each other, are not numbers, or give a rank's number on its node only.
    """
    for launcher, mark, rank, world, local, local_world, node in _TABLE:
        if mark not in environ or rank not in environ or world not in environ:
            continue
        identity = Identity(
            rank=_number(environ, rank, 0),
            world_size=_number(environ, world, 1),
            local_rank=_number(environ, local, 0),
            local_world_size=_number(environ, local_world, 1),
            node_rank=_number(environ, node, 0),
            launcher=launcher,
        )
        if not 0 <= identity.rank < identity.world_size:
            raise ConfigError(rank, environ[rank], f"must be between 0 and {world}={identity.world_size} minus 1")
        return identity
    found = _from_process_group(environ)
    if found is not None:
        return found
    if _number(environ, "LOCAL_RANK", 0) > 0 and "WORLD_SIZE" in environ:
        what = (
            f"is not set, but LOCAL_RANK={environ['LOCAL_RANK']}: has Lightning started this process? {WHERE_TO_START}"
        )
        raise ConfigError("RANK", "", what)
    return Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="python")


def process_group() -> Any:
    """Return torch.distributed, if this process has begun it; else None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _from_process_group(environ: Mapping[str, str]) -> Identity | None:
    """Return what torch.distributed knows, if it has begun: ranks that a script starts itself need no variables.

    Lightning's own launcher makes the first process of a node a rank and the parent of the others; it is then no
    process that was launched, and the others find it as their job's.
    """
    distributed = process_group()
    if distributed is None or distributed.get_world_size() == 1:
        return None
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    local_rank = _number(environ, "LOCAL_RANK", -1)
    return Identity(
        rank=rank,
        world_size=world_size,
        local_rank=rank if local_rank < 0 else local_rank,
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
        node_rank=_number(environ, "NODE_RANK", 0),
        launcher="python" if local_rank == 0 and not is_worker() else "torch.distributed",
    )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "") if name else ""
    if not text:
        return default
    try:
        return int(text.split("(")[0].split(",")[0])  # SLURM_TASKS_PER_NODE is like "4(x2)"
    except ValueError as exc:
        raise ConfigError(name, text, "must be a whole number") from exc
