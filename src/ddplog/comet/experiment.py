"""Owns Comet's experiment as a run of ddplog: what ddplog can hold is logged through the run, from every rank.

| Comet | ddplog |
|---|---|
| log_metric(s) | log(): the ranks' values of one name and step become one point |
| no step given | the last one given, as in Comet; before any, how often this rank logged the name |
| epoch | a metric `epoch`, logged when it changes |
| train(), validate(), test() | the name's prefix: `train_loss` |
| log_parameter(s) | log_params(); nested names joined by `|` as in Comet |
| log_other(s), set_name | a parameter `other/NAME`; add_tag(s): `tag/NAME` |
| a parameter that this rank changes | the first value stays, later ones are texts of that name |
| log_text, log_html, log_system_info | log_text() |
| send_notification | alert() |
| end() | finish(), of a run that this experiment has started |

Everything else is in `untaken`. Nothing here may raise into the training loop, and nothing may hold on to a graph or
wait for a device.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ddplog.comet import config, untaken
from ddplog.comet import current as current_experiment
from ddplog.worker import current
from ddplog.worker.absent import NullRun
from ddplog.worker.joining import is_open, join
from ddplog.worker.scalars import as_int, flatten

if TYPE_CHECKING:
    from ddplog.worker.run import Run

_DELIMITERS: Final = ("_", ":", "-", "+", ".", "/", "|")
_MAX_DEPTH: Final = 10
_SWITCHES: Final = (
    *("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging"),
    *("log_env_details", "log_git_metadata", "log_git_patch", "disabled"),
)


class CometExperiment:
    """What Comet's experiments have in common. Every method may be called on any rank, at any time."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("project_name", "workspace", *_SWITCHES)
    """The constructor's parameters in Comet's order. Any others are by name; those that mean nothing here are ignored."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        given = {**dict(zip(self.POSITIONAL, args, strict=False)), **settings}
        config.hide_from_now_on(given.get("api_key"))
        self.disabled = bool(given.get("disabled")) or config.is_set("comet.auto_log.disable")
        self.project_name: str | None = given.get("project_name") or config.get_setting("comet.project_name")
        self.workspace: str | None = given.get("workspace") or config.get_setting("comet.workspace")
        self.name: str | None = given.get("name")
        self.ended = False
        self.context: str | None = None
        self.curr_step: int | None = None
        self.curr_epoch: Any = None
        self.metrics: dict[str, Any] = {}
        self.params: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.tags: set[str] = set()
        self._held: dict[str, Any] = {}
        if current_experiment.experiment is not None:
            current_experiment.experiment.end()
        self._owns_run = current.run is None or not is_open(current.run)
        self.run: Run = NullRun() if self.disabled else join(config.make_settings(given))
        self.id = config.find_key(given) or config.key_of_run(self.run.run_id)
        self.add_tags(given.get("tags") or [])
        current_experiment.experiment = self

    # -- what it is

    @property
    def alive(self) -> bool:
        """Whether it logs."""
        return not self.disabled and not self.ended

    @property
    def url(self) -> str | None:
        """The run's folder; None if there is none."""
        return Path(self.run.dir).as_uri() if self.run.dir else None

    def get_key(self) -> str:
        """Return the experiment's key; another rank may pass it to ExistingExperiment."""
        return self.id

    def get_name(self) -> str | None:
        """Return the name, if one was given."""
        return self.name

    def get_metric(self, name: str) -> Any:
        """Return the value logged last by this rank; KeyError if there is none."""
        return _plain(self.metrics[str(name)])

    def get_parameter(self, name: str) -> Any:
        """Return a parameter logged by this rank; KeyError if there is none."""
        full_name = self._fullname(str(name))
        return self.params[full_name if full_name in self.params else str(name)]

    def get_other(self, name: str) -> Any:
        """Return what log_other() was given last; KeyError if nothing."""
        return self.others[str(name)]

    def get_tags(self) -> list[str]:
        """Return this rank's tags."""
        return list(self.tags)

    # -- numbers

    def log_metric(
        self, name: Any, value: Any, step: int | None = None, epoch: int | None = None, include_context: bool = True
    ) -> None:
        """Log one number."""
        self.log_metrics({str(name): value}, None, step, epoch, include_context)

    def log_metrics(
        self,
        dic: Mapping[str, Any],
        prefix: str | None = None,
        step: int | None = None,
        epoch: int | None = None,
        include_context: bool = True,
    ) -> None:
        """Log numbers; nested names are joined by "/", and a prefix by "_"."""
        self._advance(step, epoch)
        if not isinstance(dic, Mapping):
            self.run.skip("log_metrics()", f"takes a dict of names to numbers, not {type(dic).__name__}")
            return
        start = f"{prefix}_" if prefix is not None else ""
        values = {start + key: _single(value) for key, value, _ in flatten({str(k): v for k, v in dic.items()})}
        self.run.log({self._fullname(key, include_context): value for key, value in values.items()}, self.curr_step)
        self.metrics.update((key, _detached(value)) for key, value in values.items())

    def set_step(self, step: int | None) -> None:
        """Set the step of what follows and gives none."""
        if step is not None:
            self._advance(step, None)
            if self.curr_step is not None:
                self.run.set_step(self.curr_step)

    def set_epoch(self, epoch: int | None) -> None:
        """Set the epoch."""
        self._advance(None, epoch)

    def log_current_epoch(self, value: int) -> None:
        """Set the epoch."""
        self._advance(None, value)

    def log_epoch_end(self, epoch_cnt: int, step: int | None = None) -> None:
        """Set the epoch, and the step if given."""
        self._advance(step, epoch_cnt)

    def _advance(self, step: Any, epoch: Any) -> None:
        if step is not None:
            number = as_int(step)
            if number is None:
                self.run.skip("step", f"step={_words(step)} must be a whole number: the step before it is taken")
            else:
                self.curr_step = number
        if epoch is not None:
            epoch = _plain(epoch)
            if not isinstance(epoch, (int, float)):
                self.run.skip("epoch", f"epoch={_words(epoch)} must be a number: the epoch before it is taken")
            elif epoch != self.curr_epoch:
                self.curr_epoch = epoch
                self.run.log({"epoch": epoch}, self.curr_step)

    def _fullname(self, name: str, include_context: bool = True) -> str:
        return f"{self.context}_{name}" if self.context is not None and include_context else name

    @contextmanager
    def context_manager(self, context: str) -> Iterator[CometExperiment]:
        """Prefix the names of what is logged inside."""
        before, self.context = self.context, context
        try:
            yield self
        finally:
            self.context = before

    def train(self) -> Any:
        """Prefix what is logged inside with `train_`."""
        return self.context_manager("train")

    def validate(self) -> Any:
        """Prefix what is logged inside with `validate_`."""
        return self.context_manager("validate")

    def test(self) -> Any:
        """Prefix what is logged inside with `test_`."""
        return self.context_manager("test")

    # -- parameters and words

    def log_parameter(self, name: Any, value: Any, step: int | None = None) -> None:
        """Log one hyperparameter."""
        self._advance(step, None)
        self._log_parameters({str(name): value})

    def log_parameters(
        self,
        parameters: Any,
        prefix: str | None = None,
        step: int | None = None,
        nested_support: bool = True,
    ) -> None:
        """Log hyperparameters: a dict, or an object such as argparse's with one in each attribute."""
        self._advance(step, None)
        found = parameters if isinstance(parameters, Mapping) else _attributes(parameters)
        start = "" if prefix is None else prefix if str(prefix).endswith(_DELIMITERS) else f"{prefix}_"
        pairs = _joined(found) if nested_support else ((str(name), value) for name, value in found.items())
        self._log_parameters({f"{start}{name}": value for name, value in pairs})

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        named = {self._fullname(name): value for name, value in parameters.items()}
        self.params.update(named)
        self._hold(named)

    def log_other(self, key: Any, value: Any) -> None:
        """Log a fact about the run."""
        self.log_others({key: value})

    def log_others(self, dictionary: Mapping[Any, Any]) -> None:
        """Log facts about the run."""
        if not isinstance(dictionary, Mapping):
            self.run.skip("log_others()", f"takes a dict, not {type(dictionary).__name__}")
            return
        self.others.update((str(key), value) for key, value in dictionary.items())
        self._hold({f"other/{key}": value for key, value in dictionary.items()})

    def log_dependency(self, name: Any, version: Any) -> None:
        """Log a package's version."""
        self._hold({f"dependency/{name}": version})

    def log_dataset_info(self, name: str | None = None, version: str | None = None, path: str | None = None) -> None:
        """Log what the data is."""
        words = "-".join(str(word) for word in (name, version) if word is not None)
        info = ", ".join(word for word in (words, "" if path is None else str(path)) if word)
        if info:
            self.log_other("dataset_info", info)

    def log_dataset_hash(self, data: Any) -> None:
        """Log a hash of the data, as Comet makes it: of how it prints."""
        digest = hashlib.md5(_words(data).encode(), usedforsecurity=False).hexdigest()
        self._log_parameters({"dataset_hash": digest[:12]})

    def add_tag(self, tag: str) -> bool:
        """Add a tag."""
        return self.add_tags([tag])

    def add_tags(self, tags: Sequence[str]) -> bool:
        """Add tags.

        Returns:
            Whether they are words.
        """
        if not isinstance(tags, (list, tuple, set)) or not all(isinstance(tag, str) and tag for tag in tags):
            self.run.skip("add_tags()", f"tags must be words, not {_words(tags)}")
            return False
        self.tags.update(tags)
        self._hold({f"tag/{tag}": True for tag in tags})
        return True

    def set_name(self, name: str) -> None:
        """Name the experiment; the run's own display name is that of its start."""
        self.name = name
        self.log_other("Name", name)

    def log_system_info(self, key: Any, value: Any) -> None:
        """Log a fact about this rank's machine."""
        self._text(f"system/{key}", value)

    def log_text(
        self, text: str, step: int | None = None, metadata: Mapping[str, Any] | None = None
    ) -> dict[str, str] | None:
        """Log a piece of text."""
        if metadata:
            self.run.skip("log_text(metadata=)", "only the text is kept")
        self._text("text", text, step)
        return {"web": "", "api": "", "assetId": ""}

    def log_html(self, html: str, clear: bool = False) -> None:  # noqa: ARG002 - every piece is kept
        """Log HTML as a piece of text."""
        self._text("html", html)

    def log_html_url(self, url: str, text: str | None = None, label: str | None = None) -> None:
        """Log an address as a piece of text."""
        self._text("html", " ".join(str(word) for word in (label, text, url) if word is not None))

    def send_notification(
        self, title: str, status: str | None = None, additional_data: Mapping[str, Any] | None = None
    ) -> None:
        """Put an event on the run."""
        words = [_words(status)] if status is not None else []
        if isinstance(additional_data, Mapping):
            words += [f"{key}={_words(value)}" for key, value in additional_data.items()]
        self.run.alert(_words(title), ", ".join(words), "info")

    def _text(self, key: str, text: Any, step: int | None = None) -> None:
        self.run.log_text(config.hide(key), _words(text), self.curr_step if step is None else step)

    def _hold(self, values: Mapping[str, Any]) -> None:
        """Log parameters; a run has one value of each, so what this rank changes becomes a text beside the first."""
        new = {}
        for name, value in values.items():
            plain = _plain(value)
            held = plain if isinstance(plain, (bool, int, float, type(None))) else _words(plain)
            if name not in self._held:
                new[config.hide(name)] = held
            elif self._held[name] != held:
                self._text(name, held)
            self._held[name] = held
        if new:
            self.run.log_params(new)

    # -- the end

    def flush(self, timeout: int | None = None) -> bool:  # noqa: ARG002 - it takes one fdatasync
        """Make what was logged durable on this node."""
        self.run.flush()
        return True

    def end(self) -> None:
        """End the experiment, and its run unless ddplog.init() has started that."""
        if self.alive and self._owns_run:
            self.run.finish()
        self.ended = True

    def clean(self) -> bool:
        """End the experiment."""
        self.end()
        return True

    def stop_early(self, epoch: int) -> bool:  # noqa: ARG002 - Comet's optimizer decides that, which is not here
        """Return False: go on."""
        return False

    def disable_mp(self) -> None:
        """Do nothing: nothing is patched."""

    def __repr__(self) -> str:
        return f"<ddplog.comet.{type(self).__name__} {self.id} step={self.curr_step} {self.run!r}>"

    # -- what other packages call (Lightning, transformers): the same, with the framework's name

    def __internal_api__log_metric__(
        self,
        name: Any,
        value: Any,
        step: int | None = None,
        epoch: int | None = None,
        include_context: bool = True,
        framework: str | None = None,
    ) -> None:
        self.log_metric(name, value, step, epoch, include_context)

    def __internal_api__log_metrics__(
        self,
        dic: Mapping[str, Any],
        prefix: str | None = None,
        step: int | None = None,
        epoch: int | None = None,
        framework: str | None = None,
        include_context: bool = True,
    ) -> None:
        self.log_metrics(dic, prefix, step, epoch, include_context)

    def __internal_api__log_parameters__(
        self,
        parameters: Any,
        prefix: str | None = None,
        step: int | None = None,
        framework: str | None = None,
        source: str | None = None,
        flatten_nested: bool = False,
    ) -> None:
        self.log_parameters(parameters, prefix, step, flatten_nested)

    def __internal_api__set_model_graph__(
        self, graph: Any, overwrite: bool = False, framework: str | None = None
    ) -> None:
        untaken.method("set_model_graph")(self, graph, overwrite, framework)


