"""ddplog.horovod: what attach() measures in a real job of two ranks, that it changes no gradient, and the callback."""

import copy
import json
import pickle

import pytest
from horovod_jobs import HOROVODRUN, needs_horovod, use_venv
from system.jobs import Job

from ddplog import horovod
from ddplog.errors import UsageError
from ddplog.horovod import Attached, MetricAverageCallback

STEPS = 50
WARM_UP = 5
"""Steps after which the slow rank begins to be slow: both have loaded everything by then."""

TRAIN = """
import copy, hashlib, json, pickle, sys, time
import torch
import horovod.torch as hvd
import ddplog
import ddplog.horovod

STEPS, WARM_UP = int(sys.argv[1]), int(sys.argv[2])
hvd.init()
run = ddplog.init()
bad = []

def train(compression, sync_first, measured):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if measured:
        try:
            ddplog.horovod.attach(hvd, plain)
        except ddplog.UsageError as exc:
            bad.append(str(exc))
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters(), compression=compression)
    before = dict(vars(optimizer))
    if measured:
        first = ddplog.horovod.attach(hvd, optimizer, model=model)
        handle = ddplog.horovod.attach(hvd, optimizer, model=model, first_step=measured - 1)
        copy.deepcopy(model)(torch.ones(1, 8)).sum().backward()  # a copy's work is not this model's
        pickle.loads(pickle.dumps(model))
        assert "off" in repr(first) and "on" in repr(handle)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # makes a step of its own, which is none
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)  # wraps optimizer.step
    digest = hashlib.sha256()
    data = torch.Generator().manual_seed(hvd.rank())
    for step in range(STEPS):
        if measured and hvd.rank() == 1 and step >= WARM_UP:
            time.sleep(0.02)
        points = torch.randn(4, 8, generator=data)
        optimizer.zero_grad()
        model(points).square().mean().backward()
        if sync_first:
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        scheduler.step()
        for weights in model.parameters():
            digest.update(weights.grad.numpy().tobytes())
            digest.update(weights.detach().numpy().tobytes())
    if measured:
        handle.detach()
        handle.detach()
        left = {name for name, value in vars(optimizer).items() if before.get(name) is not value}
        assert left <= {"step", "_opt_called"}, left  # the scheduler's
        assert not model._forward_hooks and not model._forward_pre_hooks and not optimizer._optimizer_step_post_hooks
        optimizer.zero_grad()
        model(points).square().mean().backward()
        optimizer.step()  # not counted
    return digest.hexdigest()

found = {}
for name, compression, sync_first, first in (
    ("plain", hvd.Compression.none, False, 0), ("fp16, clipped", hvd.Compression.fp16, True, STEPS)
):
    found[name] = [train(compression, sync_first, 0), train(compression, sync_first, first + 1)]
print("FOUND", json.dumps({"rank": hvd.rank(), "digests": found, "bad": bad}), flush=True)
hvd.shutdown()
"""


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """Train twice with and twice without; return the run, and what each rank printed."""
    job = use_venv(Job(tmp_path_factory.mktemp("job")))
    try:
        script = job.script(TRAIN)
        out, _ = job.run(*HOROVODRUN, "-np", "2", "python", script, str(STEPS), str(WARM_UP), timeout_s=200)
        found = [json.loads(line.partition("FOUND ")[2]) for line in out.splitlines() if "FOUND" in line]
        with job.open() as run:
            yield run, sorted(found, key=lambda one: one["rank"])
    finally:
        job.close()


