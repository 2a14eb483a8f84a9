"""What the benchmarks share: the machine they ran on, a folder of their own, tables with the budget beside the figure.

Every figure is a median or a ratio within one run; nothing is asserted. `load` in the JSON says how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

try:
    import ddplog  # noqa: F401 - the one that is installed, else the one beside us
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])

os.environ.setdefault("DDPLOG_SAMPLE_S", "0")  # what a sampler costs has a benchmark of its own

_TICKS = os.sysconf("SC_CLK_TCK")
_PACKAGES = ("numpy", "torch", "pyzmq", "protobuf", "grpcio")


class Row(NamedTuple):
    """One line of a table of results."""

    what: str
    figures: Sequence[str]
    budget: str = ""
    is_met: bool | None = None
    """Whether the figure keeps the budget; None where there is none."""


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = next((line.split(":", 1)[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": cpu.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "python_build": platform.python_build()[1] + " " + platform.python_compiler(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "ddplog": _version("ddplog"),
        "commit": _commit(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _commit() -> str | None:
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def parser(description: str) -> argparse.ArgumentParser:
    """Make the parser every benchmark begins with."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works; the figures mean nothing"
    )
    made.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/<name>.json")
    return made


@contextmanager
def workspace() -> Iterator[Path]:
    """Make a folder on a disk (a tmpfs would make commits free), and remove it in the end."""
    parent = "/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="ddplog-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Row], note: str = "") -> None:
    """Print a table: what, the figures, the budget, and whether it is kept."""
    has_budget = any(row.budget for row in rows)
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    table.add_column("what")
    for column in columns:
        table.add_column(column, justify="right")
    if has_budget:
        table.add_column("budget", justify="right")
        table.add_column("")
    for row in rows:
        mark = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.is_met]
        table.add_row(row.what, *row.figures, *([row.budget, mark] if has_budget else []))
    Console(width=None if sys.stdout.isatty() else 132).print(table)


def write(name: str, out: Path | None, results: dict[str, Any], *, is_quick: bool) -> None:
    """Write the results as JSON, with the machine and the command."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "is_quick": is_quick,
        "machine": machine(),
        "results": results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\n{path}")


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (0 to 1) of the ordered values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1e9) * len(ordered) // 10**9) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p99, p99.9 and the maximum."""
    ordered = sorted(values)
    named = {name: percentile(ordered, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}
    return {**named, "max": ordered[-1], "count": len(ordered)}


def bootstrap(pairs: Sequence[tuple[float, float]], rounds: int = 2000) -> tuple[float, float, float]:
    """Return the ratio of medians, second over first, and its 95 % interval from resampled pairs.

    Args:
        pairs: Measured in turn, so that what disturbs the machine hits both.
        rounds: Resamples; seeded, so that the same data give the same interval.
    """
    rng = random.Random(0)

    def ratio(sample: Sequence[tuple[float, float]]) -> float:
        return statistics.median(b for _, b in sample) / statistics.median(a for a, _ in sample)

    ratios = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(rounds))
    return ratio(pairs), percentile(ratios, 0.025), percentile(ratios, 0.975)


def cpu_s(pid: int) -> float:
    """Return the user and system time of a process with all its threads, seconds; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_mib(pid: int) -> float:
    """Return the largest resident size a process had, MiB; 0 if it is gone."""
    lines = _lines(f"/proc/{pid}/status")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def wait_until(condition: Any, timeout_s: float, what: str) -> Any:
    """Poll until `condition()` is true and return its value.

    Raises:
        TimeoutError: Naming `what`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.002)


def wait_ended(run_dir: Path) -> None:
    """Wait until a run's aggregator has ended: helpers must not outlive the workspace they work in."""
    wait_until(lambda: not (run_dir / "control.json").exists(), 60, "the aggregator's end")


def si(value: float) -> str:
    """Return a count in a form people compare: 5.21 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
