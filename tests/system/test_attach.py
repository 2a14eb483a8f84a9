"""attach() in real jobs of several processes: gradients untouched, norms of sharded models, and who held up the others."""

import json
from pathlib import Path

import numpy as np
import pytest
from system.jobs import DDPLOG

pytest.importorskip("torch")
from system.attach_jobs import BITS_STEPS, OFFSET

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

NUM_BYTES = 4.0 * (16 * 32 + 32 + 2 * 32 + 32 * 32 + 32 + 2 * (32 * 4 + 4))
SCRIPT = str(Path(__file__).with_name("attach_jobs.py"))


def run_job(job, world_size, name, **environ):
    """Run one of the scripts; return what each rank wrote."""
    out = job.folder / "out"
    job.run(*job.torchrun(world_size, SCRIPT, name, str(out)), timeout_s=200, **environ)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_gradients_are_bit_for_bit_the_same(job, world_size):
    """Over 50 steps, of DDP's own reduction and of every hook; three ranks, for which 1/n is no exact number."""
    found = run_job(job, world_size, "bits")

    for of_rank in found:
        assert {name: row["gradients"] - row["same"] for name, row in of_rank.items()} == dict.fromkeys(of_rank, 0)
        assert {row["errors"] for row in of_rank.values()} == {0}
        assert {row["gradients"] for row in of_rank.values()} == {BITS_STEPS * 10}
    with job.open() as run:
        for number, name in enumerate(found[0]):
            points = of_variant(run, number)
            for key in ("perf/wait_s", "perf/comm_exposed_s", "perf/backward_s", "optim/grad_norm"):
                assert len(points[key]) == BITS_STEPS, (name, key)
                assert (points[key].n == world_size).all()
                assert (points[key].min >= 0).all()
            # DDP has its buckets after the first steps, and an unused parameter may be all of the first one.
            assert len(points["perf/comm_s"]) >= BITS_STEPS - 6, name
            assert set(points["perf/comm_bytes"].value.tolist()) == {NUM_BYTES}
            assert (points["perf/comm_buckets"].value == 1).all() == (name == "powersgd")
            norm = points["optim/grad_norm"]
            np.testing.assert_array_equal(norm.min, norm.max, err_msg=f"{name}: replicated, so all ranks have the same")


def of_variant(run, number):
    """Return the points of one variant's steps, by metric."""
    found = {}
    for row in run.metrics():
        metric = run.metric(row.key)
        found[row.key] = metric.take((metric.step >= number * OFFSET) & (metric.step < (number + 1) * OFFSET))
    return found


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("sharded", 2),
        pytest.param("hybrid", 4, marks=pytest.mark.nightly),
        pytest.param("replicated", 2, marks=pytest.mark.nightly),
    ],
)
def test_the_norm_of_a_sharded_model_is_that_of_the_full_one(job, kind, world_size):
    found = run_job(job, world_size, "norms", KIND=kind)

    assert found == [found[0]] * world_size
    with job.open() as run:
        for number, (name, expected) in enumerate(found[0].items()):
            norm = of_variant(run, number)["optim/grad_norm"]
            np.testing.assert_allclose(norm.value, expected, rtol=1e-5, err_msg=name)
        keys = set(run.keys())
        assert {"perf/forward_s", "perf/backward_s", "perf/optimizer_s", "perf/step_s"} <= keys
        assert "perf/wait_s" not in keys  # FSDP communicates inside forward and backward: not to be told apart here


@pytest.mark.parametrize(("late", "with_loader"), [(0, ""), pytest.param(1, "1", marks=pytest.mark.nightly)])
def test_the_rank_that_sleeps_in_its_loader_is_named(job, late, with_loader):
    """Rank 0 late is another case: the others then wait in DDP's broadcast of buffers, in forward, not in backward."""
    run_job(job, 2, "straggler", LATE=str(late), LATE_S="0.1", WITH_LOADER=with_loader)
    job.open().close()

    said, _ = job.run(*DDPLOG, "show", str(job.run_dir), "--json")
    (found,) = json.loads(said)["stragglers"]
    assert (found["rank"], found["cause"], found["num_compared"]) == (late, "waiting for data", 50)
    assert found["num_steps"] >= 20
    assert found["mean_s"] >= 0.05
    shown, _ = job.run(*DDPLOG, "show", str(job.run_dir))
    row = shown[shown.index("\nStragglers") :].splitlines()[3].split()
    assert row[0] == str(late)
    assert row[-3:] == ["waiting", "for", "data"]
