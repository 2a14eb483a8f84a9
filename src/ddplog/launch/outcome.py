"""Decides what a job's end means: the run's status, its cause, and how the launcher itself must end.

Pure: takes exit codes, signals and the environment's names, and touches nothing. An exit code below zero is
minus the signal that killed the process, as subprocess and torchrun both write it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TERMINATIONS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Signals that ask a launcher to end its job: torchrun's default `--signals-to-handle`."""

PREEMPTIONS: Final = frozenset({signal.SIGTERM, signal.SIGUSR1})
"""Signals by which a scheduler takes the machine back: SIGTERM everywhere; SIGUSR1 is what
`sbatch --signal=USR1@120`, the habit of submitit and Lightning, sends."""

_SCHEDULERS: Final = (("SLURM_JOB_ID", "SLURM"), ("KUBERNETES_SERVICE_HOST", "Kubernetes"))

_CONSEQUENCES: Final = {-signal.SIGABRT: 2, -signal.SIGTERM: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How one rank ended, when it did not end well."""

    rank: int
    pid: int
    exit_code: int
    """Below zero: minus the signal that killed it."""
    timestamp_s: float = 0.0
    """When it failed, seconds since 1970; torchrun knows whole seconds only."""
    message: str = ""
    """The last line of its traceback, if it left one."""

    @property
    def signal(self) -> int | None:
        return -self.exit_code if self.exit_code < 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    status: str
    """finished, failed, killed or preempted."""
    detail: str
    """The cause in a few words; empty when finished."""
    exit_code: int
    """What the launcher exits with, unless it dies of `death_signal`."""
    death_signal: int | None = None
    """The signal the launcher must die of once the end work is done."""
    is_hurried: bool = False
    """Whoever ended the job will soon end it with SIGKILL: SLURM and Kubernetes wait 30 s by default."""
    failures: tuple[RankFailure, ...] = ()
    """Every rank that is known to have failed on this node, also in groups that were restarted, the earliest first."""


FINISHED: Final = Outcome(status="finished", detail="", exit_code=0)


def describe_signal(number: int) -> str:
    """Return `signal 9 (SIGKILL)`, or `signal 35` where the number has no name."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def describe_exit(exit_code: int) -> str:
    """Return `exit code 7`, or the signal for a code below zero."""
    return describe_signal(-exit_code) if exit_code < 0 else f"exit code {exit_code}"


def find_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure that brought the others about.

    The earliest one. Within one second, which is all that torchrun's clock tells apart, a rank that was killed
    comes before one that exited (its peers exit because their collective broke), and SIGABRT (NCCL's watchdog)
    and SIGTERM (torchrun stopping the rest) come last.

    Args:
        failures: At least one.
    """

    def order(failure: RankFailure) -> tuple[int, int, int]:
        kind = _CONSEQUENCES.get(failure.exit_code, 0 if failure.exit_code < 0 else 1)
        return int(failure.timestamp_s), kind, failure.rank

    return min(failures, key=order)


def ranks_failed(failures: Sequence[RankFailure]) -> Outcome:
    """Return the outcome of a torchrun job some of whose ranks failed; torchrun exits with 1 then."""
    cause = find_cause(failures)
    detail = f"rank {cause.rank}: {describe_exit(cause.exit_code)}"
    if cause.message:
        detail += f": {cause.message}"
    return Outcome(status="failed", detail=detail, exit_code=1, failures=tuple(failures))


def launcher_failed(message: str, exit_code: int = 1) -> Outcome:
    """Return the outcome of a job whose launcher broke (no rendezvous, no such device)."""
    return Outcome(status="failed", detail=message, exit_code=exit_code)


def launcher_signalled(number: int, environ: Mapping[str, str], *, dies: bool) -> Outcome:
    """Return the outcome of a job that was ended by a signal to its launcher.

    Args:
        number: The signal.
        environ: Tells whether a scheduler runs us.
        dies: Whether the launcher must die of the signal. torchrun does not: it exits with 1.
    """
    status, detail = _ended_by(number, environ)
    death_signal = number if dies else None
    is_hurried = number != signal.SIGINT
    return Outcome(status=status, detail=detail, exit_code=1, death_signal=death_signal, is_hurried=is_hurried)


def command_ended(exit_code: int, received: Sequence[int], environ: Mapping[str, str]) -> Outcome:
    """Return the outcome of any command.

    Args:
        exit_code: The child's; below zero, minus the signal that killed it.
        received: Signals the launcher got while the child lived, in order.
        environ: Tells whether a scheduler runs us.
    """
    death_signal = -exit_code if exit_code < 0 else None
    asked = next((number for number in received if _ends_jobs(number, environ)), None)
    if asked is not None:
        status, detail = _ended_by(asked, environ)
        if exit_code > 0:
            detail += f", then {describe_exit(exit_code)}"
    elif exit_code == 0:
        status, detail = "finished", ""
    else:
        status, detail = "failed", describe_exit(exit_code)
    return Outcome(
        status=status,
        detail=detail,
        exit_code=max(exit_code, 0),
        death_signal=death_signal,
        is_hurried=asked not in (None, signal.SIGINT),
    )


def _ends_jobs(number: int, environ: Mapping[str, str]) -> bool:
    return number in TERMINATIONS or (number in PREEMPTIONS and _scheduler(environ) is not None)


def _ended_by(number: int, environ: Mapping[str, str]) -> tuple[str, str]:
    scheduler = _scheduler(environ)
    if scheduler is not None and number in PREEMPTIONS:
        return "preempted", f"{describe_signal(number)} under {scheduler}"
    return "killed", describe_signal(number)


def _scheduler(environ: Mapping[str, str]) -> str | None:
    return next((name for variable, name in _SCHEDULERS if variable in environ), None)
