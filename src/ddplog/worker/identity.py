"""Decides which rank this process is, from the environment. Never on import: some launchers set it late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ddplog.errors import ConfigError


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


def detect(environ: Mapping[str, str]) -> Identity:
    """Return who this process is.

    Raises:
        ConfigError: If a launcher's variables contradict each other or are not numbers.
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
    return Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="python")


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "") if name else ""
    if not text:
        return default
    try:
        return int(text.split("(")[0].split(",")[0])  # SLURM_TASKS_PER_NODE is like "4(x2)"
    except ValueError as exc:
        raise ConfigError(name, text, "must be a whole number") from exc
