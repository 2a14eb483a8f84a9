"""A real Trainer on two ranks, started by torchrun and by Lightning itself, with both names of the package."""

import sys

import pytest

pytest.importorskip("torch")

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]  # two imports of Lightning on a loaded machine

TRAIN = """
import sys
import torch
from PACKAGE import LightningModule, Trainer
from ddplog.lightning import DdplogLogger


class Model(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        self.log("rank", float(self.global_rank))
        self.log("loss", loss := self.layer(batch[0]).pow(2).mean())
        if hasattr(self, "is_broken"):
            raise ValueError("planted")
        return loss

    def validation_step(self, batch, index):
        self.log("val/rank", float(self.global_rank))

    def test_step(self, batch, index):
        self.log("test/rank", float(self.global_rank))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(32, 4)), batch_size=4)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, log_every_n_steps=1, enable_progress_bar=False,
    logger=DdplogLogger(project="digits"),
)
model = Model(lr=0.125)
trainer.fit(model, batches, batches)
trainer.test(model, batches, verbose=False)
assert trainer.log_dir == trainer.logger.experiment.dir
if "broken" in sys.argv:
    model.is_broken = True
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, batches)
"""


def script(job, package):
    return job.script(TRAIN.replace("PACKAGE", package))


def check(run):
    assert run.project == "digits"
    assert {writer.rank for writer in run.writers()} == {0, 1}
    for key, num_points in (("rank", 8), ("loss", 8), ("val/rank", 2), ("test/rank", 1)):
        points = run.metric(key)
        assert (len(points), set(points.n.tolist())) == (num_points, {2}), key
    rank = run.metric("rank")
    assert rank.step.tolist() == list(range(8))
    assert set(rank.value.tolist()) == {0.5}
    assert set(rank.max_rank.tolist()) == {1}
    assert {(param.name, param.value) for param in run.params()} == {("lr", 0.125)}
    assert run.drops() == ()


def test_what_a_trainer_logs_on_every_rank_is_one_point_a_step(job):
    """self.log() without sync_dist, on_epoch values, test() after fit(): no rank is left out, and the run is one."""
    job.run(*job.torchrun(2, script(job, "lightning.pytorch")), timeout_s=200)
    with job.open() as run:
        check(run)
        assert run.status == "finished"
        checkpoints = {text.text for text in run.texts() if text.key == "checkpoint"}
    assert [path.name for path in (job.run_dir / "checkpoints").iterdir()] == ["epoch=1-step=8.ckpt"]
    assert str(job.run_dir / "checkpoints" / "epoch=1-step=8.ckpt") in checkpoints


@pytest.mark.services
def test_ranks_that_lightning_starts_itself_are_one_run_and_a_failed_fit_ends_it(job):
    """Without a launcher nothing in the environment says that the first process is a rank of two."""
    job.run(sys.executable, script(job, "pytorch_lightning"), "broken", code=1, timeout_s=200)
    with job.open() as run:
        check(run)
        assert run.status == "failed"
        assert "ValueError: planted" in run.detail


EARLY = """
import ddplog
ddplog.init()
"""


def test_a_rank_that_knows_only_its_number_on_the_node_is_refused(job):
    """init() above the Trainer, in a child of Lightning's launcher: it would be a run of its own, as rank 0 of 1."""
    _, err = job.run(sys.executable, job.script(EARLY), code=1, LOCAL_RANK="1", WORLD_SIZE="2", NODE_RANK="0")

    assert "RANK='': is not set, but LOCAL_RANK=1" in err
    assert "ddplog's logger" in err
