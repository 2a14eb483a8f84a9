"""Every rank's metrics arrive as one coherent run: one point per key and step, with the right n, expected and mean."""

import json
import math
import statistics
import time

import pytest
from event_files import read_scalars
from system.jobs import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NUM_STEPS = 1000

DDP = """
import json, os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
import ddplog

def sockets():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink("/proc/self/fd/" + fd))
        except OSError:
            pass
    return sorted(link for link in links if link.startswith("socket:"))

rank, world, steps = dist.get_rank(), dist.get_world_size(), int(sys.argv[1])
generator = torch.Generator().manual_seed(rank)
values = torch.rand(steps, dtype=torch.float64, generator=generator) + 0.5
weights = torch.rand(steps, dtype=torch.float64, generator=generator) * 100
before = len(os.listdir("/proc/self/task")), sockets()
run = ddplog.init(sinks=("jsonl", "tensorboard"))
run.define_metric("tokens", reduce="sum")
for step in range(steps):
    run.log({"loss": values[step].item(), "tokens": float(rank + step)}, step=step, weight=weights[step].item())
    if rank in (1, 3):
        run.log({"only_1_and_3": float(rank + step)}, step=step)
    if rank < 3 or step % 2 == 0:
        run.log({"rank_3_at_even": float(rank)}, step=step)
    if step % 7 == rank:
        run.log({"one_rank": float(step)}, step=step)
after = len(os.listdir("/proc/self/task")), sockets()
assert before == after, (before, after)
for name in ("zmq", "grpc", "sqlite3", "google.protobuf"):
    assert name not in sys.modules, name
numerator, denominator = values * weights, weights.clone()
dist.all_reduce(numerator)
dist.all_reduce(denominator)
if rank == 0:
    json.dump((numerator / denominator).tolist(), open("mean.json", "w"))
dist.destroy_process_group()
"""


def test_four_ddp_ranks_make_one_run(job):
    """The whole promise at once, with torchrun and DDP's own all_reduce as the judge."""
    job.run(*job.torchrun(4, job.script(DDP), str(NUM_STEPS)), timeout_s=90)
    with job.open() as run:
        assert (run.status, run.detail) == ("finished", "")
        assert {(writer.rank, writer.state) for writer in run.writers()} == {(rank, "finished") for rank in range(4)}
        _check_means(run.metric("loss"), json.loads((job.folder / "mean.json").read_text()))
        _check_keys_of_some_ranks(run)
        assert run.metric("tokens").value.tolist() == [4 * step + 6 for step in range(NUM_STEPS)]
        assert run.drops() == ()
        stored = {key: run.metric(key) for key in sorted(run.keys())}
    _check_jsonl(job, stored)
    _check_tensorboard(job, stored)


def _check_means(loss, means):
    assert loss.step.tolist() == list(range(NUM_STEPS))
    assert set(loss.n.tolist()) == set(loss.expected.tolist()) == {4}
    worst = max(abs(ours - theirs) / theirs for ours, theirs in zip(loss.value.tolist(), means, strict=True))
    assert worst <= 1e-12


def _check_keys_of_some_ranks(run):
    two = run.metric("only_1_and_3")
    assert two.step.tolist() == list(range(NUM_STEPS))
    assert set(two.n.tolist()) == {2}
    assert two.value.tolist() == [step + 2.0 for step in range(NUM_STEPS)]
    assert set(two.expected[10:].tolist()) == {2}, "a rank leaves after passing three steps without the key"
    even = run.metric("rank_3_at_even")
    assert even.n.tolist() == [4 - step % 2 for step in range(NUM_STEPS)]
    assert set(even.expected.tolist()) == {4}, "a rank that has it at every other step stays expected"
    one = run.metric("one_rank")
    assert one.step.tolist() == one.value.tolist() == [step for step in range(NUM_STEPS) if step % 7 < 4]
    assert set(one.n.tolist()) == {1}


