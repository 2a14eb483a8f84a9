"""The reader, against stores made from SCHEMA itself."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from view.run_maker import HOSTILE, T0, RunMaker, typical

from ddplog.errors import DdplogError, RunNotFoundError
from ddplog.store import reader
from ddplog.store.columns import UnknownMetricError
from ddplog.store.reader import list_runs, open_run


@pytest.fixture
def run(tmp_path):
    typical(tmp_path / "run-a").finish("failed", "rank 1 was killed by signal 9")
    with open_run(tmp_path / "run-a") as opened:
        yield opened


def test_a_run_says_what_it_is(run):
    assert (run.run_id, run.project, run.name, run.tags) == ("run-a", "digits", "run-a", ("a", "b"))
    assert (run.status, run.detail) == ("failed", "rank 1 was killed by signal 9")
    assert run.config == {"lr": 0.1}
    assert run.created.timestamp() * 1e9 == T0
    assert (run.ended - run.created).total_seconds() == 90.5
    assert [(a.attempt, a.world_size, a.reason) for a in run.attempts] == [(1, 2, "start"), (2, 2, "rank 1 came back")]
    assert "run-a failed" in repr(run)


def test_a_run_opens_by_folder_by_db_and_by_text(tmp_path):
    folder = RunMaker(tmp_path / "r").finish()
    for path in (folder, folder / "run.db", str(folder)):
        with open_run(path) as run:
            assert run.run_id == "r"


def test_columns_are_sorted_and_typed(run):
    loss = run.metric("train/loss", attempt=1)
    assert loss.step.tolist() == list(range(10))
    assert loss.value[1] == 0.5
    assert (loss.min[1], loss.max[1], loss.std[1]) == (0.25, 1.0, 0.1)
    for name in ("step", "min_rank", "max_rank", "n", "expected", "nan_count", "inf_count", "bad_rank", "attempt"):
        assert getattr(loss, name).dtype == np.int64, name
    assert loss.mean.dtype == np.float64
    assert loss.bad_rank.tolist() == [-1] * 10


def test_the_highest_attempt_wins_per_step(run):
    """A restart rewinds: what it did again replaces what the lost attempt did, and nothing else."""
    loss = run.metric("train/loss")
    assert loss.attempt.tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 1]
    assert loss.value[6:9].tolist() == [-6.0, -7.0, -8.0]
    assert run.metric("train/loss", attempt=2).step.tolist() == [6, 7, 8]
    assert len(run.metric("train/loss", attempt=9)) == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_pages_join_without_a_seam(run, limit):
    """Two attempts of one step may stand on two pages."""
    pages = list(run.metric_pages("train/loss", limit=limit))
    assert np.concatenate([page.value for page in pages]).tolist() == run.metric("train/loss").value.tolist()
    every = list(run.metric_pages("train/loss", every_attempt=True, limit=limit))
    rows = [(s, a) for page in every for s, a in zip(page.step.tolist(), page.attempt.tolist(), strict=True)]
    assert rows == sorted(rows)
    assert len(rows) == 13


def test_null_is_nan_and_names_its_rank(run):
    acc = run.metric("val/acc")
    assert math.isnan(acc.value[0])
    assert (acc.nan_count[0], acc.bad_rank[0], acc.min_rank[0]) == (2, 0, -1)


def test_the_newest_revision_is_read(run):
    acc = run.metric("val/acc")
    assert acc.value[1] == 0.8
    assert acc.revision[1] == 1


def test_infinity_comes_back(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.point("x", 0, math.inf, min=-math.inf)
    with open_run(maker.finish()) as run:
        assert run.metric("x").value[0] == math.inf
        assert run.metric("x").min[0] == -math.inf


def test_an_unknown_metric_names_close_ones(run):
    with pytest.raises(UnknownMetricError, match="train/loss") as caught:
        run.metric("train/los")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, DdplogError)
    assert not str(caught.value).startswith('"')


def test_rank_metric_has_each_rank(run):
    found = run.rank_metric("per_rank")
    assert found.step.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.rank.tolist() == [0, 1] * 5
    assert found.value[3] == 1.1
    assert len(run.rank_metric("train/loss")) == 0


def test_rank_metric_prefers_the_highest_attempt(tmp_path):
    maker = RunMaker(tmp_path / "r")
    for attempt in (1, 2):
        maker.rank_point("x", 0, 0, float(attempt), attempt)
    with open_run(maker.finish()) as run:
        assert run.rank_metric("x").value.tolist() == [2.0]
        assert run.rank_metric("x", attempt=1).value.tolist() == [1.0]


def test_metrics_say_how_they_were_declared_and_what_is_newest(run):
    found = {metric.key: metric for metric in run.metrics()}
    assert list(found) == sorted(found) == list(run.keys())
    assert found["tokens"].reduce == "sum"
    assert (found["train/loss"].num_points, found["train/loss"].last.step.tolist()) == (13, [8])
    assert found["per_rank"].reduce == "none"
    assert found["per_rank"].num_points == 5


def test_the_rest_comes_back(run):
    assert [(p.name, p.value) for p in run.params()] == [("lr", 0.1), (HOSTILE, HOSTILE)]
    assert [(t.key, t.step, t.text) for t in run.texts()] == [("note", 3, HOSTILE)]
    event = run.events()[0]
    assert (event.kind, event.rank, event.step, event.level, event.data) == ("rank_died", 1, 6, "error", {})
    assert [(d.rank, d.reason, d.count) for d in run.drops()] == [(0, "spool_full", 7)]
    assert [(w.attempt, w.rank) for w in run.writers()] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert run.writers()[1].signal == 9


def test_points_pages_by_id(run):
    first = run.points(limit=10)
    rest = run.points(after_id=first[-1].id, limit=1000)
    ids = [point.id for point in first + rest]
    assert ids == sorted(set(ids))
    assert len(ids) == run.num_points == 31
    assert {point.key for point in first + rest} == set(run.keys())


def test_sink_states_come_from_their_files(run):
    (run.path / "sinks" / "torn").mkdir()
    (run.path / "sinks" / "torn" / "state.json").write_text("{")
    found = {state.name: state for state in run.sink_states()}
    assert (found["tensorboard"].state, found["tensorboard"].lag) == ("retrying", 5)
    assert found["torn"].state == "unreadable"


def test_pandas_is_wide(run):
    frame = run.to_pandas()
    assert frame.index.name == "step"
    assert list(frame.columns) == list(run.keys())
    assert frame.loc[7, "train/loss"] == -7
    assert math.isnan(frame.loc[0, "val/acc"])
    one = run.metric("train/loss").to_pandas()
    assert one.loc[1, "max"] == 1.0


def test_without_pandas_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DdplogError, match=r"ddplog\[pandas\]"):
        run.to_pandas()
    with pytest.raises(DdplogError, match=r"ddplog\[pandas\]"):
        run.metric("train/loss").to_pandas()


def test_a_closed_run_says_so(tmp_path):
    run = open_run(RunMaker(tmp_path / "r").finish())
    run.close()
    with pytest.raises(DdplogError, match="closed"):
        run.keys()
    assert "unreadable" in repr(run)


def test_an_empty_run_reads_as_empty(tmp_path):
    with open_run(RunMaker(tmp_path / "r").finish()) as run:
        assert (run.keys(), run.metrics(), run.points(), run.params(), run.texts(), run.events()) == (
            (),
            (),
            [],
            (),
            (),
            (),
        )
        assert (run.attempts, run.drops(), run.writers(), run.sink_states(), run.watermark) == ((), (), (), (), None)
        assert len(run.rank_step_times()) == 0
        assert run.to_pandas().empty


# Status.


def test_running_is_believed_while_the_aggregator_lives(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.control()
    with open_run(maker.folder) as run:
        assert (run.status, run.is_live()) == ("running", True)
    maker.close()


def test_running_with_a_dead_aggregator_is_unknown(tmp_path):
    maker = RunMaker(tmp_path / "r")
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie still answers kill(pid, 0)
        maker.control(child.pid)
        with open_run(maker.folder) as run:
            assert (run.status, run.detail) == ("unknown", reader.GONE)
    finally:
        child.wait()
    (maker.folder / "control.json").unlink()
    with open_run(maker.folder) as run:
        assert run.status == "unknown"
    maker.close()


# While it is written, and where it cannot be.


def test_a_live_run_shows_what_is_committed(tmp_path):
    maker = RunMaker(tmp_path / "r")
    with open_run(maker.folder) as run:
        assert run.keys() == ()
        maker.db.execute("BEGIN IMMEDIATE")
        maker.point("x", 0, 1.0)
        assert run.keys() == ()
        maker.db.execute("COMMIT")
        assert run.metric("x").value.tolist() == [1.0]
    maker.close()


def test_a_reader_between_pages_does_not_hold_the_wal(tmp_path):
    """A statement left open keeps a checkpoint from resetting the WAL, which then grows without bound."""
    maker = RunMaker(tmp_path / "r")
    for step in range(50):
        maker.point("x", step, 1.0)
    with open_run(maker.folder) as run:
        pages = run.metric_pages("x", limit=5)
        next(pages)
        maker.point("x", 50, 1.0)
        busy, _, _ = maker.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert busy == 0
        assert sum(len(page) for page in pages) == 47  # of 51; 4 came with the first page, its last row with the second
    maker.close()


def test_a_folder_that_cannot_be_written_is_read_as_immutable():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        run_dir = Path(folder) / "r"
        maker = RunMaker(run_dir)
        maker.point("x", 0, 1.0)
        maker.finish()
        (run_dir / "run.db").chmod(0o444)
        run_dir.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # the mode of a folder does not bind root
            with open_run(run_dir) as run:
                assert run.is_immutable
                assert run.metric("x").value.tolist() == [1.0]
        finally:
            os.seteuid(user)
            run_dir.chmod(0o755)


def test_nothing_can_be_written_through_a_reader(run):
    with pytest.raises(DdplogError, match="readonly"):
        run._rows("DELETE FROM points")


# What is not a run.


def test_a_missing_run_names_what_was_looked_for_and_what_is_near(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whose own runs would be near
    RunMaker(tmp_path / "runs" / "20260731-a").finish()
    with pytest.raises(RunNotFoundError) as caught:
        open_run(tmp_path / "runs" / "20260731-b")
    assert "20260731-b/run.db" in str(caught.value)
    assert "20260731-a" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no run near"):
        open_run(tmp_path / "else" / "where")


def _foreign_database(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (a)")
    db.close()


def _newer_format(path):
    maker = RunMaker(path.parent)
    maker.meta("format", 99)
    maker.close()


def _torn(path):
    RunMaker(path.parent).finish()
    path.write_bytes(path.read_bytes()[:5000])


def _read(folder):
    with open_run(folder) as run:
        return run.metrics(), run.num_points


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b"\x00\xff" * 4000),
        lambda p: p.write_bytes(b""),
        _foreign_database,
        _newer_format,
        _torn,
    ],
    ids=["noise", "empty", "foreign", "newer", "torn"],
)
def test_what_is_not_a_store_is_refused_by_open_and_listed_by_ls(tmp_path, make):
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad" / "run.db")
    with pytest.raises(DdplogError):
        _read(tmp_path / "bad")
    (listed,) = list_runs(tmp_path)
    assert (listed.run_id, listed.status) == ("bad", "unreadable")
    assert listed.detail


def test_runs_are_listed_newest_first(tmp_path):
    RunMaker(tmp_path / "a", created_unix_ns=T0).finish()
    RunMaker(tmp_path / "b", created_unix_ns=T0 + 10**12).finish()
    typical(tmp_path / "c", created_unix_ns=T0 + 10**9).finish()
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    found = list_runs(tmp_path)
    assert [run.run_id for run in found] == ["b", "c", "a", "other"]
    assert (found[1].world_size, found[1].num_points) == (2, 31)
    assert list_runs(tmp_path / "nowhere") == []
