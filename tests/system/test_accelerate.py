"""A real Accelerator on two ranks: its log() is for the main process, and attach() takes it to every rank."""

import pytest
from system.jobs import wait_until

pytest.importorskip("torch")

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

TRAIN = """
import sys
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
import ddplog
from ddplog.accelerate import DdplogTracker, attach


class Other(GeneralTracker):
    name, requires_logging_directory, tracker = "other", False, None
    num_calls = 0

    def log(self, values, step=None, **kwargs):
        self.num_calls += 1


other = Other()
accelerator = attach(Accelerator(cpu=True, log_with=other))
rank = accelerator.process_index
accelerator.init_trackers("digits", config={"lr": 0.125})
run = accelerator.get_tracker("ddplog", unwrap=True)
assert (run.rank, run.world_size) == (rank, 2)
model = accelerator.prepare(torch.nn.Linear(2, 1))
for step in range(5):
    loss = model(torch.full((3, 2), float(rank))).pow(2).mean()
    accelerator.backward(loss)
    values = {"loss": loss, "rank": rank, "note": f"rank {rank}"}
    accelerator.log(values, step=step, log_kwargs={"ddplog": {"weight": 1 + rank}})
assert other.num_calls == (0 if rank else 5)
accelerator.end_training()

ddplog.init(run_id="r2")
alone = Accelerator(cpu=True, log_with=DdplogTracker())
alone.init_trackers("digits")
alone.log({"rank": 1.0}, step=0)
"""


def test_what_an_accelerator_is_given_on_every_rank_is_one_point_a_step(job):
    """Without attach() only rank 0 arrives, and the tracker says so."""
    _, err = job.run(*job.torchrun(2, job.script(TRAIN)), timeout_s=200, DDPLOG_RUN_ID=None)
    job.run_dir = job.runs / "r2"
    with job.open() as run:
        points = run.metric("rank")
        assert (points.n.tolist(), {writer.rank for writer in run.writers()}) == ([1], {0, 1})
    assert err.count("reaches this tracker on rank 0 only") == 1

    job.run_dir = wait_until(lambda: next((path for path in job.runs.iterdir() if path.name != "r2"), None))
    with job.open() as run:
        assert (run.project, run.status) == ("digits", "finished")
        rank = run.metric("rank")
        assert rank.step.tolist() == list(range(5))
        assert rank.n.tolist() == [2] * 5
        assert rank.value.tolist() == pytest.approx([2 / 3] * 5)
        assert run.metric("loss").n.tolist() == [2] * 5
        assert {(param.name, param.value) for param in run.params()} == {("lr", 0.125)}
        texts = {(text.rank, text.key, text.text) for text in run.texts()}
        assert run.drops() == ()
    assert texts == {(0, "note", "rank 0"), (1, "note", "rank 1")}
