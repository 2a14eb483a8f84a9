"""Names what is wrong, or may be, with how a job was started: found by init(), said in a warning and as an event.

A script that is started by the wrong launcher often runs without an error: every process is then alone, all of them
are rank 0 of 1, and nothing is averaged. What `identity` does in such a case is written there.
"""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ddplog.worker.contexts import Context
from ddplog.worker.identity import POD, Identity, is_split, num_per_pod

if TYPE_CHECKING:
    from collections.abc import Container

    from ddplog.worker.run import Run

_logger = logging.getLogger("ddplog")
_MPI: Final = ("openmpi", "mpich", "mvapich2", "lsf")
_STARTED_BY: Final = {"openmpi": "mpirun", "mpich": "mpirun", "mvapich2": "mpirun", "lsf": "jsrun", "slurm": "srun"}
_MAX_COMMAND: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """One thing to be told."""

    title: str
    text: str
    level: str
    """error where the training is wrong; warning where only the job's author can know."""


def find(
    environ: Mapping[str, str],
    launched: Identity,
    contexts: Sequence[Context],
    modules: Container[str],
    argv: Sequence[str],
) -> Doubt | None:
    """Return what is doubtful about how this process was started; None if nothing is.

    Args:
        environ: The environment.
        launched: Who the environment alone says that this process is.
        contexts: What the libraries that are initialised say.
        modules: sys.modules.
        argv: sys.orig_argv, for the command that is advised.
    """
    if is_split(environ, launched, contexts):
        return _split(launched, contexts, argv)
    if launched.launcher == "horovodrun" and launched.world_size > 1 and not contexts:
        return _no_horovod(launched, argv) if "torch" in modules and "horovod" not in modules else None
    if launched.launcher == POD and not any(context.size > 1 for context in contexts):
        return _pod(environ, launched)
    return None


def stale(rank: int, world_size: int, rank_now: int, size_now: int) -> Doubt:
    """Return what is to be told where ddplog knows this process by another number than Horovod does now."""
    text = (
        f"ddplog.init() joined as rank {rank} of {world_size}, and this is now Horovod's rank {rank_now} of {size_now}: the "
        f"job was resized since, or hvd.init() came later. Call ddplog.init() after hvd.init(), and in an elastic job again "
        f"in the function that hvd.elastic.run wraps: it opens a new attempt of the same run."
    )
    return Doubt(title="the rank is out of date", text=text, level="error")


def tell(run: Run, doubt: Doubt) -> None:
    """Warn, once a node, and put one event on the run. To be called by what the user's own line calls."""
    if doubt.title in run._warned:  # noqa: SLF001 - the same package
        return
    run._warned.add(doubt.title)  # noqa: SLF001
    if run.rank == 0:
        run.alert(doubt.title, doubt.text, doubt.level)
    if run._identity.local_rank != 0:  # noqa: SLF001
        return
    message = f"ddplog: {doubt.title}: {doubt.text}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # the user runs with -W error; the training is theirs to stop
        _logger.warning("%s", message)


def _split(launched: Identity, contexts: Sequence[Context], argv: Sequence[str]) -> Doubt:
    num, starter = launched.world_size, _STARTED_BY.get(launched.launcher, launched.launcher)
    horovod = next((context for context in contexts if context.library == "horovod"), None)
    reason = f"it does not read the variables of {starter}"
    if horovod is None:
        alone = "torch.distributed has a world of 1 in each of the processes"
        advice = _advise(f"torchrun --nproc-per-node {num}", f"ddplog run --nproc-per-node {num}", argv)
    else:
        alone = "Horovod is alone in each of the processes (hvd.rank() is 0, hvd.size() is 1)"
        advice = _advise(f"horovodrun -np {num} python", f"ddplog run -- horovodrun -np {num} python", argv)
        if launched.launcher in _MPI and not horovod.has_mpi:
            reason = "this one is built without MPI"
    text = (  # the command comes early: tables cut a long message off
        f"{starter} started {num} separate trainings, and no gradient is averaged. {advice}. {alone}: {reason}. ddplog "
        f"keeps the ranks of {starter}, so that all of it is in this run."
    )
    return Doubt(title="the job is split", text=text, level="error")


def _no_horovod(launched: Identity, argv: Sequence[str]) -> Doubt:
    num = launched.world_size
    advice = _advise(f"torchrun --nproc-per-node {num}", f"ddplog run --nproc-per-node {num}", argv)
    text = (
        f"horovodrun started {num} processes, and this script has neither imported Horovod nor initialised "
        f"torch.distributed, which does not read the variables of horovodrun. Unless it connects them later, they are "
        f"{num} separate trainings, and no gradient is averaged between them. If it is a script for torchrun: {advice}."
    )
    return Doubt(title="the job may be split", text=text, level="warning")


def _pod(environ: Mapping[str, str], launched: Identity) -> Doubt | None:
    rank, world_size, num = launched.rank, environ["WORLD_SIZE"], num_per_pod(environ)
    if num == 1:  # the job's author has said that a pod is a process
        return None
    given = (
        f"RANK={rank} and WORLD_SIZE={world_size} are given without LOCAL_RANK, as a PyTorchJob gives them to each pod"
    )
    if num is None:
        text = (
            f"{given}. They are taken for this process, which is right if it is the only one of its pod. If it is not, start "
            f"the script with torchrun, which reads them and numbers the processes, or call init_process_group() before "
            f"ddplog.init(). If it is, LOCAL_RANK=0 says so."
        )
        return Doubt(title="RANK is the pod's", text=text, level="warning")
    text = (
        f"{given}, and PET_NPROC_PER_NODE={num} processes are to run in each, but nothing has numbered them. This one is "
        f"taken for rank {rank} of {launched.world_size}, one process a pod; further ones in the pod would claim the same "
        f"rank. Start the script with torchrun, which reads these variables, or call init_process_group() before "
        f"ddplog.init()."
    )
    return Doubt(title="RANK is the pod's", text=text, level="error")


def _advise(launcher: str, wrapped: str, argv: Sequence[str]) -> str:
    words = list(argv[1:])
    if launcher.startswith("torchrun"):  # it starts Python itself, unbuffered or not
        while words and words[0].startswith("-") and words[0] != "-m":
            words.pop(0)
    command = shlex.join(words)
    if not words or len(command) > _MAX_COMMAND:
        command = "..."
    return f"Start it with `{launcher} {command}`, or with `{wrapped} {command}`"
