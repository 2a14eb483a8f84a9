"""What one call of run.log() costs the training thread, and what `import ddplog` costs its start.

    python benchmarks/bench_log.py

The run is a real one: ddplog.init() with a spool of its own, its agent and aggregator running beside and shipping what is
logged here, on the same cores. Each call is timed by itself; the timer's own cost, about 0.05 us, is in every figure,
the floors' included. `tight`: calls with nothing between, the floors in turn with it in rounds of 500 calls. `cold`: after
2 ms of numpy work, as between the steps of a training loop, when the caches hold other things, and the helpers have no
more to do than what these calls give them.
"""

from __future__ import annotations

import gc
import mmap
import os
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

_ROUND = 500
_FLOOR, _MAIN = "struct.pack_into, 10 values", "log, 10 floats"
_TIGHT_P50_US, _TIGHT_P99_US, _COLD_P99_US, _RATIO, _IMPORT_MS = 1.5, 10.0, 30.0, 6.0, 30.0


Timer = Callable[[range], list[float]]
"""Makes the call once for each step of a range, timing each by itself, and returns microseconds."""

_TEMPLATE = """
def timer(steps):
    times = []
    keep = times.append
    for step in steps:
        start = now()
        {call}
        keep(now() - start)
    return [t / 1000 for t in times]
"""


def make_timer(call: str, **names: Any) -> Timer:
    """Compile a timer, as timeit does: a function around the call would cost as much as a floor."""
    space = {"now": time.perf_counter_ns, **names}
    exec(_TEMPLATE.format(call=call), space)
    timer: Timer = space["timer"]
    return timer


def floors() -> dict[str, Timer]:
    """Return what no way of logging can be faster than."""
    values = [0.1 * i for i in range(10)]

    def nothing(_data: Any, step: int) -> None:
        pass

    return {
        "empty call": make_timer("nothing(values, step=step)", nothing=nothing, values=values),
        "deque.append": make_timer("append(values)", append=deque(maxlen=1000).append, values=values),
        _FLOOR: make_timer(
            "pack_into(area, 64, *values)",
            pack_into=struct.Struct("<10d").pack_into, area=mmap.mmap(-1, 1 << 20), values=values,
        ),
    }  # fmt: skip


def variants(run: Any) -> dict[str, Timer]:
    """Return the calls to measure; each has keys of its own, and the first is what the budget is about."""
    import numpy as np

    def timer(values: list[Any], call: str = "log(data, step=step)") -> Timer:
        prefix = f"variant_{len(made)}"
        return make_timer(call, log=run.log, data={f"{prefix}/metric_{i}": value for i, value in enumerate(values)})

    made: dict[str, Timer] = {}
    floats = [0.1 * i + 0.05 for i in range(100)]
    made[_MAIN] = timer(floats[:10])
    made["log, 1 float"] = timer(floats[:1])
    made["log, 100 floats"] = timer(floats)
    made["log, 10 floats, a new dict each"] = timer(floats[:10], "log(dict(data), step=step)")
    made["log, 10 floats, weight=32"] = timer(floats[:10], "log(data, step=step, weight=32)")
    made["log, 5 floats and 5 ints"] = timer([*floats[:5], 1, 2, 3, 4, 5])
    made["log, 10 numpy.float32"] = timer([np.float32(x) for x in floats[:10]])
    made["log, 10 floats, nested dict"] = timer(floats[:10], "log({'nested': data}, step=step)")
    try:
        import torch
    except ModuleNotFoundError:
        return made
    made["log, 10 torch CPU scalars"] = timer(list(torch.tensor(floats[:10])))
    return made


