"""Owns `ddplog doctor`: every setting with its origin, and whether this machine can do what they ask.

Looks only: makes no folder but the spool, opens no connection, imports neither torch nor a tracker.
"""

from __future__ import annotations

import ctypes.util
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.table import Table

from ddplog.config import Settings, resolve
from ddplog.errors import ConfigError
from ddplog.journal.spool import default_spool, open_spool
from ddplog.sinks import check_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "problem"
_STYLES: Final = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}

PACKAGES: Final = {"pyzmq": "25", "grpcio": "1.60", "protobuf": "4.25", "numpy": "1.24", "psutil": "5.9"}
"""Distributions we cannot do without, and their oldest version, as in pyproject.toml."""
OTHER_VARIABLES: Final = frozenset(
    f"DDPLOG_{name}" for name in ("JOB", "SECRET", "KILL_AT", "KILL_LOG", "VENV", "TEST_VENV", "TORCH", "COMPLETE")
)
"""Variables that are read and are no setting."""
"""Sink name -> the module that its extra brings."""
FREE_WARN_BYTES: Final = 2 * 1024**3
"""One rank's journal may grow to 1 GiB while nothing is acknowledged (spool_bytes)."""
FREE_MIN_BYTES: Final = 64 * 1024**2
NOFILE_MIN: Final = 1024
"""Descriptors: one per writer's rank log and journal, a few per forwarder; the usual soft limit."""
LAUNCHER_VARIABLES: Final = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK",
    "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID", "SLURM_PROCID", "KUBERNETES_SERVICE_HOST", "DDPLOG_JOB",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor's finding."""

    name: str
    state: str
    """ok, warning or problem."""
    found: str
    remedy: str = ""


