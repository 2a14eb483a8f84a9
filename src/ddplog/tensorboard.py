"""A SummaryWriter in the shape of torch's, that logs to the run: one import changed, and every rank may write.

    from ddplog.tensorboard import SummaryWriter     # was: from torch.utils.tensorboard import SummaryWriter

Scalars, text and hyperparameters are logged. What a run cannot hold (images, histograms, ...) is counted as unsupported
and warned about once per method; nothing raises. No event file is written here: that is the sink tensorboard's part.

Owns the translation of SummaryWriter's calls, and nothing else; needs neither torch nor tensorboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ddplog.worker.joining import join
from ddplog.worker.scalars import MAX_KEY_BYTES

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from ddplog.worker.run import Run

_prefixes: dict[str, dict[str, str]] = {}
"""Run id -> folder -> what the tags of its writers begin with."""


class SummaryWriter:
    """Logs what it is given to the current run, or to one that it starts.

    TensorBoard shows each folder as a run, ddplog has one for the job. So the tags of the first folder of a process stay
    as they are, and those of any further one begin with the folder's name: loss, and val/loss of SummaryWriter("logs/val").

    Args:
        log_dir: As torch's, made if it is not there, since scripts keep files of their own in it; nothing of ddplog's goes
            there. The run's folder if not given.
        comment: As torch's, without effect; so are purge_step, max_queue, flush_secs and filename_suffix.
        **settings: Those of ddplog.init(), for a run that is started here.
    """

    def __init__(
        self,
        log_dir: Any = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
        **settings: Any,
    ) -> None:
        self._run: Run = join(settings)
        self.log_dir = str(log_dir) if log_dir else self._run.dir
        if log_dir and "://" not in self.log_dir:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        prefixes = _prefixes.setdefault(self._run.run_id, {})
        self._prefix = prefixes.setdefault(self.log_dir, f"{PurePath(self.log_dir).name}/" if prefixes else "")

    def get_logdir(self) -> str:
        """Return the folder."""
        return self.log_dir

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: int | None = None,
        walltime: float | None = None,  # the run has the time of the call
        new_style: bool = False,
        double_precision: bool = False,  # always
    ) -> None:
        """Log a number."""
        self._run.log({self._key(tag): scalar_value}, step=global_step)

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Log several numbers as main_tag/tag."""
        self._run.log(
            {self._key(f"{main_tag}/{tag}"): value for tag, value in tag_scalar_dict.items()}, step=global_step
        )

    def add_text(
        self,
        tag: str,
        text_string: str,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Log text."""
        self._run.log_text(self._key(tag), text_string, global_step)

    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any],
        hparam_domain_discrete: Any = None,
        run_name: str | None = None,
        global_step: int | None = None,
    ) -> None:
        """Log hyperparameters, and the numbers they led to."""
        self._run.log_params(hparam_dict)
        if metric_dict:
            self._run.log({self._key(tag): value for tag, value in metric_dict.items()}, step=global_step)

    def add_tensor(
        self,
        tag: str,
        tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Log a tensor of one element; another is not supported."""
        if tensor.numel() == 1:
            self._run.log({self._key(tag): tensor}, step=global_step)
        else:
            self._skip("add_tensor")

    def flush(self) -> None:
        """Make what was logged durable on this node."""
        self._run.flush()

    def close(self) -> None:
        """Flush. The run stays open, for other writers and for this one: torch's may be used after close(), too."""
        self._run.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _key(self, tag: Any) -> str:
        """Return the tag as a name that a run takes: TensorBoard's own may hold anything."""
        shown = "".join(char if char.isprintable() and char != "\u202e" else "_" for char in f"{self._prefix}{tag}")
        return shown.encode("utf-8", "replace")[:MAX_KEY_BYTES].decode("utf-8", "ignore").strip() or "_"

    def _skip(self, method: str) -> None:
        self._run.skip(f"SummaryWriter.{method}()", "a run cannot hold this yet; it is left out")

    def __getattr__(self, name: str) -> Any:
        """Return what does nothing but count, for add_image() and all the others of torch's that are not above."""
        if name.startswith("add_"):
            return lambda *_args, **_kwargs: self._skip(name)
        raise AttributeError(f"'SummaryWriter' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<ddplog.tensorboard.SummaryWriter {self.log_dir} of {self._run!r}>"
