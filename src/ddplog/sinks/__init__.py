"""Owns the interface of a sink and how one is found. Each tracker is one module beside this one, or a plug-in.

A sink is written as `name` or `name://target`: "jsonl", "tensorboard:///shared/logs". The name is looked up among
the entry points of the group `ddplog.sinks`; the built-in ones are found without an install too. The entry point
names a class that is called with `target=` and has the members of `Sink`.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol, cast

from ddplog.core.delivery import Emission, Limits, Position, RunInfo, RunStatus
from ddplog.errors import ConfigError

GROUP: Final = "ddplog.sinks"

_BUILT_IN: Final = {
    "jsonl": "ddplog.sinks.jsonl:JsonlSink",
    "tensorboard": "ddplog.sinks.tensorboard:TensorBoardSink",
}
_EXTRAS: Final = {"tensorboard": "tensorboard"}
"""Sink -> the package it needs, which is also the name of ddplog's extra."""
_SPEC: Final = re.compile(r"([A-Za-z][A-Za-z0-9_\-]{0,49})(?:://(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a sink promises."""

    can_overwrite: bool
    """Whether a later revision of a point replaces the earlier one there; if not, revision 0 is all it gets."""
    promise: str
    """"exactly once", or "at least once" and which part may be doubled after a crash."""
    on_rewind: str = "they are sent again"
    """What becomes of the steps that a restart from a checkpoint repeats; the sink's state tells it with the first one."""


class Sink(Protocol):
    """One tracker. Called by one thread of one process, in the order open, write ..., close.

    Raises, from `open`, `write` and `close` alike: RetryableSinkError if the same call may work later,
    PermanentSinkError if it never will. A sink never sleeps and never retries; its forwarder does.
    """

    capabilities: Capabilities
    limits: Limits

    @property
    def detail(self) -> str:
        """One line for people on what this sink left out so far; empty if nothing."""
        ...

    def open(self, run: RunInfo, folder: Path, position: Position | None) -> None:
        """Get ready to write what follows `position`.

        Args:
            run: The run.
            folder: This sink's own folder inside the run's, `<run_dir>/sinks/<name>`; it exists.
            position: What the last `write` returned whose cursor was stored; None at the very first.
                What was written beyond it is written again, so a sink that owns its file cuts it back.
        """
        ...

    def write(self, batch: Sequence[Emission]) -> Position | None:
        """Write a batch.

        Returns:
            Once the batch is durable: the position to store with the cursor, JSON.
        """
        ...

    def close(self, status: RunStatus) -> None:
        """Let go. Tells the tracker how the run ended if `status.is_ended`; called also when it has not."""
        ...


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """A sink as the user wrote it."""

    name: str
    target: str = ""

    @property
    def folder_name(self) -> str:
        """The name of its folder below `sinks/`: two targets of one sink do not meet."""
        if not self.target:
            return self.name
        return f"{self.name}-{hashlib.sha256(self.target.encode('utf-8', 'replace')).hexdigest()[:8]}"


def parse_spec(text: str) -> SinkSpec:
    """Parse `name` or `name://target`.

    Raises:
        ConfigError: If it is neither.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ConfigError("sinks", text, "each sink is a name or name://target")
    return SinkSpec(match[1], match[2] or "")


def available() -> tuple[str, ...]:
    """Return the names of the sinks that can be found, sorted."""
    return tuple(sorted({*_BUILT_IN, *(found.name for found in entry_points(group=GROUP))}))


def check_installed(spec: SinkSpec | str) -> None:
    """Check, without importing it, that a sink can be found and that the package it needs is there.

    Raises:
        ConfigError: If not, naming what to install.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.name not in available():
        raise ConfigError("sinks", spec.name, f"no such sink is installed; there are {', '.join(available())}")
    package = _EXTRAS.get(spec.name)
    if package is not None and find_spec(package) is None:
        raise ConfigError("sinks", spec.name, f"needs the package {package}: pip install {package}")


def make_sink(spec: SinkSpec | str) -> Sink:
    """Find a sink's class and make one. Opens nothing.

    Raises:
        ConfigError: If there is no such sink, or it needs a package that is not installed.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    try:
        factory = _load(spec.name)
    except ImportError as exc:
        extra = _EXTRAS.get(spec.name)
        remedy = f"pip install 'ddplog[{extra}]'" if extra else "install the package it names"
        raise ConfigError("sinks", spec.name, f"cannot be loaded ({exc}); {remedy}") from exc
    return factory(target=spec.target)


def _load(name: str) -> Callable[..., Sink]:
    for found in entry_points(group=GROUP, name=name):
        return cast("Callable[..., Sink]", found.load())
    if name not in _BUILT_IN:
        there = ", ".join(available())
        remedy = f"install what brings it, for a tracker its extra: pip install 'ddplog[{name}]'"
        raise ConfigError("sinks", name, f"no such sink; there are {there}. If it is not one of these, {remedy}")
    module, _, attribute = _BUILT_IN[name].partition(":")
    return cast("Callable[..., Sink]", getattr(importlib.import_module(module), attribute))
