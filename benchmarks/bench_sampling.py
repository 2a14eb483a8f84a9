"""What a sample of a whole node costs: host, processes and GPUs of 8 ranks, and, beside nvidia-smi, what it reads.

    python benchmarks/bench_sampling.py            # the GPUs of this machine, or the tests' stub of 8 where there is none
    python benchmarks/bench_sampling.py --stub     # the stub in any case

A stub answers at once, but for PCIe's counters, whose calls block for 20 ms each in the stub as in the driver; `gpm` is a
stub of devices that count them without (Hopper and later). The driver's own time is measured only where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

_STUB = common.ROOT / "tests" / "sampling" / "nvml_stub.c"
_RANK = """
import os, sys, time
from pathlib import Path
from ddplog.journal.writer import JournalWriter

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
identity = {"rank": rank, "world_size": 8, "local_rank": rank, "local_world_size": 8, "node_rank": 0, "launcher": "torchrun",
            "pid": os.getpid(), "host": "h", "boot_id": "b", "run_id": "r", "started_unix_ns": time.time_ns(),
            "cuda_visible_devices": None}
writer = JournalWriter(folder / f"{rank}.{rank:032x}", bytes([rank]) * 16, identity, segment_bytes=1 << 20,
                       spool_bytes=1 << 30, check=lambda: None)
print("up", flush=True)
step = 0
while True:
    writer.enter()
    writer.append_scalars(("loss", "acc"), [1.0, 2.0], step, 1.0)
    writer.leave()
    step += 1
    time.sleep(0.05)
"""
_SAMPLE = """
import json, sys, time
from pathlib import Path
from ddplog.agent.keeper import Plan
from ddplog.agent.sampler import Sampler

folder, with_gpus, count = Path(sys.argv[1]), sys.argv[2] == "gpus", int(sys.argv[3])
began = time.perf_counter()
sampler = Sampler(folder, Plan(created_unix_ns=0, sample_s=1.0, with_gpus=with_gpus), lambda: None)
sampler.round(0)
first_ms = 1000 * (time.perf_counter() - began)
wall, cpu = [], []
for second in range(1, count + 1):
    time.sleep(0.02)  # else the rates of two samples that touch are those of nothing
    before = time.perf_counter(), time.process_time()
    sampler.round(second * 10**9)
    wall.append(1000 * (time.perf_counter() - before[0]))
    cpu.append(1000 * (time.process_time() - before[1]))
idle = []
for _ in range(100):
    before = time.process_time()
    sampler.round(count * 10**9)
    idle.append(1000 * (time.process_time() - before))
nvml = sampler._nvml
read = {gpu.uuid: {uuid: nvml.values(uuid) for uuid in gpu.devices} for gpu in nvml.gpus} if nvml else {}
print(json.dumps({"ranks": len(sampler.ranks), "first_ms": first_ms, "wall_ms": wall, "cpu_ms": cpu, "idle_ms": idle,
                  "read": read}))
"""


@contextmanager
def ranks(folder: Path, count: int) -> Iterator[None]:
    """Let that many processes be ranks that log 20 times a second."""
    (folder / "logs").mkdir(parents=True)
    started = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(folder)], stdout=subprocess.PIPE)
        for rank in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def build_stub(folder: Path) -> dict[str, str] | None:
    """Return the environment in which NVML is the stub; None without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not _STUB.exists():
        return None
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, _STUB], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "NVML_STUB": str(folder / "nvml.conf")}


def sample(folder: Path, what: str, count: int, environ: dict[str, str]) -> dict[str, Any]:
    """Take samples in a process of its own."""
    words = [sys.executable, "-c", _SAMPLE, str(folder), what, str(count)]
    done = subprocess.run(words, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {
        "ranks": found["ranks"],
        "first_ms": found["first_ms"],
        **{name: common.spread(found[name]) for name in ("wall_ms", "cpu_ms", "idle_ms")},
        "read": found["read"],
    }


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Measure without GPUs, with this machine's, or else with the stub's."""
    results: dict[str, Any] = {}
    with ranks(folder / "job", options.ranks):
        results["host and processes"] = sample(folder / "job", "host", options.samples, {})
        real = None if options.stub else sample(folder / "job", "gpus", options.samples, {})
        if real is not None and real["read"]:
            results["and this machine's GPUs"] = real
            return results
        environ = build_stub(folder)
        if environ is None:
            return results
        conf = Path(environ["NVML_STUB"])
        conf.write_text(f"gpus {options.ranks}\n")
        results["and 8 GPUs of the stub"] = sample(folder / "job", "gpus", options.samples, environ)
        conf.write_text(f"gpus {options.ranks}\ngpm\n")
        results["and 8 GPUs of the stub, gpm"] = sample(folder / "job", "gpus", options.samples, environ)
    return results


def report(results: dict[str, Any], sample_s: float = 5.0) -> None:
    """Print the tables."""
    rows = []
    for what, found in results.items():
        cpu, wall, idle = found["cpu_ms"], found["wall_ms"], found["idle_ms"]
        share = (cpu["p50"] / 1000 / sample_s + idle["p50"] / 1000 * 10) * 100
        figures = [
            f"{cpu['p50']:.2f}",
            f"{cpu['p99']:.2f}",
            f"{wall['p50']:.1f}",
            f"{idle['p50']:.3f}",
            f"{share:.2f} %",
        ]
        rows.append(common.Row(what, [*figures, f"{found['first_ms']:.0f}"]))
    columns = ("CPU p50 ms", "CPU p99", "wall p50", "a look between, CPU", "of a core at 5 s", "first, wall")
    count = next(iter(results.values()))["ranks"]
    common.show(f"A sample of a node with {count} ranks", columns, rows)
    for uuid, devices in next(reversed(results.values()))["read"].items():
        for device, values in devices.items():
            print(f"\n{uuid}" + (f" {device}" if device != uuid else ""))
            for name, value in values.items():
                print(f"  {name:34} {value:.6g}")


def main() -> None:
    """Run the benchmark."""
    parser = common.parser("Time a sample of the GPUs, the host and the processes of a node.")
    parser.add_argument("--ranks", type=int, default=8, help="ranks on the node (default 8)")
    parser.add_argument("--samples", type=int, default=200, help="samples of each kind (default 200)")
    parser.add_argument("--stub", action="store_true", help="do not ask this machine's driver")
    options = parser.parse_args()
    if options.quick:
        options.samples = 3
    with common.workspace() as folder:
        results = measure(folder, options)
    report(results)
    common.write("bench_sampling", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
