"""The callback for transformers' Trainer: every rank's values, under the names that Trainer's other callbacks give.

    trainer = Trainer(..., callbacks=[DdplogCallback(project="digits")])

Trainer calls its callbacks on every rank; the others drop what is not from the first. What Trainer logs itself is the
same on all of them, for it has gathered it before (loss by a plain mean over ranks); a rank's own values are logged with
ddplog.log(), which then takes the step that Trainer is at.

Owns the translation of Trainer's events, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ddplog.worker.joining import join

if TYPE_CHECKING:
    from ddplog.worker.run import Run

if find_spec("transformers") is None:
    raise ImportError("ddplog.huggingface needs transformers: pip install transformers")

from transformers import TrainerCallback


class DdplogCallback(TrainerCallback):  # type: ignore[misc]
    """Hands what Trainer logs on each rank to the run.

    The run is the current one, or is started on each rank when training or an evaluation begins. It stays open after
    train(), for an evaluate() that follows, until the process ends. A trial of a hyperparameter search is a run of its
    own.

    Args:
        **settings: Those of ddplog.init(), for a run that is started here; `name` is Trainer's `run_name` if not given.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._run: Run | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the run."""
        if state.is_hyper_param_search and self._run is not None:
            self._run.finish()
            self._run = None
        self._joined(args, state, kwargs.get("model"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step of ddplog.log() to the one that Trainer will log this step's loss at."""
        self._joined(args, state, kwargs.get("model")).set_step(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Log what Trainer.log() was given: train/loss, eval/loss, and at the end train/train_runtime and its like."""
        self._joined(args, state, kwargs.get("model")).log(dict(_renamed(logs or {})), step=state.global_step)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        """Log a prediction's metrics, which Trainer does not log itself."""
        self._joined(args, state, kwargs.get("model")).log(dict(_renamed(metrics)), step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make what was logged durable on this node."""
        self._joined(args, state, kwargs.get("model")).flush()

    def _joined(self, args: Any, state: Any, model: Any) -> Run:
        if self._run is None:
            name = state.trial_name or args.run_name
            self._run = join({"name": name, **self._settings})
            self._run.log_params(_params(args, model))
        return self._run


def _params(args: Any, model: Any) -> dict[str, Any]:
    """Return Trainer's arguments and the model's configuration, less what says which rank this is."""
    params = {key: value for key, value in args.to_dict().items() if key not in ("local_rank", "deepspeed")}
    config = getattr(model, "config", None)
    if config is not None:
        params["model"] = config if isinstance(config, dict) else config.to_dict()
    return _with_names(params)


def _with_names(params: Mapping[Any, Any]) -> dict[str, Any]:
    """Return params with every name a string: id2label has numbers."""
    return {str(key): _with_names(value) if isinstance(value, dict) else value for key, value in params.items()}


def _renamed(logs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in logs.items():
        group = next((group for group in ("eval", "test") if key.startswith(group + "_")), None)
        yield (f"train/{key}", value) if group is None else (f"{group}/{key[len(group) + 1 :]}", value)
