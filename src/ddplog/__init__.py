"""One coherent run from every rank of a distributed training job.

    import ddplog

    run = ddplog.init(project="digits")
    run.log({"loss": loss}, step=step, weight=len(batch))

Importing this loads no torch, grpc, zmq, sqlite3 or numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ddplog.errors import (
    ConfigError,
    DdplogError,
    LocalProtocolError,
    PermanentSinkError,
    RemoteProtocolError,
    RetryableSinkError,
    RunNotFoundError,
    SinkError,
    UsageError,
)
from ddplog.worker import current

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ddplog.ddp import attach
    from ddplog.store.reader import open_run
    from ddplog.worker.lifecycle import init
    from ddplog.worker.run import Run

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DdplogError",
    "LocalProtocolError",
    "PermanentSinkError",
    "RemoteProtocolError",
    "RetryableSinkError",
    "Run",
    "RunNotFoundError",
    "SinkError",
    "UsageError",
    "alert",
    "attach",
    "define_metric",
    "finish",
    "flush",
    "init",
    "log",
    "log_params",
    "log_text",
    "open_run",
    "set_step",
]


_LAZY = {
    "Run": "ddplog.worker.run",
    "attach": "ddplog.ddp",
    "init": "ddplog.worker.lifecycle",
    "open_run": "ddplog.store.reader",
}
"""Names that are imported when they are first used, so that importing ddplog costs a training script nothing."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ddplog' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _run() -> Run:
    if current.run is None:
        if not current.is_worker():
            raise UsageError("call ddplog.init() first")
        from ddplog.worker.absent import AbsentRun  # a started worker has no run where a forked one has a closed one

        current.run = AbsentRun()
    return current.run


def log(data: Mapping[str, Any], step: int | None = None, weight: float = 1.0) -> None:
    """Log numbers of one step to the current run; see Run.log()."""
    _run().log(data, step, weight)


def define_metric(pattern: str, reduce: str = "mean", *, replicated: bool = False) -> None:
    """Declare a reduction on the current run; see Run.define_metric()."""
    _run().define_metric(pattern, reduce, replicated=replicated)


def log_params(params: Mapping[str, Any]) -> None:
    """Log hyperparameters to the current run; see Run.log_params()."""
    _run().log_params(params)


def log_text(key: str, text: str, step: int | None = None) -> None:
    """Log text to the current run; see Run.log_text()."""
    _run().log_text(key, text, step)


def alert(title: str, text: str = "", level: str = "warning") -> None:
    """Put an event on the current run; see Run.alert()."""
    _run().alert(title, text, level)


def set_step(step: int) -> None:
    """Set the current run's ambient step; see Run.set_step()."""
    _run().set_step(step)


def flush() -> None:
    """Make what was logged durable on this node; see Run.flush()."""
    _run().flush()


def finish(status: str = "finished", detail: str = "") -> None:
    """Finish the current run, if there is one; see Run.finish()."""
    if current.run is not None:
        current.run.finish(status, detail)