@click.command(help="Check this machine and print every setting with its origin.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def command(is_json: bool) -> None:
    """Print settings and checks; exit status 1 if there is a problem."""
    settings, checks = examine(os.environ)
    if is_json:
        click.echo(json.dumps({"settings": list_settings(settings), "checks": [asdict(check) for check in checks]}))
    else:
        _print(Console(), settings, checks)
    sys.exit(1 if any(check.state == PROBLEM for check in checks) else 0)


def examine(environ: Mapping[str, str]) -> tuple[Settings, list[Check]]:
    """Resolve the settings and do every check."""
    try:
        settings = resolve(environ=environ)
        checks = [Check(name="settings", state=OK, found="all valid")]
    except ConfigError as exc:
        settings = Settings(origins=dict.fromkeys((f.name for f in fields(Settings)), "default"))
        checks = [Check(name="settings", state=PROBLEM, found=str(exc), remedy="correct it; the defaults are shown")]
    steps: tuple[Callable[[], Iterator[Check]], ...] = (
        check_versions,
        check_libzmq,
        lambda: check_spool(settings),
        lambda: check_run_folder(settings),
        lambda: check_sinks(settings),
        lambda: check_variables(environ),
        check_limits,
        check_gpu_library,
        lambda: check_launcher(environ),
        check_clock,
    )
    for step in steps:
        checks += step()
    return settings, checks


def list_settings(settings: Settings) -> list[dict[str, Any]]:
    """Return name, value and origin of every setting, in the order of Settings."""
    return [
        {"name": f.name, "value": getattr(settings, f.name), "origin": settings.origins.get(f.name, "default")}
        for f in fields(Settings)
        if f.name != "origins"
    ]


def check_versions() -> Iterator[Check]:
    """Check Python and the packages; torch is looked up without importing it."""
    yield Check(name="python", state=OK, found=f"{platform.python_version()} ({sys.executable})")
    yield Check(name="ddplog", state=OK, found=_version("ddplog") or "running from a source folder")
    for name, oldest in PACKAGES.items():
        found = _version(name)
        if found is None or parse_version(found) < parse_version(oldest):
            yield Check(
                name=name, state=PROBLEM, found=found or "not installed", remedy=f"pip install '{name}>={oldest}'"
            )
        else:
            yield Check(name=name, state=OK, found=found)
    torch = _version("torch")
    if torch is None:
        yield Check(
            name="torch",
            state=WARNING,
            found="not installed",
            remedy="`ddplog run SCRIPT` needs it; `ddplog run -- COMMAND` does not",
        )
    else:
        yield Check(name="torch", state=OK, found=torch)


def check_libzmq() -> Iterator[Check]:
    """Check the ZeroMQ library, which pyzmq brings along or takes from the system."""
    try:
        from ddplog.wire.sockets import check_library, versions
    except ImportError:
        return  # pyzmq itself is missing: said above.
    found = versions()
    shown = f"{found['libzmq']}, CURVE {found['curve']}"
    try:
        check_library()
    except ConfigError as exc:
        remedy = f"{exc.allowed}: pip install --force-reinstall pyzmq"
        yield Check(name="libzmq", state=PROBLEM, found=shown, remedy=remedy)
    else:
        yield Check(name="libzmq", state=OK, found=shown)


def check_spool(settings: Settings) -> Iterator[Check]:
    """Check that the journals' folder is private, node-local, and has room."""
    try:
        path = open_spool(settings.spool)
    except ConfigError as exc:
        shown = settings.spool or str(default_spool())
        yield Check(
            name="spool", state=PROBLEM, found=f"{shown}: {exc.allowed}", remedy="name another with DDPLOG_SPOOL"
        )
        return
    kind = read_filesystem(path)
    yield Check(name="spool", state=OK, found=f"{path}, private, {kind}")
    if kind in ("tmpfs", "ramfs"):
        yield Check(
            name="spool filesystem",
            state=WARNING,
            found=f"{kind}: journals use memory and do not survive a reboot",
            remedy="name a folder on a local disk with DDPLOG_SPOOL",
        )
    yield _check_free("spool space", path, "DDPLOG_SPOOL")


def check_run_folder(settings: Settings) -> Iterator[Check]:
    """Check that runs can be written, and that the file server's clock is ours."""
    folder = Path(settings.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            skew_s = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as exc:
        yield Check(
            name="run folder",
            state=PROBLEM,
            found=f"{folder}: {existing} cannot be written: {exc.strerror}",
            remedy="name another with --dir or DDPLOG_DIR",
        )
        return
    made = "" if existing == folder else ", made by the first run"
    yield Check(name="run folder", state=OK, found=f"{folder}, {read_filesystem(existing)}{made}")
    yield _check_free("run folder space", existing, "DDPLOG_DIR")
    if abs(skew_s) > 2:
        yield Check(
            name="file server's clock",
            state=WARNING,
            found=f"{skew_s:+.1f} s from this machine's",
            remedy="synchronise both with NTP; charts over time are shifted otherwise",
        )


def check_sinks(settings: Settings) -> Iterator[Check]:
    """Check that each configured sink exists and that what it needs is installed."""
    known = {entry.name for entry in importlib.metadata.entry_points(group="ddplog.sinks")}
    if not settings.sinks:
        yield Check(name="sinks", state=OK, found=f"none configured; there are {', '.join(sorted(known)) or 'none'}")
    for spec in settings.sinks:
        name = spec.partition("://")[0]
        try:
            check_installed(spec)
        except ConfigError as exc:
            yield Check(name=f"sink {name}", state=PROBLEM, found=str(exc), remedy=exc.allowed)
        else:
            yield Check(name=f"sink {name}", state=OK, found=spec)


def check_variables(environ: Mapping[str, str]) -> Iterator[Check]:
    """Name the DDPLOG_ variables that are no setting: a mistyped one does nothing."""
    known = {f"DDPLOG_{f.name.upper()}" for f in fields(Settings)} | OTHER_VARIABLES
    for name in sorted(environ):
        if name.startswith("DDPLOG_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "unset it"
            yield Check(name=name, state=WARNING, found="no such setting", remedy=remedy)


def check_limits() -> Iterator[Check]:
    """Check the limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} (hard limit {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < NOFILE_MIN:
        yield Check(name="open files", state=WARNING, found=found, remedy=f"ulimit -n {NOFILE_MIN} or more")
    else:
        yield Check(name="open files", state=OK, found=found)


def check_gpu_library() -> Iterator[Check]:
    """Say whether GPUs can be sampled; their absence is no fault."""
    library = ctypes.util.find_library("nvidia-ml")
    yield Check(name="NVML", state=OK, found=library or "not found: no GPU metrics")


def check_launcher(environ: Mapping[str, str]) -> Iterator[Check]:
    """Say what started us, and check that a rank's variables are complete."""
    found = {name: environ[name] for name in LAUNCHER_VARIABLES if name in environ}
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in found]
    if len(missing) in (1, 2):
        yield Check(
            name="launcher",
            state=WARNING,
            found=f"{shown}; without {' and '.join(missing)}",
            remedy="set all three of RANK, WORLD_SIZE and LOCAL_RANK, or none",
        )
    else:
        yield Check(name="launcher", state=OK, found=shown or "none: a single process")


def check_clock() -> Iterator[Check]:
    """Check that the wall clock is not absurd, which times in the trackers would be, too."""
    year = time.gmtime().tm_year
    state, remedy = (OK, "") if 2024 <= year <= 2100 else (PROBLEM, "set the clock; trackers refuse such times")
    yield Check(name="clock", state=state, found=time.strftime("%Y-%m-%d %H:%M:%S %Z"), remedy=remedy)


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `27.1.0rc1` is (27, 1, 0)."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def read_filesystem(path: Path) -> str:
    """Return the name of the filesystem that a path is on, from /proc/self/mountinfo."""
    resolved = str(path.resolve())
    best, kind = "", "unknown filesystem"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


def _check_free(name: str, path: Path, variable: str) -> Check:
    free = shutil.disk_usage(path).free
    found = f"{free / 1024**3:,.1f} GiB free"
    state = PROBLEM if free < FREE_MIN_BYTES else WARNING if free < FREE_WARN_BYTES else OK
    remedy = f"free some, or name another folder with {variable}" if state != OK else ""
    return Check(name=name, state=state, found=found, remedy=remedy)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _print(console: Console, settings: Settings, checks: list[Check]) -> None:
    table = Table("setting", "value", "origin", box=None, pad_edge=False, title="Settings", title_justify="left")
    for row in list_settings(settings):
        table.add_row(row["name"], _shown(row["value"]), row["origin"])
    console.print(table)
    console.print()
    table = Table("check", "", "found", box=None, pad_edge=False, title="Checks", title_justify="left")
    for check in checks:
        table.add_row(check.name, f"[{_STYLES[check.state]}]{check.state}[/]", check.found)
        if check.remedy:
            table.add_row("", "", f"-> {check.remedy}")
    console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(value) or "-" if isinstance(value, tuple) else str(value)
