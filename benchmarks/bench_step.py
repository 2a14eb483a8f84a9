"""What logging 20 metrics a step costs the steps of a real DDP job, and what ddplog.attach() does.

    python benchmarks/bench_step.py

Starts torch.distributed.run itself: 2 processes, gloo, CPU, one thread each, a small MLP. In one job and one pair of
processes, blocks of steps take turns, in an order drawn anew for each cycle:

  none        the metrics exist as tensors, and nothing is done with them
  ddplog      run.log() of them on every rank
  stacked     the habit: stack them, one all_reduce, .item() of each
  one by one  the habit as it is often written: an all_reduce and an .item() per metric
  attach      ddplog.attach(model, optimizer) and no metrics: the times of the phases; then with the gradients' norm as
              well; then with DDP's communication too, which is all of it

Blocks, not single steps, because the helpers work on what was logged a moment later; the first steps of a block are
left out. The ratio is that of medians over cycles, with its 95 % bootstrap interval. ddplog's agent and aggregator
live through all blocks, on the same cores as the ranks: what they use is in the figures, and shown by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

HOOKS = {"attach: times": (), "attach: + norm": ("grad_norm",), "attach: + comm": ("grad_norm", "comm")}
"""Mode -> the parts that are attached for its block."""

MODES = ("none", "ddplog", "stacked", "one by one", *HOOKS)
_NUM_METRICS = 20
_SKIP = 3
_BUDGET_PCT = 0.5


def make_step(hidden: int) -> tuple[Callable[[], list[Any]], Any, Any]:
    """Return a function that does one training step and returns the step's metrics as tensors; model and optimizer."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(256, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels = torch.randn(128, 256), torch.randint(0, 10, (128,))

    def step() -> list[Any]:
        optimizer.zero_grad()
        output = model(inputs)
        loss = nn.functional.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        first = [loss.detach(), (output.argmax(1) == labels).float().mean()]
        return first + list(output.detach().mean(0).repeat(2)[: _NUM_METRICS - len(first)])

    return step, model, optimizer


def make_loggers(run: Any) -> dict[str, Callable[[list[Any], int], Any]]:
    """Return what each mode does with a step's metrics."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    names = [f"train/metric_{i}" for i in range(_NUM_METRICS)]

    def none(_metrics: list[Any], _step: int) -> None:
        pass

    def ddplog(metrics: list[Any], step: int) -> None:
        run.log(dict(zip(names, metrics, strict=True)), step=step)

    def stacked(metrics: list[Any], _step: int) -> dict[str, float]:
        together = torch.stack(metrics)
        dist.all_reduce(together)
        return {name: value.item() / world for name, value in zip(names, together, strict=True)}

    def one_by_one(metrics: list[Any], _step: int) -> dict[str, float]:
        result = {}
        for name, metric in zip(names, metrics, strict=True):
            dist.all_reduce(metric)
            result[name] = metric.item() / world
        return result

    found = {"none": none, "ddplog": ddplog, "stacked": stacked, "one by one": one_by_one}
    return {**found, **dict.fromkeys(HOOKS, none)}


def helper_pids(spool: Path) -> list[int]:
    """Find the agent and the aggregator of this job by the spool in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(spool).encode() in words and (b"ddplog.agent" in words or b"ddplog.aggregator" in words):
            found.append(int(entry.name))
    return found


def work(folder: Path, options: argparse.Namespace) -> None:
    """Be one rank; rank 0 writes what was measured."""
    import torch
    import torch.distributed as dist

    import ddplog

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run = ddplog.init(run_id="bench", dir=str(folder / "runs"), spool=str(folder / "spool"), exit_wait_s=60)
    (step, model, optimizer), loggers = make_step(options.hidden), make_loggers(run)
    for number in range(10):
        metrics = step()
        for logger in loggers.values():
            logger(metrics, number)
    time.sleep(2)  # the helpers have started
    dist.barrier()
    pids = helper_pids(folder / "spool") if rank == 0 else []
    order, draw = list(MODES), random.Random(0)
    cycles: list[dict[str, dict[str, float]]] = []
    number = 10
    for _ in range(options.cycles):
        draw.shuffle(order)
        cycle = {}
        for mode in order:
            times, calls, cpu = [], [], []
            helpers = [common.cpu_s(pid) for pid in pids]
            attached = ddplog.attach(model, optimizer, parts=HOOKS[mode]) if mode in HOOKS else None
            for _ in range(options.block):
                start, start_cpu = time.perf_counter(), time.thread_time()
                metrics = step()
                called = time.perf_counter()
                loggers[mode](metrics, number)
                end = time.perf_counter()
                cpu.append(time.thread_time() - start_cpu)
                times.append(end - start)
                calls.append(end - called)
                number += 1
            if attached is not None:
                attached.detach()
            used = sum(common.cpu_s(pid) - before for pid, before in zip(pids, helpers, strict=True))
            cycle[mode] = {
                "step_ms": statistics.median(times[_SKIP:]) * 1e3,
                "mean_step_ms": statistics.fmean(times[_SKIP:]) * 1e3,
                "cpu_ms": statistics.median(cpu[_SKIP:]) * 1e3,
                "call_us": statistics.median(calls[_SKIP:]) * 1e6,
                "helpers_ms_per_step": used * 1e3 / options.block,
            }
        cycles.append(cycle)
    run.finish()
    if rank == 0:
        (folder / "cycles.json").write_text(
            json.dumps({"cycles": cycles, "helpers": len(pids), "drops": dict(run.drops)})
        )
    dist.destroy_process_group()


