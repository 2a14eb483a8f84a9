"""What one call of run.log() costs the training thread while something behind it does not work.

    python benchmarks/bench_faults.py

Real runs in one process, each with its agent, aggregator and a forwarder beside it on the same cores; what is measured is
run.log() of 10 floats, each call by itself, `tight` (nothing between two calls) and `paced` (a step each millisecond, asleep
in between, so that caches are cold and other processes have run). The conditions take turns within every round, so that
what disturbs the machine hits all of them; a figure is the median over the rounds, a ratio that of its medians.

    baseline             everything works
    aggregator stopped   SIGSTOP: nothing is acknowledged, the journal grows
    sink stopped         SIGSTOP of its forwarder
    spool full           aggregator stopped and `spool_bytes` reached: every value is dropped, and counted
    disk full            the spool is on a tmpfs without a free byte, likewise; left out where mounting one is not allowed
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from bench_log import make_timer

_P50_US, _P999_US = 5.0, 200.0
"""Source: the reliability plan's side-condition while failing, 4.5."""
_VALUES = {f"metric_{i}": 0.1 * i + 0.05 for i in range(10)}
_SMALL = {"segment_bytes": 64 * 1024, "spool_bytes": 1024 * 1024}
_DISK_MIB = 8
_BASELINE = "baseline"


