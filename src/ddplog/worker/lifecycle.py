"""Owns init() and what surrounds a run in a process: the current run, exit, exceptions, fork.

What a process says at its end, in its last record; nothing of it is needed for what was logged:

    finish(status), `with run`       that status; `failed` and the exception if one leaves the block
    end of the script, sys.exit(n)   finished: the code is not known inside; an exit code that ddplog learns outranks it
    unhandled exception              failed, and the exception's line; in another thread than the main one: nothing
    Ctrl-C, not handled              killed: KeyboardInterrupt; a second one ends the wait for the store
    SIGTERM, SIGKILL, os.abort(), os._exit()     nothing: no handler of ours is installed, the user's own stay

A child process (fork, spawn, forkserver; a DataLoader worker) says nothing, and its calls are ignored with a warning.
"""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ddplog import config as settings_of
from ddplog import killpoints
from ddplog.errors import ConfigError
from ddplog.journal import spool
from ddplog.journal.election import ensure_agent
from ddplog.journal.writer import JournalWriter
from ddplog.worker import contexts as contexts_of
from ddplog.worker import current, doubts, stacks
from ddplog.worker import identity as identity_of
from ddplog.worker.absent import AbsentRun, NullRun
from ddplog.worker.run import Run, describe, finish_at_exit

_MAX_VISIBLE: Final = 1000
"""Characters of CUDA_VISIBLE_DEVICES that the journal's head has room for: 24 UUIDs, more than a rank has devices."""

_ordinal = 0
_has_hooks = False


