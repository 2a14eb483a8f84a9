"""Stands in for comet_ml.integration.pytorch: a model's files and histograms are accepted, counted and not kept."""

from __future__ import annotations

from typing import Any

from ddplog.comet.untaken import skip
from ddplog.errors import UsageError

__all__ = ["load_model", "log_model", "watch"]


def log_model(
    experiment: Any,
    model: Any,
    model_name: str,
    metadata: dict[str, Any] | None = None,
    pickle_module: Any = None,
    **torch_save_args: Any,
) -> None:
    """Accept a model, which is not kept."""
    experiment.log_model(model_name, model, metadata, pickle_module, torch_save_args)


def watch(model: Any, log_step_interval: int = 1000) -> None:  # noqa: ARG001 - Comet's signature
    """Accept a model, whose weights and gradients are not logged."""
    skip("watch()", "no histograms are kept: `ddplog.attach(model)` logs what can be measured without waiting")


def load_model(model_uri: str, map_location: Any = None, pickle_module: Any = None, **torch_load_args: Any) -> Any:  # noqa: ARG001
    """Refuse: training cannot go on without what it wants to read.

    Raises:
        UsageError: Always.
    """
    raise UsageError(f"load_model({model_uri!r}): ddplog reads nothing from Comet; load the file with torch.load()")