for _name in untaken.METHODS:
    setattr(CometExperiment, _name, untaken.method(_name))


class Experiment(CometExperiment):
    """Comet's Experiment: a new one, which under a launcher is the job's run on every rank."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("api_key", "project_name", "workspace", *_SWITCHES)


class ExistingExperiment(Experiment):
    """Comet's ExistingExperiment: the job's run, or that of the key it is given."""

    POSITIONAL = ("api_key", "previous_experiment")


class OfflineExperiment(CometExperiment):
    """Comet's OfflineExperiment; every run of ddplog can do without a network."""


class ExistingOfflineExperiment(OfflineExperiment):
    """Comet's ExistingOfflineExperiment: as ExistingExperiment."""


def _single(value: Any) -> Any:
    """Return the only item of a list as Comet does, and anything else as it is."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _detached(value: Any) -> Any:
    """Return a tensor without its graph, which would otherwise live until the name is logged again."""
    torch = sys.modules.get("torch")
    return value.detach() if torch is not None and isinstance(value, torch.Tensor) else value


def _words(value: Any) -> str:
    """Return how a value prints, without any API key."""
    try:
        return config.hide(str(value))
    except Exception:  # noqa: BLE001 - the value is the user's
        return f"<{type(value).__name__} that cannot be printed>"


def _plain(value: Any) -> Any:
    """Return a number of any library as Python's."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    try:
        return value.item()
    except Exception:  # noqa: BLE001 - the value is the user's: it is shown as it prints
        return value


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object has that is no method, as Comet does for parameters that are no dict."""
    found = {}
    for name in dir(value):
        if name.startswith(("__", "to_")):
            continue
        try:
            attribute = getattr(value, name)
        except Exception:  # noqa: BLE001, S112 - a user's property may raise anything
            continue
        if not callable(attribute):
            found[name] = attribute
    return found


def _joined(values: Mapping[Any, Any], start: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts, their names joined by "|"."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and depth < _MAX_DEPTH:
            yield from _joined(value, f"{start}{name}|", depth + 1)
        else:
            yield f"{start}{name}", value
