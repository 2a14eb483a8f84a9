"""A script under the wrong launcher: every process trains alone, says so to nobody, and ddplog names it."""

import sys

import pytest
from horovod_jobs import HOROVODRUN, needs_horovod, use_venv

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

HOROVOD = """
import sys
import horovod.torch as hvd
import torch
import ddplog
import ddplog.horovod
if sys.argv[1] == "hvd first":
    hvd.init()
run = ddplog.init()
hvd.init()
model = torch.nn.Linear(2, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
ddplog.horovod.attach(hvd, optimizer)
for step in range(20):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.log({"loss": run.rank}, step=step)
"""
TORCH = """
import os
import torch.distributed as dist
import ddplog
if "RANK" in os.environ:
    dist.init_process_group("gloo")
run = ddplog.init()
for step in range(20):
    run.log({"loss": run.rank}, step=step)
"""


def alerts(run):
    return [event for event in run.events() if event.kind == "alert"]


def check_points(run):
    """Everything is in one run, under the launcher's ranks."""
    loss = run.metric("loss")
    assert loss.step.tolist() == list(range(20))
    assert set(loss.n.tolist()) == {2}
    assert (set(loss.min_rank.tolist()), set(loss.max_rank.tolist())) == ({0}, {1})


@needs_horovod
@pytest.mark.services
@pytest.mark.parametrize(("order", "starter"), [("hvd first", "torchrun"), ("ddplog first", "env")])
def test_a_horovod_script_under_another_launcher(job, order, starter):
    """Named by init() where Horovod is initialised before it, else by attach(); once in both cases."""
    start = job.torchrun if starter == "torchrun" else job.ranks
    _, err = job.run(*start(2, job.script(HOROVOD), order), timeout_s=150)

    assert err.count(f"RuntimeWarning: ddplog: the job is split: {starter} started 2 separate trainings") == 1
    assert "ddplog run -- horovodrun -np 2 python" in err
    assert f"train.py:{9 if order == 'hvd first' else 13}: RuntimeWarning" in err, "at the user's own line"
    with job.open() as run:
        check_points(run)
        (event,) = alerts(run)
        assert (event.level, event.rank) == ("error", 0)
        assert "Horovod is alone in each of the processes" in event.message


@needs_horovod
@pytest.mark.services
def test_a_rank_that_elastic_horovod_has_renumbered(job):
    """A job that has shrunk to one rank is no split one, but ddplog.init() knows the rank and the size of before."""
    _, err = job.run(*job.ranks(2, job.script(HOROVOD), "ddplog first"), HOROVOD_ELASTIC="1", timeout_s=150)

    assert err.count("RuntimeWarning: ddplog: the rank is out of date") == 1
    assert "joined as rank 0 of 2, and this is now Horovod's rank 0 of 1" in err
    assert "again in the function that hvd.elastic.run wraps" in err
    with job.open() as run:
        (event,) = alerts(run)
        assert (event.level, event.rank) == ("error", 0)


@needs_horovod
@pytest.mark.services
def test_a_torchrun_script_started_by_horovodrun(job):
    out, err = use_venv(job).run(*HOROVODRUN, "-np", "2", "python", job.script(TORCH), timeout_s=150)

    assert (out + err).count("RuntimeWarning: ddplog: the job may be split: horovodrun started 2 processes") == 1
    with job.open() as run:
        check_points(run)
        (event,) = alerts(run)
        assert (event.level, event.rank) == ("warning", 0)
        assert "torchrun --nproc-per-node 2" in event.message


def test_a_pod_of_a_pytorchjob(job):
    """Not by its number alone: the other pods' processes are on other nodes, and nobody else is here."""
    script = job.script("import ddplog\nddplog.init().log({'loss': 1.0}, step=0)\n")
    pod = {"RANK": "0", "WORLD_SIZE": "2", "PET_NPROC_PER_NODE": "auto", "PET_NNODES": "2", "PET_NODE_RANK": "0"}
    _, err = job.run(sys.executable, script, **pod)
    _, quiet = job.run(sys.executable, script, **pod | {"PET_NPROC_PER_NODE": "1", "DDPLOG_RUN_ID": "r2"})

    assert "RuntimeWarning: ddplog: RANK is the pod's: RANK=0 and WORLD_SIZE=2 are given without LOCAL_RANK" in err
    assert quiet == ""
    _, strict = job.run(sys.executable, script, **pod, PYTHONWARNINGS="error", DDPLOG_RUN_ID="r3")
    assert "ddplog: RANK is the pod's" in strict, "in the log, where every warning is an error"
    assert "Traceback" not in strict
    with job.open() as run:
        (event,) = alerts(run)
        assert event.level == "warning"
        assert [(writer.rank, writer.world_size) for writer in run.writers()] == [(0, 2)]
