"""Resolves settings: argument > `DDPLOG_*` > `ddplog.toml` or `[tool.ddplog]` in pyproject.toml > default.

Reads the environment and the files when asked to, never on import. Every resolved field remembers where it
came from, which `ddplog doctor` prints.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from ddplog.errors import ConfigError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, resolved and checked. Field order is the order in which doctor prints them."""

    project: str = "default"
    """The tracker's project."""

    name: str | None = None
    """The run's display name; the run_id if not given."""

    run_id: str | None = None
    """The run's folder name under `dir`; made up from the time if not given."""

    dir: str = "runs"
    """Folder of runs. Relative to the working directory of the process that calls init()."""

    sinks: tuple[str, ...] = ()
    """Trackers to forward to, as `name` or `name://target`. None by default: the store and `ddplog report`
    need no tracker."""

    tags: tuple[str, ...] = ()
    """Free words shown by the trackers."""

    resume: str = "auto"
    """What to do when run_id exists: `auto` continues it as a new attempt, `never` refuses, `must` requires it."""

    spool: str | None = None
    """Node-local folder for journals; made 0700. Default /var/tmp/ddplog-<uid>, else /tmp/ddplog-<uid>: a disk
    that survives a reboot, and never a network filesystem."""

    mode: str = "on"
    """`on`, or `off`: every call returns at once and nothing is written."""

    strict: bool = False
    """Raise UsageError for a value that cannot be logged. Off: it is counted and warned about once."""

    exit_wait_s: float = 5.0
    """How long a normal exit waits until the store holds the last record, seconds. The record is in the
    journal in any case; the wait covers cgroups that kill the helpers with the job. Before it, as long at most (and 1 s
    at least), values on their way from a GPU are waited for."""

    segment_bytes: int = 4 * 1024 * 1024
    """Size of one journal segment. 4 MiB: 20 s of 100 metrics at 200 steps/s, and 32 MiB for 8 ranks."""

    spool_bytes: int = 1024 * 1024 * 1024
    """Journal bytes kept per rank beyond which new records are dropped (counted) when nothing is acknowledged,
    half of it is kept beyond the acknowledgement, so that a lost store can be refilled."""

    max_keys: int = 10_000
    """Distinct metric names one rank may log; more are dropped with a count (a name with a loop index or an
    id in it would otherwise fill every tracker)."""

    grace_s: float = 10.0
    """A rank that has shown no step for this long is not waited for."""

    hang_s: float = 300.0
    """An attempt whose ranks, or some of them, have not moved for this long, seconds, is taken for hung: an event names
    those behind, and their Python stacks are collected. 0: never. A pause that a rank has come back from counts twice, so
    that a job with long validations is not taken for hung again. 5 minutes: shorter than NCCL's time-out of 10."""

    stack_signal: int = 50
    """Number of the signal that makes a rank write its Python stacks; 0: none. 50 is SIGRTMIN + 16, which nothing we
    know of uses; where a process uses it after all, it is left alone."""

    sample_s: float = 5.0
    """Seconds between two samples of the GPUs, the host and the ranks' processes, at least 1; 0: none."""

    late_s: float = 5.0
    """How long a value below the watermark waits for the other ranks' before its point is emitted."""

    settle_s: float = 0.1
    """How long a complete point waits for a repeated value of the same step."""

    rank_log_bytes: int = 20 * 1024**3
    """Size of the rank log, from which any reduction can be derived again; oldest segments go first."""

    drain_wait_s: float = 60.0
    """How long `ddplog run` waits at the end for the sinks, seconds; `ddplog sync` delivers the rest."""

    host: str = "127.0.0.1"
    """Address the aggregator listens on (CURVE always)."""

    port: int = 0
    """Port the aggregator listens on; 0: any free one."""

    origins: Mapping[str, str] = field(default_factory=dict)
    """Setting name -> `argument`, `DDPLOG_X`, the file's path, or `default`."""

    def __post_init__(self) -> None:
        _check_name("project", self.project)
        if self.run_id is not None:
            _check_name("run_id", self.run_id)
        _check_choice("resume", self.resume, ("auto", "never", "must"))
        _check_choice("mode", self.mode, ("on", "off"))
        for name in ("exit_wait_s", "grace_s", "hang_s", "late_s", "settle_s", "drain_wait_s"):
            _check_range(name, getattr(self, name), 0, 86400)
        _check_range("segment_bytes", self.segment_bytes, 64 * 1024, 1024**3)
        _check_range("spool_bytes", self.spool_bytes, 1024 * 1024, 1024**4)
        _check_range("max_keys", self.max_keys, 1, 1_000_000)
        _check_range("rank_log_bytes", self.rank_log_bytes, 1024 * 1024, 1024**5)
        _check_range("port", self.port, 0, 65535)
        if self.sample_s and not 1 <= self.sample_s <= 3600:
            raise ConfigError("sample_s", self.sample_s, "must be 0 (none), or between 1 and 3600")
        if self.stack_signal and not 34 <= self.stack_signal <= 64:
            raise ConfigError("stack_signal", self.stack_signal, "0 (none), or a real-time signal: 34 to 64")
        for sink in self.sinks:
            if not isinstance(sink, str) or not sink:
                raise ConfigError("sinks", self.sinks, "each sink is a name or name://target")


