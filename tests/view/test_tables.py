"""What `ls`, `show` and the launcher's summary say."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from rich.console import Console
from view.run_maker import HOSTILE, T0, RunMaker, typical

from ddplog.store.reader import list_runs, open_run
from ddplog.view import tables


def shown(renderable, width=200):
    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


@pytest.fixture
def run(tmp_path):
    with open_run(
        typical(tmp_path / "run-a", sinks=["tensorboard", "jsonl"]).finish("failed", "rank 1 died")
    ) as opened:
        yield opened


def test_show_says_everything(run):
    text = shown(tables.show(run))
    assert "failed (rank 1 died)" in text
    assert "rank 1 came back" in text  # the second attempt's reason
    assert "signal 9 (SIGKILL)" in text
    assert "407 values logged = 400 stored + 7 dropped" in text
    assert "spool_full" in text
    assert "rank_died" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["tokens"][1:5] == ["sum", "10", "9", "900"]
    assert lines["train/loss"][-1] == "2/2"
    assert lines["tensorboard"][1:4] == ["retrying", "20", "5"]
    assert lines["jsonl"][1] == "starting"  # asked for, and has not written its state yet


@pytest.mark.parametrize("make", [tables.show, tables.summary])
def test_hostile_words_cannot_steer_the_terminal(run, make):
    text = shown(make(run))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "evil\\x1b[2J" in text
    assert HOSTILE not in text


def test_a_short_point_and_nan_are_marked(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.attempt()
    maker.point("x", 0, 1.0, n=1, nan_count=1, bad_rank=1)
    with open_run(maker.finish()) as run:
        text = shown(tables.metrics_table(run.metrics()))
    assert "1/2" in text
    assert "1 NaN (rank 1)" in text


def test_the_summary_has_at_most_twelve_metrics_losses_first(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.attempt(1, 2)
    for i in range(20):
        maker.point(f"m{i:02d}", 0, 1.0)
    maker.point("z/loss", 3, 0.25, min=0.125, max=0.5)
    with open_run(maker.finish()) as run:
        text = shown(tables.summary(run))
    assert text.index("z/loss") < text.index("m00")
    assert "0.125 r0 .. 0.5 r1" in text
    assert "m10" in text
    assert "m11" not in text
    assert "and 9 more metrics" in text
    assert str(tmp_path / "r") in text
    assert "1m 30s" in text


def test_an_empty_run_is_shown(tmp_path):
    with open_run(RunMaker(tmp_path / "r").finish()) as run:
        text = shown(tables.show(run)) + shown(tables.summary(run))
    assert "no rank has joined" in text
    assert "0 values logged = 0 stored + 0 dropped" in text


def test_a_large_world_shows_who_died(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.attempt(1, 300)
    for rank in range(300):
        maker.writer(rank, host=f"host{rank}", state="died" if rank == 277 else "finished")
    with open_run(maker.finish()) as run:
        text = shown(tables.ranks(run.writers(), run.drops()))
    assert "host277" in text
    assert "host0" in text
    assert "and 236 more ranks" in text


def test_ls_counts_a_running_runs_age(tmp_path):
    maker = RunMaker(tmp_path / "a")
    maker.control()
    now = datetime.fromtimestamp(T0 / 1e9 + 125, tz=timezone.utc)
    (tmp_path / "junk").mkdir()
    text = shown(tables.runs(list_runs(tmp_path), now))
    maker.close()
    assert "running" in text
    assert "2m 05s" in text
    assert "unreadable (not a run: it has no run.db)" in text


def test_points_are_listed_by_step(run):
    text = shown(tables.points_table(run.metric("train/loss"), limit=3))
    assert "and 7 more before them" in text
    assert text.splitlines()[1].split()[:3] == ["7", "2", "-7"]
    assert "per_rank" not in text
    ranks = shown(tables.points_table(run.rank_metric("per_rank"), limit=2))
    assert ranks.splitlines()[2].split() == ["4", "1", "1", "1.4"]
