"""A script written for torch's SummaryWriter, with one import changed; and that the two have one shape."""

import sys

import pytest

pytestmark = pytest.mark.system

TRAIN = r"""
import math, os
from ddplog.tensorboard import SummaryWriter

writer = SummaryWriter("logs/train", comment="x", flush_secs=1, project="digits")
assert os.path.isdir(writer.get_logdir())
for step in range(3):
    writer.add_scalar("loss", step / 2, step, walltime=1.0, new_style=True, double_precision=True)
    writer.add_scalars("loss_of", {"a": step, "b": -step}, global_step=step)
writer.add_scalar("no step", 1.0)
writer.add_scalar("odd\n\u202etag", 1.0, 0)
writer.add_scalar("", 1.0, 0)
writer.add_scalar("\u00e9" * 300, 1.0, 0)
writer.add_scalar(7, 1.0, 0)
writer.add_text("note", "hello", 2)
writer.add_hparams({"lr": 0.125, "name": "sgd"}, {"hparam/acc": 0.5}, global_step=2)
for name in ("image", "image", "images", "histogram", "audio", "figure", "video", "graph", "mesh", "embedding"):
    getattr(writer, "add_" + name)("tag", [[1, 2]], 3, anything=1)
try:
    writer.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
with SummaryWriter("logs/val") as other:
    other.add_scalar("loss", 5.0, 1)
again = SummaryWriter("logs/train")
again.add_scalar("loss", 7.0, 9)
writer.flush()
writer.close()
writer.add_scalar("after close", 1.0, 0)
assert SummaryWriter().log_dir.endswith("r1")
"""


def test_what_a_run_can_hold_is_logged_and_the_rest_is_counted(job):
    _, err = job.run(sys.executable, job.script(TRAIN))
    with job.open() as run:
        assert (run.project, run.status) == ("digits", "finished")
        metrics = {metric.key: run.metric(metric.key) for metric in run.metrics()}
        points = {key: (columns.step.tolist(), columns.value.tolist()) for key, columns in metrics.items()}
        assert {param.name: param.value for param in run.params()} == {"lr": 0.125, "name": "sgd"}
        assert [(text.key, text.step, text.text) for text in run.texts()] == [("note", 2, "hello")]
        assert [(drop.reason, drop.count) for drop in run.drops()] == [("unsupported", 10)]
    assert points == {
        "loss": ([0, 1, 2, 9], [0.0, 0.5, 1.0, 7.0]),
        "loss_of/a": ([0, 1, 2], [0.0, 1.0, 2.0]),
        "loss_of/b": ([0, 1, 2], [0.0, -1.0, -2.0]),
        "no step": ([0], [1.0]),
        "odd__tag": ([0], [1.0]),
        "_": ([0], [1.0]),
        "\u00e9" * 125: ([0], [1.0]),
        "7": ([0], [1.0]),
        "hparam/acc": ([2], [0.5]),
        "val/loss": ([1], [5.0]),
        "after close": ([0], [1.0]),
    }
    assert err.count("SummaryWriter.add_image(): a run cannot hold this yet") == 1
    assert err.count("a run cannot hold this yet") == 9


HELPER = """
import multiprocessing
from ddplog.tensorboard import SummaryWriter

def log(kind):
    SummaryWriter().add_scalar(kind, 1.0, 0)

if __name__ == "__main__":
    log("rank")
    for kind in ("fork", "spawn"):
        helper = multiprocessing.get_context(kind).Process(target=log, args=(kind,))
        helper.start()
        helper.join()
        assert helper.exitcode == 0
"""


def test_a_writer_in_a_worker_process_takes_nothing(job):
    """It has its rank's variables, and would take the rank's place."""
    _, err = job.run(*job.ranks(1, job.script(HELPER)))
    with job.open() as run:
        assert [metric.key for metric in run.metrics()] == ["rank"]
        assert len(run.writers()) == 1
    assert err.count("log() in a worker process is ignored") == 2


SHAPE = """
import inspect
from torch.utils.tensorboard import SummaryWriter as Theirs
from ddplog.tensorboard import SummaryWriter

ours = {name: method for name, method in vars(SummaryWriter).items() if inspect.isfunction(method)}
for name, method in inspect.getmembers(Theirs, inspect.isfunction):
    if name == "__init__" or name in ours and name[0] != "_":
        theirs = [(parameter.name, parameter.default) for parameter in inspect.signature(method).parameters.values()]
        parameters = inspect.signature(ours[name]).parameters.values()
        assert [(parameter.name, parameter.default) for parameter in parameters][: len(theirs)] == theirs, name
    else:
        assert name.startswith(("add_", "_")), name
assert ours.keys() >= {"add_scalar", "add_scalars", "add_text", "add_hparams", "add_tensor", "flush", "close", "get_logdir"}
print("same")
"""


def test_the_methods_and_their_parameters_are_those_of_torch(job):
    """So that a call by position or by name means the same, and that none of torch's methods is missing."""
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    out, _ = job.run(sys.executable, job.script(SHAPE))

    assert out == "same\n"
