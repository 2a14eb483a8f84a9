"""Scripts as they are written for Comet, started as real jobs: one run, and each name one series over the ranks."""

import os
import sys
from pathlib import Path

import pytest
from system.jobs import DDPLOG, SOURCE

from ddplog.store.reader import list_runs, open_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "comet_digits.py"
CANARY = "canary-4711-canary"


@pytest.fixture
def captured(job):
    """Run a script as ranks under `ddplog run --capture comet`, where importing the real comet_ml would fail."""
    decoy = job.folder / "decoy" / "comet_ml"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the real comet_ml was imported')")
    path = os.pathsep.join([str(decoy.parent), str(SOURCE)])

    def run(*words, **environ):
        options = ("--capture", "comet", "--quiet", "--no-summary")
        return job.run(*DDPLOG, "run", *options, *words, timeout_s=110, PYTHONPATH=path, **environ)

    return run


def found(folder):
    """Return {metric: [(step, value, n)]}, the parameters, and the drops of the only run in a folder."""
    (summary,) = list_runs(folder)
    with open_run(summary.path) as run:
        metrics = {}
        for metric in run.metrics():
            points = run.metric(metric.key)
            metrics[metric.key] = list(zip(points.step.tolist(), points.value.tolist(), points.n.tolist(), strict=True))
        return metrics, {p.name: p.value for p in run.params()}, {(d.rank, d.reason): d.count for d in run.drops()}


def test_comets_own_way_of_ddp_becomes_one_series_a_name(job, captured):
    """The example is written as Comet's are: an Experiment on every rank, and names without a rank in them."""
    assert "ddplog" not in EXAMPLE.read_text().partition('"""\n\n')[2]
    captured("--nproc-per-node", "2", str(EXAMPLE), "--epochs", "2", COMET_API_KEY=CANARY)
    metrics, params, drops = found(job.runs)

    assert sorted(metrics) == ["epoch", "train_loss", "validate_accuracy", "validate_count"]
    assert {n for points in metrics.values() for _, _, n in points} == {2}
    assert [step for step, _, _ in metrics["train_loss"]] == list(range(1, 41))
    assert [(step, value) for step, value, _ in metrics["validate_count"]] == [(20, 256.0), (40, 256.0)]
    assert [(step, value) for step, value, _ in metrics["epoch"]] == [(1, 0.0), (21, 1.0)]
    assert {name: params[name] for name in ("lr", "epochs", "tag/ddp", "other/world_size")} == {
        "lr": 0.05, "epochs": 2, "tag/ddp": True, "other/world_size": 2,
    }  # fmt: skip
    assert drops == {(0, "unsupported"): 3, (1, "unsupported"): 3}
    (summary,) = list_runs(job.runs)
    assert (summary.project, summary.name, summary.status) == ("Digits-with-DDP", "mlp", "finished")
    assert not holders(job.folder)


def holders(folder):
    """Return the files below a folder that have the API key in them."""
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


SHARED = """
import os, sys, time
import comet_ml
from pathlib import Path

rank = int(os.environ["RANK"])
if rank == 0:
    experiment = comet_ml.Experiment(os.environ["KEY"], project_name="shared")
    Path("key.new").write_text(experiment.get_key())
    Path("key.new").rename("key")
else:
    while not Path("key").exists():
        time.sleep(0.01)
    experiment = comet_ml.ExistingExperiment(api_key=os.environ["KEY"], experiment_key=Path("key").read_text())
experiment.log_parameters({"key": os.environ["KEY"], "args": {"key": os.environ["KEY"]}})
for step in range(20):
    experiment.log_metric("loss", rank + step, step=step)
experiment.log_text("the key: " + os.environ["KEY"])
experiment.flush()
for process in Path("/proc").glob("[0-9]*/cmdline"):
    try:
        assert os.environ["KEY"].encode() not in process.read_bytes(), process
    except OSError:  # it has ended
        pass
experiment.end()
"""


@pytest.mark.parametrize("how", ["captured", "one import changed"])
def test_an_experiment_that_rank_0_shares_by_its_key_is_the_jobs_run(job, captured, how):
    """Comet's example for torchrun: by its key the job's run would be split from that of rank 0."""
    if how == "captured":
        words = job.ranks(2, job.script(SHARED))
        captured("--", *words, KEY=CANARY, DDPLOG_RUN_ID=None)
    else:
        words = job.ranks(2, job.script(SHARED.replace("import comet_ml", "import ddplog.comet as comet_ml")))
        job.run(*DDPLOG, "run", "--quiet", "--no-summary", "--", *words, KEY=CANARY, DDPLOG_RUN_ID=None)
    metrics, params, drops = found(job.runs)

    assert metrics == {"loss": [(step, step + 0.5, 2) for step in range(20)]}
    assert params == {"key": "********", "args|key": "********"}
    assert drops == {}
    assert not holders(job.folder)


GUARDED = """
import os
import comet_ml

rank = int(os.environ["RANK"])
if rank == 0:
    experiment = comet_ml.start(project_name="guarded")
else:
    experiment = comet_ml.Experiment(disabled=True)
for step in range(20):
    experiment.log_metric("loss", step, step=step)
if comet_ml.get_running_experiment().alive:
    comet_ml.get_running_experiment().log_metrics({"acc": 1.0}, epoch=3)
    comet_ml.end()
"""


def test_a_script_that_logs_from_rank_0_only_works_too(job, captured):
    captured("--", *job.ranks(2, job.script(GUARDED)))
    metrics, _, _ = found(job.runs)

    assert metrics == {
        "loss": [(step, float(step), 1) for step in range(20)], "acc": [(19, 1.0, 1)], "epoch": [(19, 3.0, 1)],
    }  # fmt: skip


SEVERAL = """
from comet_ml import Experiment

for fold in range(2):
    experiment = Experiment()
    for step in range(5):
        experiment.log_metric("loss", 10 * fold + step)
    experiment.end()
"""


def test_an_experiment_after_another_is_a_run_after_another(job, captured):
    """Cross-validation: a run for each fold, over all ranks."""
    captured("--", *job.ranks(2, job.script(SEVERAL)), DDPLOG_RUN_ID=None)
    values = []
    for summary in list_runs(job.runs):
        with open_run(summary.path) as run:
            values.append(run.metric("loss").value.tolist())
            assert set(run.metric("loss").n.tolist()) == {2}

    assert sorted(values) == [[0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0, 14.0]]


SPAWNED = """
import multiprocessing, warnings
import comet_ml


def work(experiment):
    assert comet_ml.__name__ == "ddplog.comet", comet_ml.__name__
    assert comet_ml.get_running_experiment() is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        experiment.log_metric("loss", 99.0, step=0)
    assert "worker process" in str(caught[0].message), caught


if __name__ == "__main__":
    experiment = comet_ml.Experiment()
    experiment.log_metric("loss", 1.0, step=0)
    process = multiprocessing.get_context("spawn").Process(target=work, args=(experiment,))
    process.start()
    process.join()
    assert process.exitcode == 0
    experiment.log_metric("loss", 2.0, step=1)
"""


def test_a_workers_experiment_logs_nothing_and_says_so(job, captured):
    """A data set that holds the experiment goes to DataLoader workers: they must not become ranks of their own."""
    captured("--", sys.executable, job.script(SPAWNED))
    metrics, _, _ = found(job.runs)

    assert metrics == {"loss": [(0, 1.0, 1), (1, 2.0, 1)]}
