"""What logging costs a process that trains on a GPU, and what the GPU says of itself.

    python benchmarks/bench_gpu.py

Without a CUDA device it says so, and measures only what it can: the host's part of log() around the calls to the device.

around   that part, on the CPU: tensors, stack, copy and queue are real, the device's copies and events are done at once
log      host time of log() of 10 CUDA scalars, beside one .tolist() of their stack and ten .item(), both of which wait;
         the queue to the GPU is emptied between rounds, not within them
syncs    steps with log() and, where there is one, ddplog.attach(), in the mode in which torch raises at a synchronization
step     a model that keeps the GPU busy, blocks of steps with and without logging in turn
nvml     what ddplog.sampling reads, where it is there, beside nvidia-smi
mapped   an experiment: the journal's own segment registered as pinned memory, so that the device writes straight into
         the record, which would then survive a SIGKILL of the rank. In a process that kills itself with the copy under way.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

_NUM_VALUES = 10
_ROUND = 50
_BUDGET_US = 40.0
_MAPPED_BYTES = 1 << 20
_SEEN, _VALUE = b"ready", 1234.5
_SMI = ("utilization.gpu", "memory.used", "memory.total", "power.draw", "temperature.gpu", "clocks.sm", "clocks.mem")


@contextmanager
def started(folder: Path, name: str) -> Iterator[Any]:
    """Begin a real run, with its helpers, and end it."""
    import ddplog

    run = ddplog.init(run_id=name, dir=str(folder / "runs"), spool=str(folder / "spool"), exit_wait_s=60)
    yield run
    run.finish()
    common.wait_ended(Path(run.dir))


# -- around


class AtOnce:
    """A device whose copies are done when they are asked for: what is left is the host's part."""

    def __init__(self) -> None:
        import torch

        class Held(torch.Tensor):
            is_cpu = False
            __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001 - operations at torch's own speed

        self.kind = Held

    def holds(self, tensor: Any) -> bool:
        return isinstance(tensor, self.kind)

    def is_capturing(self) -> bool:
        return False

    def allocate(self, num_bytes: int) -> Any:
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, to: Any, stacked: Any) -> None:
        to.copy_(stacked)

    def record(self, stacked: Any) -> Any:  # noqa: ARG002
        return self

    def query(self) -> bool:
        return True


def measure_around(folder: Path, num_calls: int) -> dict[str, Any]:
    """Time log() of 10 tensors with such a device: each call also writes the record of the one before."""
    import torch

    from ddplog.worker.pending import Pending

    torch.set_num_threads(1)
    with started(folder, "around") as run:
        device = AtOnce()
        run._pending = Pending(run._journal, device)  # noqa: SLF001 - the seam is nobody else's business
        data = {f"m{i}": torch.tensor(0.1 * i).as_subclass(device.kind) for i in range(_NUM_VALUES)}
        times = time_calls(lambda step: run.log(data, step=step), num_calls)
        drops = dict(run.drops)
    return {"us": common.spread(times), "drops": drops}


def time_calls(call: Callable[[int], Any], num_calls: int, between: Callable[[], Any] = lambda: None) -> list[float]:
    """Return microseconds of each call; `between` rounds of them, something else is done."""
    for step in range(_ROUND):
        call(step)
    times = []
    for first in range(_ROUND, _ROUND + num_calls, _ROUND):
        between()
        for step in range(first, first + _ROUND):
            start = time.perf_counter_ns()
            call(step)
            times.append((time.perf_counter_ns() - start) / 1000)
    return times


# -- on the device


def measure_log(folder: Path, num_calls: int) -> dict[str, Any]:
    """Time what a call takes of the host, against what people do otherwise."""
    import torch

    values = list(torch.arange(float(_NUM_VALUES), device="cuda"))
    mixed = {f"v{i}": value if i % 2 else float(i) for i, value in enumerate(values)}
    data = {f"m{i}": value for i, value in enumerate(values)}
    with started(folder, "log") as run:
        calls: dict[str, Callable[[int], Any]] = {
            "log, 10 CUDA scalars": lambda step: run.log(data, step=step),
            "log, 5 CUDA scalars and 5 floats": lambda step: run.log(mixed, step=step),
            "torch.stack().tolist()": lambda _: torch.stack(values).tolist(),
            "10 .item()": lambda _: [value.item() for value in values],
        }
        found = {
            name: common.spread(time_calls(call, num_calls, torch.cuda.synchronize)) for name, call in calls.items()
        }
        drops = dict(run.drops)
    return {"us": found, "drops": drops}


