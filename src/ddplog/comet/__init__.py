"""Stands in for `comet_ml`: a script written for Comet logs to ddplog, from every rank, into one run.

    import ddplog.comet as comet_ml          # one import changed
    ddplog run --capture comet train.py      # or none

On every rank, `Experiment(...)`, `start(...)` and their like join the job's run (or use the one that ddplog.init() has
made), and keys that would collide become one reduced series. No Comet server, key or package is involved; Comet's
automatic logging (of code, packages, output, frameworks) is not here. `experiment` says what becomes of each call.
"""

from __future__ import annotations

from typing import Any

from ddplog.comet.config import get_api_key, get_config, get_experiment_key
from ddplog.comet.experiment import (
    CometExperiment,
    ExistingExperiment,
    ExistingOfflineExperiment,
    Experiment,
    OfflineExperiment,
)
from ddplog.comet.starting import (
    ExperimentConfig,
    end,
    error_mode,
    flush,
    get_running_experiment,
    init_onprem,
    login,
    start,
)
from ddplog.comet.untaken import stand_in
from ddplog.errors import UsageError

__version__ = "3.58.8"
"""Of comet_ml, whose interface this is: other packages look whether it is new enough."""

BaseExperiment = ExperimentBase = CometExperiment
get_global_experiment = get_running_experiment
init = login

API = stand_in("API")
APIExperiment = stand_in("APIExperiment")
Artifact = stand_in("Artifact")
Box = stand_in("Box")
ConfusionMatrix = stand_in("ConfusionMatrix")
Embedding = stand_in("Embedding")
Histogram = stand_in("Histogram")
Layer = stand_in("Layer")
LoggedArtifact = stand_in("LoggedArtifact")
Model = stand_in("Model")
Polygon = stand_in("Polygon")
UploadCallback = stand_in("UploadCallback")
get_comet_api_client = stand_in("CometApiClient")
get_s3_uploader = stand_in("UploadCallback")


class Optimizer:
    """Comet's Optimizer, which cannot be here: its server chooses the parameters to train with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Comet's
        raise UsageError(
            "comet_ml.Optimizer asks Comet's server which parameters to train with; ddplog has none to ask"
        )


__all__ = [
    "API",
    "APIExperiment",
    "Artifact",
    "Box",
    "CometExperiment",
    "ConfusionMatrix",
    "Embedding",
    "ExistingExperiment",
    "ExistingOfflineExperiment",
    "Experiment",
    "ExperimentBase",
    "ExperimentConfig",
    "Histogram",
    "Layer",
    "Model",
    "OfflineExperiment",
    "Optimizer",
    "Polygon",
    "UploadCallback",
    "end",
    "error_mode",
    "flush",
    "get_api_key",
    "get_comet_api_client",
    "get_config",
    "get_experiment_key",
    "get_global_experiment",
    "get_running_experiment",
    "get_s3_uploader",
    "init",
    "init_onprem",
    "login",
    "start",
]