def resolve(
    arguments: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    start: Path | None = None,
) -> Settings:
    """Resolve the settings.

    Args:
        arguments: Given by the caller; None values count as not given.
        environ: The environment; `os.environ` if None.
        start: Folder in which, and above which, `ddplog.toml` and `pyproject.toml` are looked for; the working
            directory if None.

    Raises:
        ConfigError: If a setting is unknown, cannot be parsed, or is out of range.
    """
    environ = os.environ if environ is None else environ
    known = {f.name for f in fields(Settings) if f.name != "origins"}
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(known, "default")
    path, table = _read_file(start or Path.cwd())
    for name, value in table.items():
        if name not in known:
            raise ConfigError(f"{path}: {name}", value, f"no such setting; there are {', '.join(sorted(known))}")
        values[name], origins[name] = _coerce(name, value, f"{path}: {name}"), str(path)
    for name in known:
        variable = f"DDPLOG_{name.upper()}"
        if variable in environ:
            values[name], origins[name] = _parse(variable, name, environ[variable]), variable
    for name, value in (arguments or {}).items():
        if name not in known:
            raise ConfigError(name, value, f"no such setting; there are {', '.join(sorted(known))}")
        if value is not None:
            values[name], origins[name] = _coerce(name, value, name), "argument"
    return Settings(**values, origins=origins)


def _read_file(start: Path) -> tuple[Path | None, Mapping[str, Any]]:
    for folder in (start, *start.parents):
        candidate = folder / "ddplog.toml"
        if candidate.is_file():
            return candidate, _load_toml(candidate)
        candidate = folder / "pyproject.toml"
        if candidate.is_file():
            tool = _load_toml(candidate).get("tool")
            if isinstance(tool, Mapping) and "ddplog" in tool:
                if not isinstance(tool["ddplog"], Mapping):
                    raise ConfigError(f"{candidate}: tool.ddplog", tool["ddplog"], "must be a table of settings")
                return candidate, tool["ddplog"]
    return None, {}


def _load_toml(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return table
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ConfigError(str(path), "unreadable", f"must be TOML: {exc}") from exc


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_PARSERS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = {
    "bool": (_flag, "one of 1, 0, true, false, yes, no, on, off"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "tuple[str, ...]": (_words, "words with commas between them"),
}


def _type_name(name: str) -> str:
    return str(next(f.type for f in fields(Settings) if f.name == name))


def _parse(shown: str, name: str, text: str) -> Any:
    parser, allowed = _PARSERS.get(_type_name(name), (str, "text"))
    try:
        return parser(text)
    except ValueError as exc:
        raise ConfigError(shown, text, f"must be {allowed}") from exc


def _coerce(name: str, value: Any, shown: str) -> Any:
    wanted = _type_name(name)
    if wanted == "tuple[str, ...]":
        if isinstance(value, str):
            return _words(value)
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(shown, value, "a list of strings")
    if wanted == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if wanted == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted == "bool" and isinstance(value, bool):
        return value
    if wanted.startswith("str") and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise ConfigError(shown, value, f"must be of type {wanted}, not {type(value).__name__}")


def _check_name(setting: str, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise ConfigError(setting, value, "1 to 100 letters, digits, '.', '_' and '-', the first a letter or digit")


def _check_choice(setting: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(setting, value, f"must be one of {', '.join(allowed)}")


def _check_range(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(setting, value, f"must be between {low:g} and {high:g}")
