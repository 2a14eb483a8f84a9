"""Owns how a script written for Comet begins and finds its experiment: start(), login(), get_running_experiment()."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ddplog.comet import config, current
from ddplog.comet.experiment import CometExperiment, ExistingExperiment, Experiment, OfflineExperiment
from ddplog.errors import ConfigError

_MODES: Final = ("get_or_create", "get", "create")


@dataclass(slots=True, kw_only=False)
class ExperimentConfig:
    """Comet's options of an experiment, in its order. Only `disabled`, `name` and `tags` mean something here."""

    disabled: bool | None = None
    log_code: bool | None = None
    log_graph: bool | None = None
    parse_args: bool | None = None
    display_summary_level: int = 1
    log_git_metadata: bool | None = None
    log_git_patch: bool | None = None
    log_env_details: bool | None = None
    log_env_gpu: bool | None = None
    log_env_host: bool | None = None
    log_env_cpu: bool | None = None
    log_env_network: bool | None = None
    log_env_disk: bool | None = None
    auto_output_logging: str | bool = "simple"
    auto_param_logging: bool = True
    auto_metric_logging: bool = True
    auto_log_co2: bool = True
    auto_metric_step_rate: int = 10
    auto_histogram_epoch_rate: int = 1
    auto_histogram_gradient_logging: bool = False
    auto_histogram_activation_logging: bool = False
    auto_histogram_tensorboard_logging: bool = False
    auto_histogram_weight_logging: bool = False
    offline_directory: str | None = None
    distributed_node_identifier: str | None = None
    name: str | None = None
    tags: Sequence[str] | None = None


def start(
    api_key: str | None = None,
    workspace: str | None = None,
    project: str | None = None,
    project_name: str | None = None,
    experiment_key: str | None = None,
    mode: str | None = None,
    online: bool | None = None,
    source: str | None = None,
    experiment_config: ExperimentConfig | None = None,
) -> CometExperiment:
    """Return this process's experiment if it has one that goes on, else a new one in the job's run.

    Args:
        api_key: Not needed, and kept nowhere.
        workspace: Comet's; means nothing to the run.
        project: As project_name.
        project_name: The run's project.
        experiment_key: Names the run where ddplog's settings do not.
        mode: get_or_create, get, or create, which never returns an experiment that goes on.
        online: Means nothing: every run can do without a network.
        source: Noted with the run.
        experiment_config: Further options.

    Raises:
        ConfigError: If the mode is unknown, or a setting of ddplog cannot work.
    """
    mode = mode or config.get_setting("comet.start.mode") or "get_or_create"
    if mode not in _MODES:
        raise ConfigError("mode", mode, f"must be one of {', '.join(_MODES)}")
    config.hide_from_now_on(api_key)
    options = experiment_config or ExperimentConfig()
    running = current.experiment
    if mode != "create" and running is not None and not running.ended and experiment_key in (None, running.id):
        return running
    kind: type[CometExperiment] = OfflineExperiment if online is False else Experiment
    if online is not False and experiment_key is not None and mode != "create":
        kind = ExistingExperiment
    experiment = kind(
        workspace=workspace,
        project_name=project_name or project,
        experiment_key=experiment_key,
        disabled=options.disabled,
        name=options.name or config.get_setting("comet.start.experiment_name"),
        tags=options.tags,
    )
    if source is not None:
        experiment.log_other("Created from", source)
    return experiment


def get_running_experiment() -> CometExperiment | None:
    """Return this process's experiment, if it has made one."""
    return current.experiment


def login(
    directory: str | None = None,  # noqa: ARG001 - nothing is saved
    force: bool | None = False,  # noqa: ARG001
    anonymous: bool = False,  # noqa: ARG001
    **settings: Any,
) -> None:
    """Ask nobody and save nothing: no key is needed."""
    config.hide_from_now_on(settings.get("api_key"))


def init_onprem(force: bool = False) -> None:
    """Do nothing."""


def error_mode() -> None:
    """Do nothing; `strict=True` is ddplog's."""


def flush() -> bool | None:
    """Flush this process's experiment."""
    return None if current.experiment is None else current.experiment.flush()


def end() -> None:
    """End this process's experiment."""
    if current.experiment is not None:
        current.experiment.end()
