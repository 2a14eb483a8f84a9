"""What the agent and the aggregator take: values per second, CPU, memory, and the delay from log() to the store.

    python benchmarks/bench_ingest.py

Real processes, CURVE and durable commits on, on a real disk. Four parts:

  aggregator  the aggregator alone, pinned to one core. Nodes are played by a client process on the other cores, with real
              DEALERs and batches encoded before, which keeps to the agent's window and counts what is acknowledged.
              `blocks`: batches of 128 steps. `steps`: one step a batch, as fast as they are taken.
  blocks      agent and aggregator: every rank's journal is written before they start, so that batches are full.
  paced       agent and aggregator: ranks log one step at a time, at a fixed rate. The figure is the CPU this takes.
  latency     rank processes log the time at 20 steps/s; a reader polls the store. From the last rank's log() to the
              moment at which the reader has the point.

In `aggregator`, seconds run from the first Hello to the last acknowledgement; in `blocks`, from the aggregator's
address to the last acknowledgement that a rank can see. After each, the store is read: every point must be there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import common

KEYS = tuple(f"metric_{i}" for i in range(10))
_BLOCK_STEPS = 128
_RANKS_PER_NODE = 8
_BLOCKS_BUDGET, _STEPS_BUDGET, _LATENCY_BUDGET_MS = 5e6, 0.5e6, 300
_SETTINGS = {
    "grace_s": 10.0, "late_s": 5.0, "settle_s": 0.1, "max_keys": 10_000, "rank_log_bytes": 20 * 1024**3,
    "spool_bytes": 1024**3, "host": "127.0.0.1", "port": 0,
}  # fmt: skip


def declare(folder: Path, run_id: str) -> Any:
    """Declare a job of its own in the spool and return (its folder, its JobInfo)."""
    from ddplog.journal import spool

    root = spool.open_spool(str(folder / "spool"))
    info = spool.JobInfo(
        run_id=run_id, project="bench", name=None, dir=str(folder / "runs"), sinks=(), tags=(), config={},
        created_unix_ns=time.time_ns(), launcher_pid=0, launcher="python", node_rank=0, settings=_SETTINGS,
    )  # fmt: skip
    job = root / run_id
    info = spool.declare_job(job, info)
    (job / "spawn.lock").touch(0o600)  # what the rank that starts an agent makes
    return job, info


def start_helper(module: str, job: Path) -> subprocess.Popen[bytes]:
    """Start the agent or the aggregator of a job, as ddplog does, or under cProfile where DDPLOG_BENCH_PROFILE says."""
    from ddplog.bootstrap import command

    words = command(module, str(job))
    if os.environ.get("DDPLOG_BENCH_PROFILE") and module == "ddplog.aggregator.process":
        code = f"import cProfile, sys; sys.path[0] = sys.argv.pop(1); from {module} import main; "
        code += f"cProfile.run('main()', {os.environ['DDPLOG_BENCH_PROFILE']!r})"
        words = [sys.executable, "-c", code, *words[3:]]
    with (job / "logs" / f"{module.rsplit('.', 2)[1]}.log").open("ab") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def read_announcement(job: Path) -> dict[str, Any] | None:
    try:
        word: dict[str, Any] = json.loads((job / "aggregator.json").read_text())
    except (OSError, ValueError):
        return None
    return word


def check_points(run_dir: Path, num_steps: int, num_ranks: int) -> dict[str, Any]:
    """Compare the store with what was logged: one point per key and step, from every rank."""
    from ddplog.store.reader import open_run

    with open_run(run_dir) as run:
        columns = [run.metric(key) for key in KEYS]
        return {
            "points": run.num_points,
            "points_wanted": num_steps * len(KEYS),
            "complete": all(len(c) == num_steps and bool((c.n == num_ranks).all()) for c in columns),
            "status": run.status,
        }


# -- the aggregator alone


class Node:
    """A node that is played: its encoded batches, what was sent and what is acknowledged."""

    def __init__(self, number: int, secret: bytes) -> None:
        from ddplog.wire.keys import aggregator_keys, node_keys
        from ddplog.wire.sockets import DealerEndpoint

        self.name = str(number)
        self.dealer = DealerEndpoint(keys=node_keys(secret, self.name), server_key=aggregator_keys(secret).public)
        self.queue: deque[tuple[bytes, int]] = deque()  # (message, payload bytes)
        self.totals: dict[bytes, int] = {}  # incarnation -> its last seq + 1
        self.acked: dict[bytes, int] = {}
        self.sizes: dict[bytes, deque[tuple[int, int]]] = {}  # incarnation -> (seq after it, payload bytes) under way
        self.in_flight = 0
        self.is_welcome = False


def encode_node(node: Node, ranks: range, world_size: int, num_batches: int, steps_per_batch: int) -> list[Any]:
    """Fill a node's queue, the ranks in turn as an agent takes them, and return its writers."""
    from ddplog.core.records import KIND_SCHEMA, NO_STEP, encode_message, encode_scalars
    from ddplog.v1 import data_pb2 as pb
    from ddplog.wire import codec

    names = {rank: secrets.token_bytes(16) for rank in ranks}
    values = {rank: [rank + 0.1 * i for i in range(len(KEYS))] for rank in ranks}
    now = time.time_ns()
    for batch in range(num_batches):
        for rank in ranks:
            first = batch * steps_per_batch + (batch > 0)
            frames = []
            if batch == 0:
                frames.append(encode_message(KIND_SCHEMA, 0, NO_STEP, now, {"id": 1, "keys": KEYS}, 7))
            steps = range(batch * steps_per_batch, (batch + 1) * steps_per_batch)
            frames += [encode_scalars(1, step + 1, step, now, 1.0, values[rank], 7) for step in steps]
            payload = b"".join(frames)
            message = codec.encode_batch(names[rank], first, len(frames), payload, 7)
            node.queue.append((message, len(payload)))
            node.sizes.setdefault(names[rank], deque()).append((first + len(frames), len(payload)))
    node.totals = dict.fromkeys(names.values(), num_batches * steps_per_batch + 1)
    node.acked = dict.fromkeys(node.totals, 0)
    return [
        pb.Writer(
            incarnation=names[rank], rank=rank, world_size=world_size, local_rank=rank % _RANKS_PER_NODE,
            node_rank=int(node.name), pid=rank + 1, host=f"host{node.name}", boot_id="bench", started_unix_ns=now,
            is_alive=True,
        )
        for rank in ranks
    ]  # fmt: skip