def make_step(width: int, depth: int) -> tuple[Any, Any, Callable[[], list[Any]]]:
    """Return a model, its optimizer, and a function that trains it for a step and returns the step's metrics."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(512, width, device="cuda")

    def step() -> list[Any]:
        optimizer.zero_grad(set_to_none=True)
        output = model(inputs)
        loss = output.square().mean()
        loss.backward()
        optimizer.step()
        return [loss, *output.detach().mean(0)[: _NUM_VALUES - 1]]

    return model, optimizer, step


def measure_syncs(folder: Path, num_steps: int) -> dict[str, Any]:
    """Train with torch raising at every synchronization, and count what that cost."""
    import torch

    import ddplog

    attach = getattr(ddplog, "attach", None)
    found: dict[str, Any] = {"steps": num_steps, "attach": attach is not None, "error": ""}
    with started(folder, "syncs") as run:
        model, optimizer, step = make_step(256, 2)
        attached = attach(model, optimizer) if attach is not None else None
        for number in range(10):  # what is allocated once may synchronize
            run.log({f"m{i}": value for i, value in enumerate(step())}, step=number)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(10, 10 + num_steps):
                run.set_step(number)
                run.log({f"m{i}": value for i, value in enumerate(step())}, step=number)
        except RuntimeError as exc:
            found["error"] = str(exc)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if attached is not None:
            attached.detach()
        run.flush()
        found["drops"] = dict(run.drops)  # log() raises nothing: a synchronization in it is a device_error
    return found


def measure_step(folder: Path, num_cycles: int, block: int, width: int) -> dict[str, Any]:
    """Time blocks of steps without and with logging, in turn."""
    import torch

    _, _, step = make_step(width, 8)
    with started(folder, "step") as run:
        number = 0

        def time_block(is_logging: bool) -> float:
            nonlocal number
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(block):
                metrics = step()
                if is_logging:
                    run.log({f"m{i}": value for i, value in enumerate(metrics)}, step=number)
                    number += 1
            torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3 / block

        for is_logging in (False, True):
            time_block(is_logging)
        pairs = []
        for cycle in range(num_cycles):
            order = (False, True) if cycle % 2 else (True, False)
            times = {is_logging: time_block(is_logging) for is_logging in order}
            pairs.append((times[False], times[True]))
        drops = dict(run.drops)
    ratio, low, high = common.bootstrap(pairs)
    return {
        "without_ms": statistics.median(first for first, _ in pairs),
        "with_ms": statistics.median(second for _, second in pairs),
        "slower_pct": (ratio - 1) * 100,
        "slower_pct_interval": [(low - 1) * 100, (high - 1) * 100],
        "drops": drops,
    }


# -- nvml


def read_nvml() -> dict[str, Any]:
    """Return what ddplog reads of each GPU and what nvidia-smi says, one right after the other; and what is not there."""
    found: dict[str, Any] = {"ddplog": {}, "nvidia-smi": {}, "missing": []}
    try:
        nvml = importlib.import_module("ddplog.sampling.nvml").Nvml(lambda: None)
    except Exception as exc:  # noqa: BLE001 - it may not be there, and neither may the driver's library
        found["missing"].append(f"ddplog.sampling: {exc!r}")
    else:
        for gpu in nvml.gpus:
            nvml.values(gpu.uuid)  # rates need a first reading
            start = time.perf_counter()
            found["ddplog"][gpu.uuid] = nvml.values(gpu.uuid)
            found["read_ms"] = (time.perf_counter() - start) * 1e3
    if shutil.which("nvidia-smi") is None:
        found["missing"].append("nvidia-smi")
        return found
    words = ["nvidia-smi", f"--query-gpu=uuid,{','.join(_SMI)}", "--format=csv,noheader"]
    for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines():
        uuid, *values = (word.strip() for word in line.split(","))
        found["nvidia-smi"][uuid] = dict(zip(_SMI, values, strict=True))
    return found


# -- mapped


def try_mapped(folder: Path) -> dict[str, Any]:
    """Register a journal's segment with the driver in a child, let the device write into it, and kill the child."""
    found: dict[str, Any] = {}
    for name, delay_s in (("at once", 0.0), ("0.2 s later", 0.2)):
        journal = folder / f"mapped-{len(found)}"
        words = [sys.executable, __file__, "--mapped", str(journal), "--delay-s", str(delay_s)]
        done = subprocess.run(words, capture_output=True, timeout=120, check=False)
        is_registered = _SEEN in done.stdout
        landed = False
        if is_registered and done.returncode == -signal.SIGKILL:
            last = (journal / "000001.seg").read_bytes()[_MAPPED_BYTES // 2 :][:8]
            landed = ctypes.c_double.from_buffer_copy(last).value == _VALUE
        said = (done.stdout + done.stderr).decode(errors="replace")[-500:]
        found[name] = {"registered": is_registered, "code": done.returncode, "landed": landed, "said": said}
    found["verdict"] = verdict(*found.values())
    return found


def verdict(at_once: dict[str, Any], later: dict[str, Any]) -> str:
    """Say what the two trials come to."""
    if not at_once["registered"]:
        return "the driver does not register the journal's mapping as pinned memory: not usable here"
    if at_once["landed"]:
        return "a copy that was under way landed in the journal of a killed process: worth building"
    if later["landed"]:
        return (
            "the device writes into the journal, but what is under way when the process is killed is lost all the same"
        )
    return "the mapping is registered, and nothing arrived in it: not usable here"


def be_mapped(journal: Path, delay_s: float) -> None:
    """Be that child: the copy waits on the stream for half a second behind other work, or for nothing."""
    import torch

    from ddplog.journal.writer import JournalWriter

    writer = JournalWriter(
        journal, b"m" * 16, {"rank": 0}, segment_bytes=_MAPPED_BYTES, spool_bytes=1 << 30, check=lambda: None
    )
    mapping = writer._segment  # noqa: SLF001 - the experiment is about it
    assert mapping is not None
    torch.cuda.init()
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error) != 0 or not memory.is_pinned():
        sys.exit(f"cudaHostRegister: {error}, pinned: {memory.is_pinned()}")
    value = torch.full((1,), _VALUE, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    if not delay_s:
        torch.cuda._sleep(int(5e8))  # noqa: SLF001 - a kernel that only takes time
    start = time.perf_counter()
    memory[_MAPPED_BYTES // 2 :][:8].view(torch.float64).copy_(value, non_blocking=True)
    took_ms = (time.perf_counter() - start) * 1e3
    sys.stdout.write(f"{_SEEN.decode()}: the copy took {took_ms:.2f} ms of the host\n")
    sys.stdout.flush()
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


# -- the whole


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that can be."""
    import torch

    quick = options.quick
    results: dict[str, Any] = {"device": None, "around": measure_around(folder, 500 if quick else 20_000)}
    if not torch.cuda.is_available():
        return results
    results["device"] = torch.cuda.get_device_name()
    results["log"] = measure_log(folder, 500 if quick else 10_000)
    results["syncs"] = measure_syncs(folder, 100 if quick else 1_000)
    results["step"] = measure_step(folder, *((3, 10, 256) if quick else (24, 50, 2048)))
    results["nvml"] = read_nvml()
    results["mapped"] = try_mapped(folder)
    return results


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    columns = ("p50", "p99", "p99.9", "max")
    around = results["around"]["us"]
    calls = {"around the device's calls, 10 tensors, on the CPU": around, **results.get("log", {}).get("us", {})}
    rows = []
    for name, found in calls.items():
        is_ours = name == "log, 10 CUDA scalars"
        kept = found["p50"] <= _BUDGET_US if is_ours else None
        figures = [f"{found[key]:.1f}" for key in columns]
        rows.append(common.Row(name, figures, f"p50 ≤ {_BUDGET_US:g}" if is_ours else "", kept))
    common.show("Host time of one call, µs", columns, rows)
    if results["device"] is None:
        print("no CUDA device: nothing else to measure here")
        return
    syncs, step, nvml = results["syncs"], results["step"], results["nvml"]
    is_clean = not syncs["error"] and not syncs["drops"]
    said = syncs["error"] or (f"dropped {syncs['drops']}" if syncs["drops"] else "none")
    low, high = step["slower_pct_interval"]
    rows = [
        common.Row(f"synchronizations, {syncs['steps']:,} steps, attach: {syncs['attach']}", [said], "none", is_clean),
        common.Row("step without, ms", [f"{step['without_ms']:.3f}"], ""),
        common.Row("step with 10 CUDA scalars, ms", [f"{step['with_ms']:.3f}"], ""),
        common.Row("slower, % (95 % interval)", [f"{step['slower_pct']:+.2f} ({low:+.2f} to {high:+.2f})"], ""),
        common.Row("the journal as pinned memory", [results["mapped"]["verdict"]], ""),
    ]
    common.show(f"On {results['device']}", ("figure",), rows)
    for uuid, smi in nvml["nvidia-smi"].items():
        ours = nvml["ddplog"].get(uuid, {})
        rows = [common.Row(name, [f"{value:.6g}"], "") for name, value in sorted(ours.items())]
        common.show(f"{uuid}: ddplog.sampling", ("value",), rows)
        common.show(f"{uuid}: nvidia-smi", ("value",), [common.Row(name, [value], "") for name, value in smi.items()])
    for missing in nvml["missing"]:
        print(f"not here: {missing}")


def main() -> None:
    """Run the benchmark, or be the child of its experiment."""
    parser = common.parser("Measure logging on a GPU.")
    parser.add_argument("--mapped", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--delay-s", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mapped is not None:
        be_mapped(options.mapped, options.delay_s)
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB"):
        os.environ.pop(name, None)
    with common.workspace() as folder:
        results = measure(folder, options)
    report(results)
    common.write("bench_gpu", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
