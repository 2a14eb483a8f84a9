"""horovodrun and mpirun for real: one coherent run of all ranks, whoever starts them, and the truth about how it ended."""

import os
import shutil
from pathlib import Path

import pytest
from horovod_jobs import HOROVODRUN, needs_horovod, use_venv
from system.jobs import DDPLOG

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.timeout(180)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits_horovod.py"
LOG = """
import sys
import ddplog
run = ddplog.init()
for step in range(50):
    run.log({"loss": run.rank, "world": run.world_size}, step=step)
if run.rank == 1 and len(sys.argv) > 1:
    sys.exit(int(sys.argv[1]))
"""
ELASTIC = """
import sys, time
import horovod.torch as hvd
import torch
import ddplog
import ddplog.horovod
hosts = sys.argv[1]
hvd.init()
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters())

@hvd.elastic.run
def train(state):
    run = ddplog.init()
    ddplog.horovod.attach(hvd, optimizer)
    while not (hvd.size() == 2 and state.num_after == 10):
        run.set_step(state.step)
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        run.log({"size": hvd.size(), "rank_sum": hvd.rank()})
        state.step += 1
        state.num_after += hvd.size() == 2
        if state.step == 10 and hvd.rank() == 0:
            with open(hosts, "w") as file:
                file.write("localhost:2")
        state.commit()
        time.sleep(0.05)

train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, num_after=0))
"""

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="mpirun is not installed: apt-get install openmpi-bin"
)


def check_ranks(run, world_size):
    loss = run.metric("loss")
    assert loss.step.tolist() == list(range(50))
    assert set(loss.n.tolist()) == {world_size}
    assert set(loss.value.tolist()) == {(world_size - 1) / 2}
    assert (set(loss.min_rank.tolist()), set(loss.max_rank.tolist())) == ({0}, {world_size - 1})
    assert set(run.metric("world").value.tolist()) == {world_size}
    assert sorted(writer.rank for writer in run.writers()) == list(range(world_size))


@needs_horovod
def test_ddplog_run_around_horovodrun_ends_as_horovodrun_does(job):
    """horovodrun itself ends with 1 when a rank ended with 3."""
    words = (*HOROVODRUN, "-np", "2", "python", job.script(LOG), "3")
    use_venv(job).run(*DDPLOG, "run", "--run-id", "r1", "--quiet", "--", *words, code=1, timeout_s=150)
    with job.open() as run:
        check_ranks(run, 2)
        assert (run.status, run.detail) == ("failed", "exit code 1")


@needs_horovod
def test_the_example_trains_and_names_its_straggler(job):
    words = ("-np", "2", "python", str(EXAMPLE), "--epochs", "2", "--slow-rank", "1")
    use_venv(job).run(*DDPLOG, "run", "--", *HOROVODRUN, *words, timeout_s=150)
    with job.open() as run:
        loss, wait_s = run.metric("loss"), run.metric("perf/wait_s")
        assert len(loss) == len(wait_s) == 2 * 23
        assert set(loss.n.tolist()) == set(wait_s.n.tolist()) == {2}
        assert loss.mean[-5:].mean() < 0.7 * loss.mean[:5].mean()
        assert (wait_s.min_rank == 1).mean() > 0.5
        assert run.metric("epoch/valid_acc").step.tolist() == [0, 1]
        assert run.status == "finished"


@needs_mpirun
def test_mpirun_of_openmpi(job):
    words = ("mpirun", "--oversubscribe", *(("--allow-run-as-root",) if os.getuid() == 0 else ()), "-np", "4")
    use_venv(job).run(*words, "python", job.script(LOG))
    with job.open() as run:
        check_ranks(run, 4)
        assert run.status == "finished"


@needs_horovod
def test_elastic_horovod_that_is_resized_is_one_run_with_an_attempt_per_size(job):
    """The ranks that stay are told their new numbers by Horovod alone: their environment is that of the start."""
    hosts, discovery = job.folder / "hosts", job.folder / "discover.sh"
    hosts.write_text("localhost:1")
    discovery.write_text(f"#!/bin/sh\ncat '{hosts}'\n")
    discovery.chmod(0o755)
    script = job.script(ELASTIC)
    elastic = ("-np", "1", "--min-np", "1", "--max-np", "2", "--host-discovery-script", str(discovery))
    use_venv(job).run(*HOROVODRUN, *elastic, "--network-interface", "lo", "python", script, str(hosts), timeout_s=150)

    with job.open() as run:
        assert [attempt.world_size for attempt in run.attempts] == [1, 2]
        size, wait_s = run.metric("size"), run.metric("perf/wait_s")
        first = int((size.attempt == 0).sum())
        assert first >= 10
        assert size.step.tolist() == wait_s.step.tolist() == list(range(first + 10))
        assert size.value.tolist() == [1] * first + [2] * 10
        assert size.n.tolist() == [1] * first + [2] * 10
        assert sorted((w.attempt, w.rank, w.world_size) for w in run.writers()) == [(0, 0, 1), (1, 0, 2), (1, 1, 2)]
        assert not [event for event in run.events() if event.kind in ("alert", "duplicate_rank", "death")]
        assert run.status == "finished"