def play(job: Path, run_id: str, ranks: int, num_batches: int, steps_per_batch: int, result: Any) -> None:
    """Play the nodes of a job: the client process. Puts {"hello", "acked", ...} on the queue when all is acknowledged."""
    from ddplog.wire import codec
    from ddplog.wire.keys import load_secret

    secret = load_secret(job / "secret")
    nodes, hellos = [], []
    for first in range(0, ranks, _RANKS_PER_NODE):
        node = Node(first // _RANKS_PER_NODE, secret)
        mine = range(first, min(ranks, first + _RANKS_PER_NODE))
        hellos.append(
            codec.encode_hello(run_id, node.name, encode_node(node, mine, ranks, num_batches, steps_per_batch))
        )
        nodes.append(node)
    result.put("encoded")
    word = common.wait_until(lambda: read_announcement(job), 60, "the aggregator's address")
    for node in nodes:
        node.dealer.connect(word["endpoint"])
    for node in nodes:
        common.wait_until(lambda node=node: node.dealer.link().is_up, 30, "a connection")
    cpu_before = common.cpu_s(word["pid"])
    start = time.monotonic()
    for node, hello in zip(nodes, hellos, strict=True):
        node.dealer.send(hello)
    while any(node.acked != node.totals for node in nodes):
        is_idle = True
        for node in nodes:
            is_idle &= not exchange(node)
        if is_idle:
            time.sleep(0.0005)
    seconds = time.monotonic() - start
    cpu = common.cpu_s(word["pid"]) - cpu_before
    peak = common.peak_mib(word["pid"])
    for node in nodes:
        for name, total in node.totals.items():
            node.dealer.send(codec.encode_bye(name, total, finished=True))
        node.dealer.send(codec.encode_heartbeat(node.name, [], is_over=True))
    result.put({"seconds": seconds, "aggregator_cpu_s": cpu, "aggregator_peak_mib": peak})
    common.wait_until(lambda: read_announcement(job) is None, 60, "the aggregator's end")


def exchange(node: Node) -> bool:
    """Take what the aggregator says and send what the window allows; return whether there was anything to do."""
    from ddplog.agent.shipper import WINDOW_BYTES
    from ddplog.v1 import data_pb2 as pb
    from ddplog.wire import codec

    is_busy = False
    for data in node.dealer.recv_all():
        is_busy = True
        message = codec.decode(data)
        if isinstance(message, pb.Reject):
            raise RuntimeError(f"refused: {message}")
        node.is_welcome = True
        for cursor in message.cursors:
            node.acked[cursor.incarnation] = cursor.next_seq
            under_way = node.sizes[cursor.incarnation]
            while under_way and under_way[0][0] <= cursor.next_seq:
                node.in_flight -= under_way.popleft()[1]
    while node.is_welcome and node.queue and node.in_flight < WINDOW_BYTES and node.dealer.send(node.queue[0][0]):
        node.in_flight += node.queue.popleft()[1]
        is_busy = True
    return is_busy


def aggregator_alone(folder: Path, ranks: int, num_batches: int, steps_per_batch: int) -> dict[str, Any]:
    """Measure the aggregator on one core."""
    run_id = f"alone-{steps_per_batch}"
    job, info = declare(folder, run_id)
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    client = context.Process(target=play, args=(job, run_id, ranks, num_batches, steps_per_batch, result), daemon=True)
    client.start()
    result.get(timeout=600)  # encoded
    aggregator = start_helper("ddplog.aggregator.process", job)
    if len(cores) > 1:
        os.sched_setaffinity(aggregator.pid, cores[-1:])
        os.sched_setaffinity(client.pid, cores[:-1])
    measured = result.get(timeout=600)
    client.join(120)
    start = time.monotonic()
    code = aggregator.wait(120)
    steps = num_batches * steps_per_batch
    values = steps * ranks * len(KEYS)
    return {
        "values": values, "ranks": ranks, "steps_per_batch": steps_per_batch, **measured,
        "values_per_s": values / measured["seconds"],
        "values_per_cpu_s": values / max(measured["aggregator_cpu_s"], 0.01),
        "end_s": time.monotonic() - start, "exit_code": code,
        "store": check_points(info.run_dir, steps, ranks),
    }  # fmt: skip


# -- agent and aggregator


def feed(
    job: Path, ranks: list[int], world_size: int, steps: int, interval_s: float, go: Any, done: Any, up: Any
) -> None:
    """Be several ranks: write a journal for each, all at once or a step every interval_s, and hold their locks."""
    from ddplog.journal import spool
    from ddplog.journal.writer import JournalFullError, JournalWriter

    writers = []
    for rank in ranks:
        incarnation = secrets.token_bytes(16)
        identity = {
            "rank": rank, "world_size": world_size, "local_rank": rank, "local_world_size": world_size, "node_rank": 0,
            "launcher": "python", "pid": os.getpid(), "host": os.uname().nodename, "boot_id": spool.boot_id(),
            "run_id": job.name, "started_unix_ns": time.time_ns(),
        }  # fmt: skip
        writers.append(
            JournalWriter(
                job / f"{rank}.{incarnation.hex()}", incarnation, identity,
                segment_bytes=4 * 1024 * 1024, spool_bytes=1024**3, check=lambda: None,
            )
        )  # fmt: skip
    data = [dict(zip(KEYS, (rank + 0.1 * i for i in range(len(KEYS))), strict=True)) for rank in ranks]
    if interval_s:
        up.wait()
        go.wait()
    start = time.monotonic()
    for step in range(steps):
        if interval_s:
            time.sleep(max(0.0, start + step * interval_s - time.monotonic()))
        for writer, values in zip(writers, data, strict=True):
            if not writer.log_floats(values, step, 1.0) and writer.enter():
                try:
                    writer.append_scalars(KEYS, list(values.values()), step, 1.0)
                except JournalFullError as exc:
                    raise SystemExit(f"{exc}") from exc
                finally:
                    writer.leave()
    if not interval_s:
        up.wait()
    done.wait()
    for writer in writers:
        writer.close(finished=True)


def agent_and_aggregator(folder: Path, ranks: int, steps: int, interval_s: float) -> dict[str, Any]:
    """Measure agent and aggregator together, with real journals."""
    from ddplog.journal.reader import JournalReader

    run_id = "paced" if interval_s else "blocks"
    job, info = declare(folder, run_id)
    context = multiprocessing.get_context("spawn")
    go, done, up = context.Event(), context.Event(), context.Barrier(3)
    parts = [list(range(ranks))[i::2] for i in range(2)]
    feeders = [
        context.Process(target=feed, args=(job, part, ranks, steps, interval_s, go, done, up), daemon=True)
        for part in parts
    ]
    for feeder in feeders:
        feeder.start()
    up.wait(timeout=300)
    agent = start_helper("ddplog.agent.process", job)
    word = common.wait_until(lambda: read_announcement(job), 60, "the aggregator's address")
    readers = [JournalReader(path) for path in job.iterdir() if (path / "head").exists()]
    if interval_s:
        common.wait_until((info.run_dir / "run.db").exists, 60, "the store")
        time.sleep(1.0)  # connected and idle: what follows is the cost of the records
    pids = {"agent": agent.pid, "aggregator": word["pid"]}
    before = {name: common.cpu_s(pid) for name, pid in pids.items()}
    start = time.monotonic()
    go.set()
    common.wait_until(lambda: min(reader.acked_seq for reader in readers) >= steps + 1, 600, "every acknowledgement")
    seconds = time.monotonic() - start
    cpu = {name: common.cpu_s(pid) - before[name] for name, pid in pids.items()}
    peak = {name: common.peak_mib(pid) for name, pid in pids.items()}
    done.set()
    for feeder in feeders:
        feeder.join(60)
    code = agent.wait(120)
    for reader in readers:
        reader.close()
    values = steps * ranks * len(KEYS)
    return {
        "values": values, "ranks": ranks, "seconds": seconds, "values_per_s": values / seconds, "cpu_s": cpu,
        "cores": {name: used / seconds for name, used in cpu.items()}, "peak_mib": peak, "exit_code": code,
        "values_per_aggregator_cpu_s": values / max(cpu["aggregator"], 0.01),
        "store": check_points(info.run_dir, steps, ranks),
    }  # fmt: skip


# -- from log() to the store

_RANK = """
import sys, time, ddplog
run = ddplog.init(run_id=sys.argv[1])
steps, does_log = int(sys.argv[2]), run.rank == 0 or sys.argv[3] == "all"
start = time.monotonic()
for step in range(steps):
    time.sleep(max(0.0, start + step / 20 - time.monotonic()))
    if does_log:
        run.log({"sent_s": time.time()}, step=step)
"""
_LAUNCHER = """
import os, subprocess, sys
size = 4
ranks = [
    subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env={
        **os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
    })
    for r in range(size)
]
sys.exit(max(rank.wait() for rank in ranks))
"""


def latency(folder: Path, who: str, steps: int, learned_step: int) -> dict[str, Any]:
    """Measure from the last rank's log() to a reader's having the point, milliseconds.

    Args:
        folder: For the spool and the run.
        who: `all` ranks log, or `zero`: rank 0 only, of four.
        steps: At 20 a second.
        learned_step: Points below it are left out: those of the first 2 s wait for the helpers to start, and a rank that
            never logs is expected until its grace is over.
    """
    from ddplog.store.emissions import EmissionReader

    run_id = f"latency-{who}"
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env.update(DDPLOG_SPOOL=str(folder / "spool"), DDPLOG_DIR=str(folder / "runs"))
    job = subprocess.Popen([sys.executable, "-c", _LAUNCHER, _RANK, run_id, str(steps), who], env=env)
    run_dir = folder / "runs" / run_id
    common.wait_until((run_dir / "control.json").exists, 60, "the aggregator")
    reader = EmissionReader(run_dir)
    cursor, seen, delays = 0, 0, []
    counts: set[tuple[int, int]] = set()
    deadline = time.monotonic() + steps / 20 + 60
    while seen < steps and time.monotonic() < deadline:
        page = reader.page(cursor, 1000)
        now = time.time()
        for emission in page:
            cursor = emission.id
            if getattr(emission, "key", None) != "sent_s" or emission.revision:
                continue
            seen += 1
            if emission.step >= learned_step:
                delays.append((now - emission.max) * 1e3)
                counts.add((emission.n, emission.expected))
        time.sleep(0.002)
    reader.close()
    code = job.wait(60)
    common.wait_ended(run_dir)
    return {
        **common.spread(delays),
        "points": seen,
        "points_wanted": steps,
        "n_expected": sorted(counts),
        "exit_code": code,
    }


# -- everything


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Run the chosen parts."""
    ranks, is_quick = options.ranks, options.quick
    results: dict[str, Any] = {}
    if "aggregator" in options.parts:
        blocks, steps = (2, 40) if is_quick else (options.blocks, options.steps)
        results["aggregator_blocks"] = aggregator_alone(folder, ranks, blocks, _BLOCK_STEPS)
        results["aggregator_steps"] = aggregator_alone(folder, ranks, steps, 1)
    if "blocks" in options.parts:
        results["blocks"] = agent_and_aggregator(folder, ranks, 200 if is_quick else 20_000, 0.0)
    if "paced" in options.parts:
        results["paced"] = agent_and_aggregator(folder, ranks, 10 if is_quick else 250, 1 / options.pace)
        results["paced"]["steps_per_s"] = options.pace
    if "latency" in options.parts:
        results["latency_all"] = latency(folder, "all", 60 if is_quick else 400, 40)
        results["latency_zero"] = latency(folder, "zero", 230 if is_quick else 600, 215 if is_quick else 240)
    return results


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    alone = []
    for name, what, budget in (
        ("aggregator_blocks", "batches of 128 steps", _BLOCKS_BUDGET),
        ("aggregator_steps", "one step a batch", _STEPS_BUDGET),
    ):
        if name in results:
            found = results[name]
            figures = [
                common.si(found["values_per_s"]), common.si(found["values_per_cpu_s"]), f"{found['seconds']:.2f}",
                f"{found['aggregator_cpu_s']:.2f}", f"{found['aggregator_peak_mib']:.0f}", str(found["store"]["complete"]),
            ]  # fmt: skip
            title = f"{what}, {found['ranks']} ranks x {len(KEYS)}"
            alone.append(common.Row(title, figures, f"≥ {common.si(budget)} values/s", found["values_per_s"] >= budget))
    if alone:
        columns = ("values/s", "per CPU s", "s", "CPU s", "peak MiB", "store complete")
        common.show("The aggregator alone, on one core: durable, CURVE", columns, alone)
    both = []
    for name, what in (("blocks", "all there at once"), ("paced", "one step at a time")):
        if name in results:
            found = results[name]
            pace = f" at {found['steps_per_s']:g} steps/s" if "steps_per_s" in found else ""
            figures = [
                common.si(found["values_per_s"]), common.si(found["values_per_aggregator_cpu_s"]),
                f"{found['cores']['agent']:.2f}", f"{found['cores']['aggregator']:.2f}",
                f"{found['peak_mib']['agent']:.0f}", f"{found['peak_mib']['aggregator']:.0f}", str(found["store"]["complete"]),
            ]  # fmt: skip
            both.append(common.Row(f"{what}{pace}, {found['ranks']} ranks x {len(KEYS)}", figures))
    if both:
        columns = (
            "values/s",
            "per aggr. CPU s",
            "agent cores",
            "aggr. cores",
            "agent MiB",
            "aggr. MiB",
            "store complete",
        )
        common.show("Agent and aggregator, and the ranks, on the same cores", columns, both)
    delays = []
    for name, what in (("latency_all", "4 ranks, all log"), ("latency_zero", "4 ranks, rank 0 logs, once learned")):
        if name in results:
            found = results[name]
            figures = [
                *(f"{found[key]:.0f}" for key in ("p50", "p99", "max")),
                f"{found['points']}",
                str(found["n_expected"]),
            ]
            delays.append(common.Row(what, figures, f"p50 ≤ {_LATENCY_BUDGET_MS}", found["p50"] <= _LATENCY_BUDGET_MS))
    if delays:
        common.show(
            "From log() to the store, at 20 steps/s, ms", ("p50", "p99", "max", "points", "(n, expected)"), delays
        )


def main() -> None:
    """Run the benchmark."""
    parts = ("aggregator", "blocks", "paced", "latency")
    parser = common.parser("Measure the agent and the aggregator.")
    parser.add_argument("--parts", default=",".join(parts), help=f"which of {','.join(parts)} (default all)")
    parser.add_argument("--ranks", type=int, default=64, help="simulated ranks (default 64)")
    parser.add_argument("--blocks", type=int, default=160, help="batches of 128 steps per rank (default 160)")
    parser.add_argument("--steps", type=int, default=5_000, help="batches of one step per rank (default 5,000)")
    parser.add_argument("--pace", type=float, default=20, help="steps a second in `paced` (default 20)")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    with common.workspace() as folder:
        results = measure(folder, options)
    report(results)
    common.write("bench_ingest", options.out, results, is_quick=options.quick)


if __name__ == "__main__":
    main()
