"""Who held up a run: found in columns alone, and nobody in a run whose ranks are alike."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner
from view.run_maker import RunMaker
from view.test_tables import shown

from ddplog.cli.main import cli
from ddplog.store.reader import open_run
from ddplog.view import report, tables
from ddplog.view.stragglers import find_stragglers, held_up


def extremes(values):
    """Return what the store keeps of one value per rank."""
    low, high = min(values), max(values)
    return {
        "mean": sum(values) / len(values), "min": low, "min_rank": values.index(low), "max": high,
        "max_rank": values.index(high), "n": len(values), "expected": len(values),
    }  # fmt: skip


def write(folder, steps):
    """Write a run from, per step, metric -> one value per rank."""
    maker = RunMaker(folder)
    maker.attempt()
    maker.db.execute("BEGIN")
    for number, values in enumerate(steps):
        for key, of_ranks in values.items():
            maker.point(key, number, sum(of_ranks) / len(of_ranks), **extremes(of_ranks))
    maker.db.execute("COMMIT")
    return maker.finish()


def step(held_up_by, late_s, world=2, phase="perf/data_s", noise_s=0.0, draw=None, step_s=0.05):
    """One step of ranks that are alike but for one, which is late in one phase: the others wait for it."""
    jitter = [draw.random() * noise_s if draw else 0.0 for _ in range(world)]
    late = [jitter[rank] + (late_s if rank == held_up_by else 0.0) for rank in range(world)]
    longest = max(late)
    others = {key: [0.002] * world for key in ("perf/forward_s", "perf/backward_s", "perf/data_s") if key != phase}
    return {
        "perf/wait_s": [0.001 + longest - own for own in late],
        phase: [0.002 + own for own in late],
        "perf/step_s": [step_s + longest] * world,
        **others,
    }


@pytest.fixture
def straggling(tmp_path):
    return write(tmp_path / "r", [step(1, 0.02) for _ in range(50)])


def test_the_rank_that_waited_least_is_named_with_how_much_and_why(straggling):
    with open_run(straggling) as run:
        (found,) = find_stragglers(run)

    assert (found.rank, found.num_steps, found.num_compared, found.cause) == (1, 50, 50, "waiting for data")
    assert found.mean_s == pytest.approx(0.02)
    assert found.lost_s == pytest.approx(1.0)
    assert found.share == pytest.approx(0.02 / 0.07)
    assert found.describe() == (
        "rank 1 held up 50 of 50 steps by 20 ms on average (29% of the time): "
        "waiting for data takes it longer than the others"
    )


@pytest.mark.parametrize(
    ("phase", "cause"),
    [("perf/forward_s", "forward"), ("perf/backward_s", "backward"), ("perf/elsewhere_s", "")],
)
def test_the_cause_is_the_phase_that_explains_it(tmp_path, phase, cause):
    with open_run(write(tmp_path / "r", [step(0, 0.02, phase=phase) for _ in range(20)])) as run:
        (found,) = find_stragglers(run)

    assert (found.rank, found.cause) == (0, cause)


@pytest.mark.parametrize("world", [2, 4, 64])
@pytest.mark.parametrize("noise_s", [0.0001, 0.002, 0.05])
def test_ranks_that_are_alike_have_no_straggler_however_noisy(tmp_path, world, noise_s):
    """Somebody is always last. A name that comes and goes by chance would teach people to ignore it."""
    draw = random.Random(world)
    for trial in range(3):
        steps = [step(-1, 0.0, world, noise_s=noise_s, draw=draw) for _ in range(150)]
        with open_run(write(tmp_path / f"r{trial}", steps)) as run:
            assert find_stragglers(run) == ()


def test_a_straggler_is_found_in_noise_of_its_own_size(tmp_path):
    draw = random.Random(1)
    steps = [step(3, 0.02, 8, noise_s=0.02, draw=draw) for _ in range(60)]
    with open_run(write(tmp_path / "r", steps)) as run:
        assert [found.rank for found in find_stragglers(run)] == [3]


def test_one_that_comes_late_now_and_then_is_found(tmp_path):
    """A garbage collection or a checkpoint every tenth step: the mean over all steps would hide it."""
    steps = [step(2 if i % 10 == 0 else -1, 0.2, 4) for i in range(200)]
    with open_run(write(tmp_path / "r", steps)) as run:
        (found,) = find_stragglers(run)
    assert (found.rank, found.num_steps, found.num_compared) == (2, 20, 200)
    assert found.mean_s == pytest.approx(0.2)


def test_two_of_them_are_named_the_costly_one_first(tmp_path):
    steps = [step(5, 0.05, 8) if i % 2 else step(1, 0.02, 8) for i in range(100)]
    with open_run(write(tmp_path / "r", steps)) as run:
        assert [(found.rank, found.num_steps) for found in find_stragglers(run)] == [(5, 50), (1, 50)]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [step(1, 0.02) for _ in range(5)],  # too few to say anything
        [step(1, 0.02, step_s=10.0) for _ in range(50)],  # 0.2 % of the time
        [{**step(1, 0.02), "perf/wait_s": [0.001]} for _ in range(50)],  # one rank alone waits for nobody
        [{"perf/wait_s": [0.0, 1.0]} for _ in range(50)],  # how long the steps took is not known
    ],
    ids=["empty", "few", "trifle", "alone", "no step times"],
)
def test_nobody_is_named_without_evidence(tmp_path, steps):
    with open_run(write(tmp_path / "r", steps)) as run:
        assert find_stragglers(run) == ()
        assert "Stragglers" not in shown(tables.show(run))
        assert "Stragglers" not in report.render(run)


def test_every_step_has_who_held_it_up_and_by_how_much(tmp_path):
    with open_run(write(tmp_path / "r", [step(i % 2, 0.01 * (i + 1)) for i in range(4)])) as run:
        found = held_up(run.metric("perf/wait_s"))
    assert found.step.tolist() == [0, 1, 2, 3]
    assert found.rank.tolist() == [0, 1, 0, 1]
    assert found.seconds.tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_show_the_summary_json_and_the_report_say_it(straggling):
    with open_run(straggling) as run:
        said = shown(tables.show(run))
        assert "held up 50 of 50 steps by 20 ms on average" in shown(tables.summary(run))
        page = report.render(run)
    line = said[said.index("Stragglers") :].splitlines()[2]
    assert line.split() == ["1", "50", "50", "20", "ms", "29%", "waiting", "for", "data"]
    assert "<h2>Stragglers</h2>" in page
    result = CliRunner().invoke(cli, ["show", str(straggling), "--json"])
    (found,) = json.loads(result.output)["stragglers"]
    assert (found["rank"], found["num_steps"], found["cause"]) == (1, 50, "waiting for data")