def launch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start the job and return what rank 0 wrote."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    words += ["--folder", str(folder), "--cycles", str(options.cycles), "--block", str(options.block)]
    words += ["--hidden", str(options.hidden)]
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    subprocess.run(words, env={**env, "OMP_NUM_THREADS": "1"}, check=True)
    common.wait_ended(folder / "runs" / "bench")
    measured: dict[str, Any] = json.loads((folder / "cycles.json").read_text())
    return measured


def summarize(measured: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Turn the cycles into medians and ratios."""
    cycles = measured["cycles"]
    results: dict[str, Any] = {"block": options.block, "cycles": len(cycles), "hidden": options.hidden, "modes": {}}
    results.update(helpers=measured["helpers"], drops=measured["drops"])
    for mode in MODES:
        columns = {key: [cycle[mode][key] for cycle in cycles] for key in cycles[0][mode]}
        ratio, low, high = common.bootstrap([(c["none"]["step_ms"], c[mode]["step_ms"]) for c in cycles])
        mean_ratio, mean_low, mean_high = common.bootstrap(
            [(c["none"]["mean_step_ms"], c[mode]["mean_step_ms"]) for c in cycles]
        )
        results["modes"][mode] = {
            "step_ms": statistics.median(columns["step_ms"]),
            "mean_step_ms": statistics.median(columns["mean_step_ms"]),
            "cpu_ms": statistics.median(columns["cpu_ms"]),
            "call_us": statistics.median(columns["call_us"]),
            "helpers_ms_per_step": statistics.fmean(columns["helpers_ms_per_step"]),
            "slower_pct": (ratio - 1) * 100,
            "slower_pct_interval": [(low - 1) * 100, (high - 1) * 100],
            "mean_slower_pct": (mean_ratio - 1) * 100,
            "mean_slower_pct_interval": [(mean_low - 1) * 100, (mean_high - 1) * 100],
        }
    return results


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for mode, found in results["modes"].items():
        low, high = found["slower_pct_interval"]
        mean_low, mean_high = found["mean_slower_pct_interval"]
        shown, shown_mean = f"{found['slower_pct']:+.2f}", f"{found['mean_slower_pct']:+.2f}"
        figures = [
            f"{found['step_ms']:.2f}", f"{found['cpu_ms']:.2f}", "" if mode in HOOKS else f"{found['call_us']:.0f}",
            "" if mode == "none" else f"{shown} ({low:+.2f} to {high:+.2f})",
            "" if mode == "none" else f"{shown_mean} ({mean_low:+.2f} to {mean_high:+.2f})",
            f"{found['helpers_ms_per_step']:.2f}",
        ]  # fmt: skip
        is_ours = mode == "ddplog"
        budget = f"≤ {_BUDGET_PCT:g} % (median)" if is_ours else ""
        rows.append(common.Row(mode, figures, budget, found["slower_pct"] <= _BUDGET_PCT if is_ours else None))
    columns = (
        "step, ms",
        "its thread's CPU, ms",
        "call, µs",
        "median slower, %",
        "mean slower, %",
        "helpers' CPU, ms/step",
    )
    title = f"2-process DDP job, {_NUM_METRICS} metrics a step, {results['cycles']} x {results['block']} steps a mode"
    note = "The helpers share the ranks' 2 cores here; on a training node they have some of their own."
    common.show(title, columns, rows, note if len(os.sched_getaffinity(0)) <= 2 else "")


def main() -> None:
    """Run the benchmark, or be one of its ranks."""
    parser = common.parser("Measure what logging costs the steps of a DDP job.")
    parser.add_argument("--cycles", type=int, default=24, help="turns of all modes (default 24)")
    parser.add_argument("--block", type=int, default=25, help="steps of one mode in a row (default 25)")
    parser.add_argument("--hidden", type=int, default=768, help="width of the MLP (default 768)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        work(options.folder, options)
        return
    if options.quick:
        options.cycles, options.block, options.hidden = 2, 5, 64
    with common.workspace() as folder:
        results = summarize(launch(folder, options), options)
    report(results)
    common.write("bench_step", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