@dataclass
class Condition:
    """A run, and what is done to it before and after its calls are timed."""

    name: str
    run: Any
    begin: Callable[[], None]
    end: Callable[[], None]
    step: int = 0

    def __post_init__(self) -> None:
        self._timer = make_timer("log(data, step=step)", log=self.run.log, data=dict(_VALUES))
        self._timer(self.take(1000))  # declares the keys, and lets the interpreter specialize

    def take(self, count: int) -> range:
        """Return the next steps."""
        self.step += count
        return range(self.step - count, self.step)

    def tight(self, count: int) -> list[float]:
        """Time calls with nothing between them, microseconds."""
        return self._timer(self.take(count))

    def paced(self, count: int) -> list[float]:
        """Time calls a millisecond apart, microseconds."""
        taken = []
        due = time.perf_counter()
        for step in self.take(count):
            due = max(due + 0.001, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
            taken += self._timer(range(step, step + 1))
        return taken


def helpers(run: Any) -> tuple[int, int]:
    """Return the pids of a run's aggregator and of its forwarder, once both work."""
    import psutil

    run_dir = Path(run.dir)

    def find() -> tuple[int, int] | None:
        try:
            pid = json.loads((run_dir / "control.json").read_text())["pid"]
            (forwarder,) = psutil.Process(pid).children()
        except (OSError, ValueError, KeyError, psutil.Error):
            return None
        return (pid, forwarder.pid) if (run_dir / "sinks" / "jsonl" / "state.json").exists() else None

    found: tuple[int, int] = common.wait_until(find, 60, "the run's helpers")
    return found


def wait_stored(run: Any) -> None:
    """Wait until everything logged is acknowledged: helpers that catch up would be part of the next figure."""
    journal = run._journal  # noqa: SLF001 - how far the helpers are is nobody else's business
    common.wait_until(lambda: journal.acked_seq >= journal.next_seq, 120, "every acknowledgement")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a tmpfs of _DISK_MIB there; None where that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m,mode=700", "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def fill(folder: Path) -> None:
    """Leave no free byte."""
    with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def make_conditions(folder: Path, disk: Path | None) -> list[Condition]:
    """Start the runs, and return what is to be measured on them."""
    import ddplog

    def start(name: str, spool: Path, **settings: Any) -> Any:
        return ddplog.init(
            run_id=name,
            dir=str(folder / "runs"),
            spool=str(spool),
            sinks=("jsonl",),
            exit_wait_s=60,
            hang_s=0,
            **settings,
        )

    def stopped(run: Any, which: int) -> tuple[Callable[[], None], Callable[[], None]]:
        pid = helpers(run)[which]
        return lambda: os.kill(pid, signal.SIGSTOP), lambda: (os.kill(pid, signal.SIGCONT), wait_stored(run))

    def filled(run: Any, space: Path | None) -> tuple[Callable[[], None], Callable[[], None]]:
        stop, go_on = stopped(run, 0)

        def begin() -> None:
            stop()
            if space is not None:
                fill(space)
            dropped = sum(run.drops.values())
            step = 1 << 40
            while sum(run.drops.values()) == dropped:
                run.log(_VALUES, step=step)
                step += 1

        def end() -> None:
            if space is not None:
                (space / "ballast").unlink()
            go_on()

        return begin, end

    main = start("main", folder / "spool")
    conditions = [
        Condition(_BASELINE, main, lambda: None, lambda: wait_stored(main)),
        Condition("aggregator stopped", main, *stopped(main, 0)),
        Condition("sink stopped", main, *stopped(main, 1)),
    ]
    full = start("full", folder / "full", **_SMALL)
    conditions.append(Condition("spool full", full, *filled(full, None)))
    if disk is not None:
        on_disk = start("disk", disk / "spool", segment_bytes=64 * 1024)
        conditions.append(Condition("disk full", on_disk, *filled(on_disk, disk)))
    return conditions


def measure(conditions: Sequence[Condition], options: Any) -> dict[str, Any]:
    """Measure every condition in each round."""
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {
        mode: {condition.name: [] for condition in conditions} for mode in ("tight", "paced")
    }
    shares: dict[str, list[float]] = {condition.name: [] for condition in conditions}
    for number in range(options.rounds):
        for offset in range(len(conditions)):
            condition = conditions[(number + offset) % len(conditions)]
            condition.begin()
            before = sum(condition.run.drops.values())
            gc.collect()
            first = condition.step
            rounds["tight"][condition.name].append(common.spread(condition.tight(options.calls)))
            rounds["paced"][condition.name].append(common.spread(condition.paced(options.paced)))
            num_values = (condition.step - first) * len(_VALUES)
            shares[condition.name].append((sum(condition.run.drops.values()) - before) / num_values)
            condition.end()
    results: dict[str, Any] = {"rounds": options.rounds, "calls": options.calls, "paced_calls": options.paced}
    for mode, found in rounds.items():
        results[mode] = {}
        for name, taken in found.items():
            row = {key: statistics.median(one[key] for one in taken) for key in ("p50", "p99", "p99.9")}
            row["max"] = max(one["max"] for one in taken)
            results[mode][name] = row
        base = results[mode][_BASELINE]
        for row in results[mode].values():
            row["ratio"] = {key: row[key] / base[key] for key in ("p50", "p99", "p99.9")}
    results["dropped_share"] = {name: statistics.median(taken) for name, taken in shares.items()}
    return results


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    for mode, title in (
        ("tight", "run.log() of 10 floats, nothing between, µs"),
        ("paced", "One call a millisecond, µs"),
    ):
        rows = []
        for name, found in results[mode].items():
            figures = [f"{found[key]:.2f}" for key in ("p50", "p99", "p99.9")]
            figures += [f"{found['ratio'][key]:.2f}" for key in ("p50", "p99", "p99.9")]
            figures += [f"{found['max']:.0f}", f"{results['dropped_share'][name]:.0%}"]
            limits = {"p50": _P50_US, "p99.9": _P999_US} if mode == "tight" else {"p99.9": _P999_US}
            said = ", ".join(f"{key} ≤ {limit:g}" for key, limit in limits.items())
            rows.append(common.Row(name, figures, said, all(found[key] <= limit for key, limit in limits.items())))
        columns = ("p50", "p99", "p99.9", "x p50", "x p99", "x p99.9", "max", "dropped")
        note = f"medians of {results['rounds']} rounds; x: times the baseline's; max: of all rounds"
        common.show(title, columns, rows, note)


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("Time run.log() while the aggregator, the sink or the disk does not work.")
    parser.add_argument("--rounds", type=int, default=7, help="how often each condition has its turn (default 7)")
    parser.add_argument("--calls", type=int, default=20_000, help="calls in the tight loop of a turn (default 20,000)")
    parser.add_argument("--paced", type=int, default=2_000, help="calls a millisecond apart of a turn (default 2,000)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.calls, options.paced = 2, 2_000, 100
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB"):
        os.environ.pop(name, None)
    warnings.simplefilter("ignore", RuntimeWarning)  # of the drops, which are the point
    with common.workspace() as folder, small_disk(folder / "disk") as disk:
        conditions = make_conditions(folder, disk)
        results = measure(conditions, options)
        for run in {id(condition.run): condition.run for condition in conditions}.values():
            run.finish()
            common.wait_ended(Path(run.dir))
    if disk is None:
        sys.stdout.write("no tmpfs may be mounted here: `disk full` is left out\n")
    report(results)
    common.write("bench_faults", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
