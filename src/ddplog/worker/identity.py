"""Decides which rank this process is. Never on import: some launchers set their variables late.

In this order: what an initialised library says (torch.distributed, Horovod: `contexts`), then the launcher's variables:
torchelastic, Horovod, DeepSpeed, MPI and LSF, RANK with LOCAL_RANK, SLURM, RANK alone, a single process.

A library outranks the environment, which is stale after a resize of an elastic Horovod job, with one exception: where
every library that is initialised is alone, and the launcher has started several ranks, nothing connects them (a Horovod
script under torchrun). The launcher's ranks are kept then, so that no two processes claim to be rank 0 and all of them
are in the run; `doubts` says aloud what has happened.

RANK and WORLD_SIZE without LOCAL_RANK number pods, not processes (Kubeflow's PyTorchJob; torchrun reads and replaces
them). A script that plain Python runs there is one process of a pod, so its pod's number is its rank; whether it is
alone there, only the job's author knows, and `doubts` names that, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ddplog.errors import ConfigError
from ddplog.worker.contexts import Context
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
    """`torchrun`, `horovodrun`, `openmpi`, `slurm`, ...; a library where only that says that there are other ranks;
    `pod` for RANK without LOCAL_RANK; `python` for a single process."""

    @property
    def has_launcher(self) -> bool:
        """Whether something started this process as one of several on this node."""
        return self.launcher not in (POD, "python")


POD: Final = "pod"

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
    (POD, "RANK", "RANK", "WORLD_SIZE", "", "", "RANK"),
)  # fmt: skip


WHERE_TO_START: Final = (
    "without a launcher a rank is known when the framework has started all: leave the start of the run to ddplog's logger "
    "or callback, or start the script with torchrun or `ddplog run`"
)


def detect(environ: Mapping[str, str], contexts: Sequence[Context] = ()) -> Identity:
    """Return who this process is.

    Args:
        environ: The environment.
        contexts: What the libraries that are initialised say.

    Raises:
        ConfigError: If a launcher's variables contradict each other, are not numbers, or give a rank's number on its node only.
    """
    launched = from_environment(environ)
    if not contexts or is_split(environ, launched, contexts):
        if launched.launcher == "python" and launched.local_rank > 0:
            what = f"is not set, but LOCAL_RANK={launched.local_rank}: has Lightning started this process? {WHERE_TO_START}"
            raise ConfigError("RANK", "", what)
        return launched
    context = max(contexts, key=lambda context: context.size)
    local_rank = context.local_rank
    if local_rank is None:
        is_numbered = launched.launcher != "python" or "LOCAL_RANK" in environ
        local_rank = launched.local_rank if is_numbered or context.size == 1 else context.rank
    return Identity(
        rank=context.rank,
        world_size=context.size,
        local_rank=local_rank,
        local_world_size=launched.local_world_size if context.local_size is None else context.local_size,
        node_rank=launched.node_rank if context.node_rank is None else context.node_rank,
        launcher=_starter(environ, launched, context),
    )


def _starter(environ: Mapping[str, str], launched: Identity, context: Context) -> str:
    """Return what started a process that a library knows.

    Lightning's own launcher makes the first process of a node a rank and the parent of the others; it is then no
    process that was launched, and the others find it as their job's.
    """
    if launched.has_launcher or context.size == 1:
        return launched.launcher
    is_parent = launched.launcher == "python" and environ.get("LOCAL_RANK") == "0" and not is_worker()
    return "python" if is_parent else context.library


def is_split(environ: Mapping[str, str], launched: Identity, contexts: Sequence[Context]) -> bool:
    """Whether a launcher started several ranks, and every library that is initialised in this one is alone."""
    if launched.world_size == 1 or not contexts:
        return False
    is_elastic = environ.get("HOROVOD_ELASTIC") == "1"  # all other ranks may have left it
    return all(c.size == 1 and not (is_elastic and c.library == "horovod") for c in contexts)


def num_per_pod(environ: Mapping[str, str]) -> int | None:
    """Return how many processes a PyTorchJob says that each pod has; None if it does not say (`auto`, or no such job)."""
    text = environ.get("PET_NPROC_PER_NODE", "")
    return int(text) if text.isdecimal() and int(text) else None


def from_environment(environ: Mapping[str, str]) -> Identity:
    """Return who the launcher's variables say that this process is.

    Raises:
        ConfigError: If they contradict each other or are not numbers.
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
        if launcher == POD:  # a PyTorchJob's WORLD_SIZE counts the processes of all pods, where it knows their number
            num_pods = max(identity.rank + 1, identity.world_size // (num_per_pod(environ) or 1))
            return replace(identity, world_size=num_pods)
        return identity
    has_local = "WORLD_SIZE" in environ  # Lightning's own launcher gives it with LOCAL_RANK and NODE_RANK, and no RANK
    return Identity(
        rank=0,
        world_size=1,
        local_rank=_number(environ, "LOCAL_RANK", 0) if has_local else 0,
        local_world_size=1,
        node_rank=_number(environ, "NODE_RANK", 0) if has_local else 0,
        launcher="python",
    )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "") if name else ""
    if not text:
        return default
    try:
        return int(text.split("(")[0].split(",")[0])  # SLURM_TASKS_PER_NODE is like "4(x2)"
    except ValueError as exc:
        raise ConfigError(name, text, "must be a whole number") from exc
