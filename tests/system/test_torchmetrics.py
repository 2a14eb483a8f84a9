"""Real torchmetrics objects, logged by two ranks that torch.multiprocessing started and no launcher named."""

import sys

import pytest

pytest.importorskip("torch")

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

TRAIN = """
import sys
import torch

def rank(number, meeting):
    import torchmetrics
    from torchmetrics.classification import BinaryAccuracy, MulticlassRecall
    import ddplog

    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=2)
    run = ddplog.init(project="digits")
    assert (run.rank, run.world_size) == (number, 2)

    accuracy = BinaryAccuracy()
    num = 2 + 4 * number  # ranks with unequal numbers of samples
    accuracy.update(torch.ones(num), torch.full((num,), 1 - number))
    run.log({"accuracy": accuracy}, step=0, weight=num)

    # A rank that logs it more often than the other would wait for ever in a collective.
    for step in range(1, 2 + 2 * number):
        run.log({"accuracy": accuracy}, step=step, weight=num)

    mean = torchmetrics.MeanMetric()
    mean.update(float(number))
    both = torchmetrics.MetricCollection({"mean": mean, "max": torchmetrics.MaxMetric()})
    both["max"].update(float(number))
    run.log({"val": both, "twice": mean * 2, "nested": {"mean": mean}}, step=0)

    # What is logged leaves no trace: compute() gathers as before, on every rank at the same time.
    assert float(mean.compute()) == 0.5
    assert float(accuracy.compute()) == 0.25
    assert float(both.compute()["max"]) == 1.0
    run.log({"gathered": mean}, step=0)

    run.log({"empty": torchmetrics.MeanMetric()}, step=0)
    per_class = MulticlassRecall(num_classes=3, average=None)
    per_class.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    run.log({"per_class": per_class}, step=0)
    assert run.drops == {"bad_value": 2}, run.drops
    run.finish()
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(rank, args=(sys.argv[1],), nprocs=2)
"""


def test_a_metric_is_this_ranks_own_result_and_never_a_collective(job):
    _, err = job.run(sys.executable, job.script(TRAIN), f"file://{job.folder / 'meeting'}", timeout_s=200)
    with job.open() as run:
        accuracy = run.metric("accuracy")
        assert accuracy.step.tolist() == [0, 1, 2, 3]
        assert accuracy.n.tolist() == [2, 2, 1, 1]
        assert (accuracy.min[0], accuracy.max[0], accuracy.value[0]) == (0.0, 1.0, 0.25)
        for key, value in (
            ("val/mean", 0.5),
            ("val/max", 0.5),
            ("twice", 1.0),
            ("nested/mean", 0.5),
            ("gathered", 0.5),
        ):
            points = run.metric(key)
            assert (points.n.tolist(), points.value.tolist()) == ([2], [value]), key
        assert run.metric("gathered").min[0] == 0.5
        assert (run.metric("val/max").min[0], run.metric("val/max").max[0]) == (0.0, 1.0)
        assert {writer.rank for writer in run.writers()} == {0, 1}
    assert "empty: MeanMetric: had no update() yet" in err