def init(
    project: str | None = None,
    name: str | None = None,
    run_id: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
    dir: str | os.PathLike[str] | None = None,  # noqa: A002 - the name users know from other trackers
    sinks: Sequence[str] | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Run:
    """Join the job's run: every rank calls it, in any order, and gets the same run.

    Args:
        project: The tracker's project.
        name: The run's display name.
        run_id: The run's folder under `dir`; an existing one is continued as a new attempt.
        config: Hyperparameters, as by log_params().
        tags: Free words.
        dir: Folder of runs.
        sinks: Trackers, such as ("tensorboard", "jsonl").
        resume: auto, never or must.
        **settings: Any further field of config.Settings.

    Returns:
        The run, which is also what ddplog.log() uses from now on.

    Raises:
        ConfigError: If a setting cannot work. Nothing raises after this.
    """
    global _ordinal
    arguments = {
        "project": project,
        "name": name,
        "run_id": run_id,
        "tags": tags,
        "dir": dir,
        "sinks": sinks,
        "resume": resume,
        **settings,
    }
    if current.is_main_imported_again():
        return _stay_absent(run_id)
    killpoints.arm(os.environ)
    resolved = settings_of.resolve(arguments)
    if resolved.mode == "off":
        current.run = NullRun()
        return current.run
    _check_sinks(resolved.sinks)
    contexts = contexts_of.initialised(sys.modules)
    who = identity_of.detect(os.environ, contexts)
    folder, job = _declare(resolved, who, config or {})
    _ordinal += 1
    _leave_run(folder)
    incarnation = secrets.token_bytes(16)
    try:
        journal = JournalWriter(
            folder / f"{who.rank}.{incarnation.hex()}",
            incarnation,
            _describe_process(who, job),
            segment_bytes=resolved.segment_bytes,
            spool_bytes=resolved.spool_bytes,
            check=lambda: ensure_agent(folder),
        )
    except OSError as exc:
        reason = getattr(exc, "reason", None) or exc.strerror
        raise ConfigError("spool", str(folder.parent), f"cannot hold a journal: {reason}") from exc
    ensure_agent(folder)
    run = Run(
        journal,
        job,
        who,
        strict=resolved.strict,
        exit_wait_s=resolved.exit_wait_s,
        max_keys=resolved.max_keys,
    )
    stacks.arm(journal.folder, resolved.stack_signal)
    if config:
        run.log_params(config)
    _install_hooks()
    current.runs[:] = [known for known in current.runs if known._journal.is_open] + [run]  # noqa: SLF001
    current.run = run
    launched = identity_of.from_environment(os.environ)
    doubt = doubts.find(os.environ, launched, contexts, sys.modules, sys.orig_argv)
    if doubt is not None:
        doubts.tell(run, doubt)
    return run


def _stay_absent(run_id: str | None) -> Run:
    warnings.warn(
        "ddplog: init() is ignored where a worker process imports the main module again: "
        'put it below `if __name__ == "__main__":`',
        RuntimeWarning,
        stacklevel=3,
    )
    current.run = AbsentRun(run_id or "absent")
    return current.run


def _leave_run(folder: Path) -> None:
    """Finish this process's earlier handle on the same run (a notebook cell that ran twice): a rank is held once."""
    for run in current.runs:
        journal = run._journal  # noqa: SLF001 - the same package
        if journal.is_open and journal.folder.parent == folder:
            run.finish()


def _declare(
    resolved: settings_of.Settings, who: identity_of.Identity, config: Mapping[str, Any]
) -> tuple[Path, spool.JobInfo]:
    now = time.time_ns()
    root = spool.open_spool(resolved.spool)
    key, launcher_pid = spool.job_key(os.environ, has_launcher=who.has_launcher)
    suffix = resolved.run_id or str(_ordinal)
    folder = root / f"{key}-{suffix}"
    runs = Path(resolved.dir).absolute()
    _check_runs(runs, resolved, is_first=not folder.exists())
    info = spool.JobInfo(
        run_id=resolved.run_id or spool.new_run_id(now),
        project=resolved.project,
        name=resolved.name,
        dir=str(runs),
        sinks=resolved.sinks,
        tags=resolved.tags,
        config=dict(config),
        created_unix_ns=now,
        launcher_pid=launcher_pid,
        launcher_ticks=spool.start_ticks(launcher_pid) if launcher_pid else 0,
        node_rank=who.node_rank,
        launcher="ddplog run" if spool.JOB_VARIABLE in os.environ else who.launcher,
        settings={
            field: getattr(resolved, field)
            for field in (
                "grace_s",
                "hang_s",
                "late_s",
                "settle_s",
                "sample_s",
                "max_keys",
                "rank_log_bytes",
                "spool_bytes",
                "host",
                "port",
            )
        },
    )
    return folder, spool.declare_job(folder, info, may_meet=resolved.run_id is not None)


def _check_sinks(sinks: Sequence[str]) -> None:
    if not sinks:
        return
    from ddplog.sinks import check_installed

    for sink in sinks:
        check_installed(sink)


def _check_runs(runs: Path, resolved: settings_of.Settings, *, is_first: bool) -> None:
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError("dir", str(runs), f"cannot make this folder: {exc.strerror}") from exc
    if not os.access(runs, os.W_OK | os.X_OK):
        raise ConfigError("dir", str(runs), "cannot be written")
    if resolved.run_id is None or not is_first:
        return
    exists = (runs / resolved.run_id / "run.db").exists()
    if resolved.resume == "never" and exists:
        raise ConfigError("resume", "never", f"run {resolved.run_id} exists in {runs}")
    if resolved.resume == "must" and not exists:
        raise ConfigError("resume", "must", f"there is no run {resolved.run_id} in {runs}")


def _describe_process(who: identity_of.Identity, job: spool.JobInfo) -> Mapping[str, Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        "rank": who.rank,
        "world_size": who.world_size,
        "local_rank": who.local_rank,
        "local_world_size": who.local_world_size,
        "node_rank": who.node_rank,
        "launcher": who.launcher,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "boot_id": spool.boot_id(),
        "run_id": job.run_id,
        "started_unix_ns": time.time_ns(),
        # For the sampler, which cannot see this environment: which GPU is whose. As it is now; CUDA is not asked.
        "cuda_visible_devices": visible if visible is None else visible[:_MAX_VISIBLE],
        "cuda_device_order": os.environ.get("CUDA_DEVICE_ORDER", "")[:_MAX_VISIBLE],
    }


def _install_hooks() -> None:
    global _has_hooks
    if _has_hooks:
        return
    _has_hooks = True
    atexit.register(_at_exit)
    os.register_at_fork(after_in_child=_after_fork)
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, (SystemExit, KeyboardInterrupt)):
            _failures.append(describe(kind, error))
        elif issubclass(kind, KeyboardInterrupt):
            _failures.append("")
        previous(kind, error, traceback)

    sys.excepthook = excepthook


_failures: list[str] = []
"""What the excepthook saw; "" for KeyboardInterrupt."""


def _at_exit() -> None:
    if not _failures:
        finish_at_exit(current.runs, "finished", "")
    elif _failures[0]:
        finish_at_exit(current.runs, "failed", _failures[0])
    else:
        finish_at_exit(current.runs, "killed", "KeyboardInterrupt")


def _after_fork() -> None:
    for run in current.runs:
        run._journal.abandon()  # noqa: SLF001 - the same package
