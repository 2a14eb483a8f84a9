"""What one call of run.log() costs the training thread, and what `import ddplog` costs its start.

    python benchmarks/bench_log.py

The run is a real one: ddplog.init() with a spool of its own, its agent and aggregator running beside and shipping what is
logged here, on the same cores. Each call is timed by itself; the timer's own cost, about 0.05 us, is in every figure,
the floors' included. `tight`: calls with nothing between, the floors in turn with it in rounds of 500 calls. `cold`: after
2 ms of numpy work, as between the steps of a training loop, when the caches hold other things.
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
_TIGHT_P50_US, _TIGHT_P99_US, _COLD_P99_US, _RATIO, _IMPORT_MS = 1.5, 10.0, 30.0, 6.0, 30.0


def floors() -> dict[str, Callable[[int], Any]]:
    """Return what no way of logging can be faster than."""
    values = [0.1 * i for i in range(10)]
    area = mmap.mmap(-1, 1 << 20)
    pack_into = struct.Struct("<10d").pack_into
    queue: deque[list[float]] = deque(maxlen=1000)

    def nothing(_step: int) -> None:
        pass

    def append(_step: int) -> None:
        queue.append(values)

    def pack(_step: int) -> None:
        pack_into(area, 64, *values)

    return {"empty call": nothing, "deque.append": append, "struct.pack_into, 10 values": pack}


def variants(run: Any) -> dict[str, Callable[[int], Any]]:
    """Return the calls to measure; each has keys of its own, and the first is what the budget is about."""
    import numpy as np

    def logger(prefix: str, values: list[Any], *, is_fresh: bool = False) -> Callable[[int], Any]:
        data = {f"{prefix}/metric_{i}": value for i, value in enumerate(values)}

        def log(step: int) -> None:
            run.log(data, step=step)

        def log_fresh(step: int) -> None:
            run.log(dict(data), step=step)

        return log_fresh if is_fresh else log

    floats = [0.1 * i + 0.05 for i in range(100)]
    made = {
        "log, 10 floats": logger("ten", floats[:10]),
        "log, 1 float": logger("one", floats[:1]),
        "log, 100 floats": logger("hundred", floats),
        "log, 10 floats, a new dict each": logger("fresh", floats[:10], is_fresh=True),
        "log, 5 floats and 5 ints": logger("mixed", [*floats[:5], 1, 2, 3, 4, 5]),
        "log, 10 numpy.float32": logger("numpy", [np.float32(x) for x in floats[:10]]),
    }
    nested = {"nested": {f"metric_{i}": value for i, value in enumerate(floats[:10])}}
    made["log, 10 floats, nested dict"] = lambda step: run.log(nested, step=step)
    weighted = {f"weighted/metric_{i}": value for i, value in enumerate(floats[:10])}
    made["log, 10 floats, weight=32"] = lambda step: run.log(weighted, step=step, weight=32)
    try:
        import torch
    except ModuleNotFoundError:
        return made
    made["log, 10 torch CPU scalars"] = logger("torch", list(torch.tensor(floats[:10])))
    return made


def tight(calls: dict[str, Callable[[int], Any]], count: int) -> dict[str, list[float]]:
    """Time `count` calls of each, in turns of _ROUND, and return microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    now = time.perf_counter_ns
    for first in range(0, count, _ROUND):
        for name, call in calls.items():
            times = taken[name]
            for step in range(first, first + _ROUND):
                start = now()
                call(step)
                times.append((now() - start) / 1000)
    return taken


def cold(calls: dict[str, Callable[[int], Any]], count: int, first: int) -> dict[str, list[float]]:
    """Time `count` calls of each with 2 ms of numpy work before every call, and return microseconds."""
    import numpy as np

    left = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    now = time.perf_counter_ns
    for step in range(first, first + count):
        for name, call in calls.items():
            until = now() + 2_000_000
            while now() < until:
                left = np.tanh(left + 0.1)
            start = now()
            call(step)
            taken[name].append((now() - start) / 1000)
    return taken


def import_ms(repeats: int) -> dict[str, float]:
    """Return the median time of `import ddplog` on top of numpy in a fresh interpreter, and what it loads."""
    code = (
        "import sys, time, numpy; a = time.perf_counter(); import ddplog; b = time.perf_counter();"
        "print((b - a) * 1e3, *(m for m in ('torch', 'grpc', 'zmq', 'sqlite3', 'google.protobuf') if m in sys.modules))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(repeats + 1)
    ][1:]  # the first one may compile
    return {"p50": statistics.median(float(words[0]) for words in outputs), "heavy_modules": len(outputs[0]) - 1}


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Measure everything in one run."""
    import ddplog

    run = ddplog.init(run_id="bench", dir=str(folder / "runs"), spool=str(folder / "spool"), exit_wait_s=60)
    bare = floors()
    calls = variants(run)
    main = {"log, 10 floats": calls["log, 10 floats"]}
    for call in calls.values():
        call(0)  # declares the keys
    count, num_cold = (2_000, 50) if options.quick else (options.calls, options.cold)
    gc.collect()
    results: dict[str, Any] = {"tight": {}, "cold": {}}
    for name, times in tight({**bare, **main}, count).items():
        results["tight"][name] = common.spread(times)
    for name, times in tight({k: v for k, v in calls.items() if k not in main}, count // 5).items():
        results["tight"][name] = common.spread(times)
    for name, times in cold(
        {"struct.pack_into, 10 values": bare["struct.pack_into, 10 values"], **main}, num_cold, count
    ).items():
        results["cold"][name] = common.spread(times)
    results["drops"] = dict(run.drops)
    start = time.perf_counter()
    run.finish()
    results["finish_s"] = time.perf_counter() - start
    results["import_ms"] = import_ms(3 if options.quick else 10)
    floor = results["tight"]["struct.pack_into, 10 values"]["p50"]
    results["ratio_to_pack_into"] = results["tight"]["log, 10 floats"]["p50"] / floor
    return results


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    for part in ("tight", "cold"):
        limits = (_TIGHT_P50_US, _TIGHT_P99_US) if part == "tight" else (None, _COLD_P99_US)
        rows = []
        for name, found in results[part].items():
            figures = [f"{found[key]:.2f}" for key in ("p50", "p99", "p99.9", "max")] + [f"{found['count']:,}"]
            if name != "log, 10 floats":
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
        common.Row("import ddplog over numpy, ms (p50)", [f"{loading['p50']:.1f}"], f"≤ {_IMPORT_MS:g}", loading["p50"] <= _IMPORT_MS),
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