def tight(timers: dict[str, Timer], count: int, first: int) -> dict[str, list[float]]:
    """Time `count` calls of each, in turns of _ROUND, and return microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for start in range(first, first + count, _ROUND):
        for name, timer in timers.items():
            taken[name] += timer(range(start, start + _ROUND))
    return taken


def cold(timers: dict[str, Timer], count: int, first: int) -> dict[str, list[float]]:
    """Time `count` calls of each with 2 ms of numpy work before every call, and return microseconds."""
    import numpy as np

    left = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    right = left.T.copy() / 256
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for step in range(first, first + count):
        for name, timer in timers.items():
            until = time.perf_counter_ns() + 2_000_000
            while time.perf_counter_ns() < until:
                left = np.tanh(left @ right + 0.1)
            taken[name] += timer(range(step, step + 1))
    return taken


def import_ms(folder: Path, repeats: int) -> dict[str, float]:
    """Return the median time of `import ddplog` and of finding init() in it, over numpy, in a fresh interpreter.

    With bytecode, as pip leaves it, also where the environment says that none is written.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    code = (
        "import sys, time, numpy; a = time.perf_counter(); import ddplog; ddplog.init; b = time.perf_counter();"
        "print((b - a) * 1e3, *(m for m in ('torch', 'grpc', 'zmq', 'sqlite3', 'google.protobuf') if m in sys.modules))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(repeats + 1)
    ][1:]  # the first one compiles
    return {"p50": statistics.median(float(words[0]) for words in outputs), "heavy_modules": len(outputs[0]) - 1}


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Measure everything in one run."""
    import ddplog

    run = ddplog.init(run_id="bench", dir=str(folder / "runs"), spool=str(folder / "spool"), exit_wait_s=60)
    bare, calls = floors(), variants(run)
    count, num_cold = (2_000, 50) if options.quick else (options.calls, options.cold)
    for timer in calls.values():
        timer(range(_ROUND))  # declares the keys, and lets the interpreter specialize
    results: dict[str, Any] = {"tight": {}, "cold": {}}
    gc.collect()
    others = {name: timer for name, timer in calls.items() if name != _MAIN}
    for name, times in tight({**bare, _MAIN: calls[_MAIN]}, count, _ROUND).items():
        results["tight"][name] = common.spread(times)
    for name, times in tight(others, count // 5, _ROUND).items():
        results["tight"][name] = common.spread(times)
    journal = run._journal  # noqa: SLF001 - how far the helpers are is nobody else's business
    common.wait_until(lambda: journal.acked_seq >= journal.next_seq, 120, "every acknowledgement")
    for name, times in cold({_FLOOR: bare[_FLOOR], _MAIN: calls[_MAIN]}, num_cold, _ROUND + count).items():
        results["cold"][name] = common.spread(times)
    results["drops"] = dict(run.drops)
    start = time.perf_counter()
    run.finish()
    results["finish_s"] = time.perf_counter() - start
    common.wait_ended(Path(run.dir))
    results["import_ms"] = import_ms(folder, 3 if options.quick else 10)
    results["ratio_to_pack_into"] = results["tight"][_MAIN]["p50"] / results["tight"][_FLOOR]["p50"]
    return results


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    for part in ("tight", "cold"):
        limits = (_TIGHT_P50_US, _TIGHT_P99_US) if part == "tight" else (None, _COLD_P99_US)
        rows = []
        for name, found in results[part].items():
            figures = [f"{found[key]:.2f}" for key in ("p50", "p99", "p99.9", "max")] + [f"{found['count']:,}"]
            if name != _MAIN:
                rows.append(common.Row(name, figures))
                continue
            said = [f"{key} ≤ {limit:g}" for key, limit in zip(("p50", "p99"), limits, strict=True) if limit]
            kept = all(found[key] <= limit for key, limit in zip(("p50", "p99"), limits, strict=True) if limit)
            rows.append(common.Row(name, figures, ", ".join(said), kept))
        title = "One call, nothing between, µs" if part == "tight" else "One call after 2 ms of numpy work, µs"
        common.show(title, ("p50", "p99", "p99.9", "max", "calls"), rows)
    ratio, loading = results["ratio_to_pack_into"], results["import_ms"]
    rows = [
        common.Row("log, 10 floats / struct.pack_into (p50)", [f"{ratio:.1f}"], f"≤ {_RATIO:g}", ratio <= _RATIO),
        common.Row("import ddplog and ddplog.init, over numpy, ms (p50)", [f"{loading['p50']:.1f}"], f"≤ {_IMPORT_MS:g}", loading["p50"] <= _IMPORT_MS),
        common.Row("torch, grpc, zmq, sqlite3, protobuf loaded by it", [str(loading["heavy_modules"])], "0", not loading["heavy_modules"]),
        common.Row("values dropped", [str(sum(results["drops"].values()))], "0", not results["drops"]),
    ]  # fmt: skip
    common.show("Beside it", ("figure",), rows, "An agent and an aggregator of this run worked on the same cores.")


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("Time run.log() on one thread against the floors.")
    parser.add_argument("--calls", type=int, default=100_000, help="calls in the tight loop (default 100,000)")
    parser.add_argument("--cold", type=int, default=2_000, help="calls after work (default 2,000)")
    options = parser.parse_args()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB"):
        os.environ.pop(name, None)
    with common.workspace() as folder:
        results = measure(folder, options)
    report(results)
    common.write("bench_log", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