def _check_jsonl(job, stored):
    points = job.jsonl()
    assert [point["id"] for point in points] == sorted({point["id"] for point in points})
    found = {(p["key"], p["step"]): p["value"] for p in points}
    wanted = {
        (key, step): value
        for key, metric in stored.items()
        for step, value in zip(metric.step.tolist(), metric.value.tolist(), strict=True)
    }
    assert found == wanted
    assert len(points) == len(wanted), "a point went twice"


def _check_tensorboard(job, stored):
    series = read_scalars(job.run_dir / "sinks" / "tensorboard")
    assert set(series) == set(stored)
    for key, metric in stored.items():
        assert [step for step, _ in series[key]] == metric.step.tolist(), key
        for (_, shown), value in zip(series[key], metric.value.tolist(), strict=True):
            assert math.isclose(shown, value, rel_tol=1e-6)  # TensorBoard keeps float32


RANK_ZERO_ONLY = """
import os, sys, time
import ddplog
rank = int(os.environ["RANK"])
if rank == 0 or sys.argv[1] == "init":
    run = ddplog.init()
if rank == 0:
    for step in range(60):
        run.log({"logged_at": time.time()}, step=step)
        time.sleep(0.05)  # a training step
"""


@pytest.mark.parametrize("others", ["init", "nothing"])
def test_a_script_that_logs_on_rank_0_only_has_n_and_expected_1(job, others, record_property):
    """Most scripts are written so; three silent ranks must neither hold the points back nor look missing."""
    process = job.start(*job.ranks(4, job.script(RANK_ZERO_ONLY), others), DDPLOG_GRACE_S="0.5")
    seen = {}

    def has_ended():
        now = time.time()
        for step, logged_at in job.peek("logged_at"):
            seen.setdefault(step, now - logged_at)
        return process.poll() is not None

    wait_until(has_ended)
    job.end(process)
    with job.open() as run:
        points = run.metric("logged_at")
        assert points.step.tolist() == list(range(60))
        assert set(points.n.tolist()) == set(points.expected.tolist()) == {1}
        assert run.status == "finished"
    latencies_s = [latency for step, latency in seen.items() if step >= 30]  # after the grace time, not at the end
    median_s = statistics.median(latencies_s)
    record_property("latency_p50_s", round(median_s, 3))
    assert median_s < 5  # a measurement belongs into a benchmark; this is for a stall


EPOCHS = """
import os, time
import ddplog
rank = int(os.environ["RANK"])
run = ddplog.init()
run.define_metric("val/*", reduce="mean")
for epoch in range(10):
    for batch in range(50):
        step = epoch * 50 + batch
        run.log({"loss": float(rank * step)}, step=step)
    time.sleep(0.05 * rank)  # validation takes its time, not the same on every rank
    run.log({"val/loss": rank + epoch / 2.0, "val/acc": rank / 4.0}, step=epoch, weight=float(rank + 1))
"""


def test_epochwise_validation_beside_stepwise_training_is_one_point_each(job):
    """Validation at step=epoch lies far below the watermark: late, and yet one point with every rank in it."""
    job.run(*job.ranks(4, job.script(EPOCHS)), DDPLOG_SINKS="jsonl", DDPLOG_LATE_S="20")
    with job.open() as run:
        assert run.metric("loss").step.tolist() == list(range(500))
        for key in ("loss", "val/loss", "val/acc"):
            points = run.metric(key)
            assert set(points.n.tolist()) == set(points.expected.tolist()) == {4}, key
            assert set(points.revision.tolist()) == {0}, key
        loss = run.metric("val/loss")
        assert loss.step.tolist() == list(range(10))
        assert loss.value.tolist() == pytest.approx([2 + epoch / 2 for epoch in range(10)], rel=1e-12)
    lines = [(point["key"], point["step"]) for point in job.jsonl()]
    assert len(lines) == len(set(lines)) == 520
