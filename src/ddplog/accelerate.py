"""The tracker for Accelerate, and what it takes for accelerator.log() to reach it on every rank.

    accelerator = ddplog.accelerate.attach(Accelerator())      # then init_trackers(), log(), end_training() as ever

A tracker alone sees rank 0 only, whatever its main_process_only says: Accelerator.init_trackers() and Accelerator.log()
are themselves for the main process. attach() lets them go on to this tracker on the other ranks; other trackers notice
nothing.

Owns the translation of Accelerate's calls, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from ddplog.worker.joining import join

if TYPE_CHECKING:
    from ddplog.worker.run import Run

if find_spec("accelerate") is None:
    raise ImportError("ddplog.accelerate needs Accelerate: pip install accelerate")

from accelerate.tracking import GeneralTracker

_logger = logging.getLogger("ddplog")
AcceleratorT = TypeVar("AcceleratorT")


class DdplogTracker(GeneralTracker):  # type: ignore[misc]
    """Hands what Accelerate logs to the run: the current one, or one that is started with the trackers.

    Args:
        project: The project; that of init_trackers() if not given.
        **settings: Further ones of ddplog.init(), for a run that is started here.
    """

    name = "ddplog"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, project: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.settings = settings | ({} if project is None else {"project": project})
        self._run: Run | None = None
        self.is_attached = False

    @property
    def tracker(self) -> Run:
        """The run; started at the first use."""
        if self._run is None:
            self._run = join(self.settings)
        return self._run

    def start(self) -> None:
        """Start the run, unless there is one."""
        if self.tracker.world_size > 1 and not self.is_attached:
            _logger.warning(
                "ddplog: accelerator.log() reaches this tracker on rank 0 only; for every rank's values say "
                "ddplog.accelerate.attach(accelerator) before init_trackers()"
            )

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Log hyperparameters."""
        self.tracker.log_params(values)

    def log(self, values: Mapping[str, Any], step: int | None = None, weight: float = 1.0) -> None:
        """Log this rank's values; strings as text. The weight comes from log_kwargs={"ddplog": {"weight": ...}}."""
        numbers = {}
        for key, value in values.items():
            if isinstance(value, str):
                self.tracker.log_text(key, value, step)
            else:
                numbers[key] = value
        if numbers:
            self.tracker.log(numbers, step=step, weight=weight)

    def finish(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


def attach(accelerator: AcceleratorT, **settings: Any) -> AcceleratorT:
    """Log on every rank what accelerator.log() is given.

    Args:
        accelerator: An accelerate.Accelerator, before its init_trackers(), if that is called at all.
        **settings: Those of ddplog.init(), for a run that is started here; project defaults to init_trackers()'s.

    Returns:
        The accelerator.
    """
    one: Any = accelerator
    given = next((tracker for tracker in one.log_with if isinstance(tracker, DdplogTracker)), None)
    tracker = given or DdplogTracker(**settings)
    if given is None:
        one.log_with.append(tracker)
    tracker.is_attached = True
    log, init_trackers = one.log, one.init_trackers

    @wraps(init_trackers)
    def init_trackers_everywhere(
        project_name: str, config: Mapping[str, Any] | None = None, init_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        tracker.settings.setdefault("project", project_name)
        init_trackers(project_name, config=config, init_kwargs=init_kwargs)
        if tracker not in one.trackers:  # not the main process
            one.trackers.append(tracker)
            tracker.start()
            if config is not None:
                tracker.store_init_configuration(config)

    @wraps(log)
    def log_everywhere(
        values: Mapping[str, Any], step: int | None = None, log_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        log_kwargs = log_kwargs or {}
        log(values, step=step, log_kwargs=log_kwargs)
        if not (one.is_main_process and tracker in one.trackers):
            tracker.log(values, step=step, **log_kwargs.get(tracker.name, {}))

    one.init_trackers, one.log = init_trackers_everywhere, log_everywhere
    return accelerator
