"""Does the end work of a job: report the outcome, wait for delivery, print the summary, write the report.

Nothing here may change the job's exit code, so no exception leaves `end_job`. Prints to stderr only.
"""

from __future__ import annotations

import shlex
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape

from ddplog.errors import DdplogError
from ddplog.journal.election import ensure_agent
from ddplog.journal.spool import JobInfo, open_spool, read_job
from ddplog.launch.drain import (
    REACH_S,
    Aggregator,
    Client,
    Drain,
    Patience,
    describe_behind,
    find_jobs,
    hosts_aggregator,
    make_request,
    wait_drained,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.status import Status

    from ddplog.config import Settings
    from ddplog.launch.outcome import Outcome

HURRIED_WAIT_S: Final = 10.0
"""Longest wait after SIGTERM: SLURM's KillWait and Kubernetes' grace period are 30 s, and torchrun may have
used most of it to stop the ranks."""
PLAIN_EVERY_S: Final = 10.0


class Progress:
    """Shows how far the delivery is: one live line on a terminal, a plain line each 10 s elsewhere."""

    def __init__(self, console: Console, *, is_quiet: bool) -> None:
        self._console = console
        self._is_quiet = is_quiet
        self._status: Status | None = None
        self._next_plain_s = PLAIN_EVERY_S

    def close(self) -> None:
        """Take the live line away."""
        if self._status is not None:
            self._status.stop()

    def show(self, drain: Drain, waited_s: float) -> None:
        if self._is_quiet:
            return
        what = ", ".join(f"{sink.name} {sink.lag:,} behind" for sink in drain.behind) if drain.is_stored else "ranks"
        text = f"ddplog: waiting for {what} ({waited_s:.0f} s, Ctrl-C skips the wait)"
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(escape(text))
                self._status.start()
            self._status.update(escape(text))
        elif waited_s >= self._next_plain_s:
            self._next_plain_s += PLAIN_EVERY_S
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Finale:
    """The end work of one job.

    Args:
        settings: Resolved as the ranks resolve them.
        outcome: How the job ended.
        is_quiet: Print problems only.
        has_summary: Print the summary and write the report.
        console: Where to print; stderr.
        patience: The clock, and the wish to stop.
        connect: Opens the control plane; `ddplog.aggregator.control.connect` if None.
        revive: Starts the agent of a job's folder unless it lives; `ddplog.journal.election.ensure_agent` if None.
    """

    def __init__(
        self,
        settings: Settings,
        outcome: Outcome,
        *,
        is_quiet: bool = False,
        has_summary: bool = True,
        console: Console | None = None,
        patience: Patience | None = None,
        connect: Callable[[Path], Client] | None = None,
        revive: Callable[[Path], None] | None = None,
    ) -> None:
        self._settings = settings
        self._outcome = outcome
        self._is_quiet = is_quiet
        self._has_summary = has_summary
        self._console = Console(stderr=True) if console is None else console
        self._patience = Patience() if patience is None else patience
        self._connect = _connect if connect is None else connect
        self._revive = ensure_agent if revive is None else revive

    def __repr__(self) -> str:
        return f"Finale({self._outcome.status}, {self._patience!r})"

    def end_job(self, job: str) -> None:
        """Do the end work of every run that the job had on this node. Raises nothing."""
        with self._patience.listening():
            try:
                self._end_job(job)
            except KeyboardInterrupt:
                self._warn("interrupted again: the helpers go on without us")
            except Exception as exc:  # noqa: BLE001 - the edge: the job's exit code must not change
                self._report_failure("the end work", exc)

    def _end_job(self, job: str) -> None:
        if self._settings.mode == "off":
            return
        folders = find_jobs(open_spool(self._settings.spool), job)
        if not folders:
            self._say("the job never called ddplog.init(): there is no run to show")
        for folder in folders:
            self._end_run(folder)

    def _end_run(self, folder: Path) -> None:
        info = read_job(folder)
        if not hosts_aggregator(folder):
            self._say(f"run {info.run_id}: rank 0 is not on this node, so there is nothing to end here ({folder})")
            return
        self._deliver(info, folder)
        if self._has_summary and (info.run_dir / "run.db").exists():
            self._attempt("the summary", lambda: self._print_summary(info))
            self._attempt("the report", lambda: self._write_report(info))

    def _deliver(self, info: JobInfo, folder: Path) -> None:
        aggregator = Aggregator(
            info.run_dir,
            lambda: _is_ended(info.run_dir),
            self._patience,
            self._connect,
            lambda: self._revive(folder),
        )
        try:
            request = make_request(self._outcome)
            if aggregator.ask(lambda client: client.finish(request)) is not None or aggregator.is_gone:
                with closing(Progress(self._console, is_quiet=self._is_quiet)) as progress:
                    drain = wait_drained(aggregator, info.run_dir, self._limit_s, self._patience, progress.show)
                self._report_drain(info, drain)
                return
        finally:
            aggregator.close()
        self._warn(
            f"run {info.run_id}: its aggregator did not answer for {REACH_S:.0f} s, so it was not told that the job "
            f"{_describe(self._outcome)}; what the ranks logged is safe in {folder}, and {folder / 'logs'} may say why"
        )

    @property
    def _limit_s(self) -> float:
        limit_s = self._settings.drain_wait_s
        return min(limit_s, HURRIED_WAIT_S) if self._outcome.is_hurried else limit_s

    def _report_drain(self, info: JobInfo, drain: Drain) -> None:
        if not drain.is_stored:
            self._warn(f"run {info.run_id}: not every record is stored yet; the helpers go on in the background")
        phrases = describe_behind(info, drain)
        if phrases:
            command = shlex.join(["ddplog", "sync", str(info.run_dir)])
            self._warn(
                f"not up to date: {'; '.join(phrases)}. The helpers go on in the background; "
                f"to deliver what they could not: {command}"
            )

    def _print_summary(self, info: JobInfo) -> None:
        if self._is_quiet:
            return
        from ddplog.store.reader import open_run
        from ddplog.view.tables import summary

        with open_run(info.run_dir) as run:
            self._console.print(summary(run))

    def _write_report(self, info: JobInfo) -> None:
        from ddplog.store.reader import open_run
        from ddplog.view.report import write_report

        path = info.run_dir / "report.html"
        with open_run(info.run_dir) as run:
            write_report(run, path)
        self._say(f"report: {path}")

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:  # noqa: BLE001 - the edge: one part of the end work must not cost the next
            self._report_failure(what, exc)

    def _report_failure(self, what: str, exc: Exception) -> None:
        self._warn(f"{what} failed: {type(exc).__name__}: {exc}")

    def _say(self, text: str) -> None:
        if not self._is_quiet:
            self._print(f"ddplog: {text}", None)

    def _warn(self, text: str) -> None:
        self._print(f"ddplog: {text}", "yellow")

    def _print(self, text: str, style: str | None) -> None:
        with suppress(OSError):  # The terminal is gone (SIGHUP), or nobody reads the pipe.
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _connect(path: Path) -> Client:
    from ddplog.aggregator.control import connect

    return connect(path)


def _is_ended(run_dir: Path) -> bool:
    """Return whether the store says how the run has ended."""
    from ddplog.store.reader import open_run

    try:
        with open_run(run_dir) as run:
            return run.status not in ("running", "unknown")
    except (DdplogError, OSError):
        return False


def _describe(outcome: Outcome) -> str:
    return f"{outcome.status} ({outcome.detail})" if outcome.detail else outcome.status