@needs_horovod
@pytest.mark.services
@pytest.mark.system
@pytest.mark.timeout(240)
class TestAttach:
    def test_gradients_and_weights_are_bit_identical_with_and_without(self, attached):
        """50 steps of momentum would show one wrong bit in the first."""
        _, found = attached
        assert [one["rank"] for one in found] == [0, 1]
        for one in found:
            assert set(one["digests"]) == {"plain", "fp16, clipped"}
            for without, with_ in one["digests"].values():
                assert without == with_
        assert found[0]["digests"]["plain"] != found[0]["digests"]["fp16, clipped"]

    def test_every_step_has_every_metric_of_both_ranks(self, attached):
        run, _ = attached
        every = {"perf/wait_s", "perf/optimizer_s", "perf/comm_bytes", "perf/comm_s", "perf/forward_s",
                 "perf/backward_s", "optim/lr", "optim/grad_norm"}  # fmt: skip
        assert {metric.key for metric in run.metrics()} == every | {"perf/step_s", "perf/samples_per_s", "perf/data_s"}
        for key in every:
            metric = run.metric(key)
            assert metric.step.tolist() == list(range(2 * STEPS)), key
            assert set(metric.n.tolist()) == {2}, key
        firsts = {0, STEPS}  # of each attach(): no step ended before
        for key in ("perf/step_s", "perf/data_s"):
            assert run.metric(key).step.tolist() == [s for s in range(2 * STEPS) if s not in firsts], key

    def test_the_rank_that_the_others_wait_for_waits_least_itself(self, attached):
        """Which is how `ddplog show` finds it: min_rank of perf/wait_s."""
        run, _ = attached
        metric = run.metric("perf/wait_s")
        slow = (metric.step % STEPS) >= WARM_UP
        assert (metric.min_rank[slow] == 1).mean() > 0.5
        assert (metric.max[slow] > 0.01).mean() > 0.5

    def test_the_time_before_the_forward_pass_is_the_datas(self, attached):
        """Which is what `ddplog show` says takes the slow rank longer."""
        run, _ = attached
        metric = run.metric("perf/data_s")
        slow = (metric.step % STEPS) >= WARM_UP
        assert (metric.max_rank[slow] == 1).mean() > 0.5
        assert (metric.max[slow] >= 0.02).all()

    def test_the_parts_of_a_step_are_within_it(self, attached):
        run, _ = attached
        step_s = run.metric("perf/step_s")
        for key in (
            "perf/data_s",
            "perf/forward_s",
            "perf/backward_s",
            "perf/optimizer_s",
            "perf/comm_s",
            "perf/wait_s",
        ):
            part = run.metric(key)
            kept = [index for index, step in enumerate(part.step.tolist()) if step in step_s.step]
            assert (part.min > 0).all(), key
            assert (part.mean[kept] <= step_s.mean).all(), key
        assert (run.metric("perf/wait_s").mean <= run.metric("perf/comm_s").mean).all()

    def test_bytes_are_those_that_are_sent_and_samples_those_of_all_ranks(self, attached):
        run, _ = attached
        num_weights = 8 * 16 + 16 + 16 + 1
        sent = run.metric("perf/comm_bytes")
        assert sent.value.tolist() == [4 * num_weights] * STEPS + [2 * num_weights] * STEPS
        rate, step_s = run.metric("perf/samples_per_s"), run.metric("perf/step_s")
        assert (rate.min <= 4 / step_s.min).all()
        assert (rate.value > rate.max).all(), "the sum over ranks"

    def test_the_norm_is_that_of_averaged_gradients_and_the_rate_the_schedulers(self, attached):
        run, _ = attached
        norm, rate = run.metric("optim/grad_norm"), run.metric("optim/lr")
        assert (norm.min == norm.max).all(), "averaged gradients are the same on all ranks"
        assert (norm.value > 0).all()
        assert rate.value.tolist() == [0.05 * 0.5 ** (step % STEPS // 10) for step in range(2 * STEPS)]

    def test_a_plain_optimizer_is_refused_with_what_to_give(self, attached):
        _, found = attached
        for one in found:
            assert len(one["bad"]) == 2
            assert "must be what hvd.DistributedOptimizer() returned, not a plain SGD" in one["bad"][0]


EPOCHS = """
import os, sys
import ddplog
import ddplog.horovod
assert "torch" not in sys.modules and "keras" not in sys.modules and "horovod" not in sys.modules
run = ddplog.init()
by_number = ddplog.horovod.MetricAverageCallback(weight=90 if run.rank == 0 else 10)
by_logs = ddplog.horovod.MetricAverageCallback(weight=lambda logs: logs["num"], prefix="by_logs/")
for callback in (by_number, by_logs):
    callback.set_model(None)
    callback.set_params({})
    callback.on_train_begin()
    callback.on_epoch_begin(0, logs=None)
for epoch in range(3):
    logs = {"loss": 1.0 + run.rank, "num": 90 if run.rank == 0 else 10}
    if run.rank == 0:
        logs["only_here"] = 7.0  # Horovod's own would hang
    for callback in (by_number, by_logs):
        callback.on_epoch_end(epoch, logs)
    assert logs["loss"] == 1.0 + run.rank
by_number.on_epoch_end(3)
"""


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.close()


@pytest.mark.system
def test_the_callback_averages_by_weight_without_a_collective_and_leaves_the_logs_alone(job):
    """Horovod's own gives 1.5, overwrites `logs`, and needs every rank to have the same names at the same time."""
    job.run(*job.ranks(2, job.script(EPOCHS)))

    with job.open() as run:
        for key in ("epoch/loss", "by_logs/loss"):
            loss = run.metric(key)
            assert loss.step.tolist() == [0, 1, 2]
            assert loss.value.tolist() == pytest.approx([(90 * 1 + 10 * 2) / 100] * 3)
            assert (set(loss.n.tolist()), set(loss.max_rank.tolist())) == ({2}, {1})
        assert set(run.metric("epoch/only_here").value.tolist()) == {7.0}


def test_the_callback_has_no_other_attributes():
    callback = MetricAverageCallback()

    assert callback.on_batch_end(3, logs={}) is None
    with pytest.raises(AttributeError, match="'MetricAverageCallback' object has no attribute 'model'"):
        callback.model  # noqa: B018


def test_without_init_both_say_what_to_do(monkeypatch):
    monkeypatch.setattr("ddplog.worker.current.run", None)

    with pytest.raises(UsageError, match=r"ddplog\.init\(\)"):
        horovod.attach(None, None)
    with pytest.raises(UsageError, match=r"ddplog\.init\(\)"):
        MetricAverageCallback().on_epoch_end(0, {"loss": 1.0})


def test_what_is_copied_with_a_model_is_off():
    handle = Attached(None, object(), object(), None, 7)

    for copied in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert repr(copied) == "<ddplog.horovod.Attached off next_step=0>"
