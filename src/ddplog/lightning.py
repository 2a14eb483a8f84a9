"""Lightning's logger: every rank's values, not those of rank 0 only.

    trainer = Trainer(logger=DdplogLogger(project="digits"), ...)

Lightning calls its loggers on every rank; it is the other loggers that drop what is not from rank 0. So nothing here is
`rank_zero_only`, and `self.log("loss", loss)` needs no `sync_dist=True`: ddplog reduces, without a collective.

Owns the translation of Lightning's calls, and nothing else. Works with `lightning` and with `pytorch_lightning`:
whichever the script has imported, else whichever is installed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ddplog.worker.joining import join
from ddplog.worker.run import describe

if TYPE_CHECKING:
    from ddplog.worker.run import Run

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _package() -> str:
    imported = [name for name in _NAMES if name in sys.modules]
    installed = imported or [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
    if not installed:
        raise ImportError("ddplog.lightning needs Lightning: pip install lightning (or pytorch-lightning)")
    return installed[0]


_Logger: Any = import_module(f"{_package()}.loggers").Logger


class DdplogLogger(_Logger):  # type: ignore[misc]
    """Hands what Lightning logs on each rank to the run.

    The run is the current one, or is started on each rank when the trainer has set its processes up. It stays open
    after fit(), for a test() that follows, until the process ends; a fit() that fails ends it as failed or killed.

    Args:
        **settings: Those of ddplog.init(), for a run that is started here.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = settings
        self._run: Run | None = None

    @property
    def experiment(self) -> Run:
        """The run, on every rank; started at the first use, which is Lightning's own when it has launched its ranks."""
        if self._run is None:
            self._run = join(self._settings)
        return self._run

    @property
    def name(self) -> str:
        """Empty, as is version: Lightning keeps checkpoints in save_dir/name/version, and save_dir is the run's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty; the run's id is `experiment.run_id`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder: what trainer.log_dir is, and where checkpoints go if nothing else is said."""
        return self.experiment.dir

    @property
    def root_dir(self) -> str:
        """The run's folder."""
        return self.save_dir

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return self.save_dir

    @property
    def group_separator(self) -> str:
        return "/"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log this rank's values."""
        self.experiment.log(metrics, step=step)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_args: Any, **_kwargs: Any) -> None:
        """Log hyperparameters; ranks that disagree are named in an event."""
        self.experiment.log_params(vars(params) if isinstance(params, Namespace) else params)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Do nothing: a run holds no graphs, and Lightning calls this on its own account."""

    def save(self) -> None:
        """Do nothing: what was logged is safe from the process's death already, and Lightning calls this every step."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Log where the checkpoint is. Called on rank 0."""
        path = checkpoint_callback.last_model_path or checkpoint_callback.best_model_path
        if path:
            self.experiment.log_text("checkpoint", path)

    def finalize(self, status: str) -> None:
        """Take over how a trainer function ended.

        Args:
            status: success and finished (SLURM is about to requeue the job) leave the run open: more may follow. Any
                other ends it: as killed by Ctrl-C or SIGTERM (which Lightning turns into an exception), else as failed.
        """
        if self._run is None:
            return
        if status in ("success", "finished"):
            self._run.flush()
            return
        kind, error, _ = sys.exc_info()
        if kind is None:
            self._run.finish("failed", status)
        elif issubclass(kind, KeyboardInterrupt):
            self._run.finish("killed", "KeyboardInterrupt")
        elif kind.__name__ == "SIGTERMException":
            self._run.finish("killed", "SIGTERM")
        else:
            self._run.finish("failed", describe(kind, error))
