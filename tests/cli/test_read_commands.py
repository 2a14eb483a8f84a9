"""ls, show, report, export and top, through the command line."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from view.run_maker import HOSTILE, T0, RunMaker, typical

from ddplog.aggregator.control import ControlServer
from ddplog.cli import export
from ddplog.cli.main import cli
from ddplog.errors import ConfigError, DdplogError, RunNotFoundError, UsageError
from ddplog.v1.control_pb2 import FinishReply, RankStatus, StatusReply


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPLOG_DIR", raising=False)
    typical(tmp_path / "runs" / "run-a").finish("failed", "why")
    RunMaker(tmp_path / "runs" / "run-b", created_unix_ns=T0 + 10**9, name="second").finish()
    return tmp_path / "runs"


def call(*arguments):
    found = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_ls_lists_newest_first(runs):
    lines = call("ls").splitlines()
    assert [line.split()[0] for line in lines] == ["run", "run-b", "run-a"]
    assert not any(line.endswith(" ") for line in lines)


def test_ls_as_json(runs):
    (runs / "junk").mkdir()
    found = json.loads(call("ls", "--json", "--dir", runs))
    assert [(run["run_id"], run["status"]) for run in found] == [
        ("run-b", "finished"), ("run-a", "failed"), ("junk", "unreadable"),
    ]  # fmt: skip
    assert found[1]["num_points"] == 31
    assert found[1]["started"].endswith("+00:00")


def test_ls_of_nothing_prints_nothing_on_stdout(tmp_path):
    assert call("ls", "--dir", tmp_path / "none") == ""
    assert json.loads(call("ls", "--dir", tmp_path / "none", "--json")) == []


def test_the_folder_of_runs_is_the_setting(runs, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("DDPLOG_DIR", str(runs))
    assert "second" in call("ls")


@pytest.mark.parametrize("how", ["run-a", "runs/run-a", "runs/run-a/run.db", "absolute"])
def test_a_run_is_found_by_id_path_and_db(runs, how):
    assert "failed (why)" in call("show", runs / "run-a" if how == "absolute" else how)


def test_the_newest_run_is_the_default(runs):
    assert call("show").split()[1] == call("show", "latest").split()[1] == "run-b"


def test_an_unreadable_newest_folder_is_not_latest(runs):
    (runs / "zzz").mkdir()
    assert call("show").split()[1] == "run-b"


def test_a_wrong_name_says_what_is_near(runs):
    with pytest.raises(RunNotFoundError, match="run-b"):
        call("show", "run-c")
    with pytest.raises(RunNotFoundError, match="no run in"):
        call("show", "--dir", runs / "none")


def test_show_as_json_is_strict_json(runs):
    found = json.loads(call("show", "run-a", "--json"), parse_constant=pytest.fail)
    assert (found["status"], found["detail"], found["num_points"]) == ("failed", "why", 31)
    loss = next(metric for metric in found["metrics"] if metric["key"] == "train/loss")
    assert (loss["num_points"], loss["last"]["step"], loss["last"]["value"]) == (13, 8, -8.0)
    assert [rank["signal"] for rank in found["ranks"]] == [None, 9, None, None]
    assert found["drops"][0]["count"] == 7
    assert found["sinks"][0]["lag"] == 5


def test_show_metric_prints_its_points(runs):
    assert call("show", "run-a", "--metric", "train/loss").splitlines()[-1].split()[0] == "9"
    rows = json.loads(call("show", "run-a", "--metric", "val/acc", "--json"))
    assert [(row["step"], row["value"]) for row in rows] == [(4, None), (8, 0.8)]
    per_rank = json.loads(call("show", "run-a", "--metric", "per_rank", "--json"))
    assert per_rank[1] == {"step": 0, "rank": 1, "value": 1.0, "attempt": 1, "time_unix_ns": T0}
    with pytest.raises(DdplogError, match="train/loss"):
        call("show", "run-a", "--metric", "train/lost")


def test_the_report_is_written_beside_the_run_or_where_asked(runs, tmp_path):
    assert call("report", "run-a").strip() == str(runs / "run-a" / "report.html")
    assert call("report", "run-a", "-o", "x/y.html").strip() == str(tmp_path / "x" / "y.html")
    assert (tmp_path / "x" / "y.html").stat().st_size > 50_000
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output"):
        call("report", "run-a", "-o", "file/y.html")


# Export.


def test_csv_has_every_point_of_every_attempt(runs):
    rows = list(csv.DictReader(io.StringIO(call("export", "run-a", "--format", "csv"))))
    assert list(rows[0]) == list(export.COLUMNS)
    assert len(rows) == 31
    loss = [(int(row["step"]), int(row["attempt"])) for row in rows if row["key"] == "train/loss"]
    assert loss == sorted(loss)
    assert len(loss) == 13
    bad = next(row for row in rows if row["key"] == "val/acc")
    assert (bad["value"], bad["nan_count"], bad["bad_rank"], bad["min_rank"]) == ("", "2", "0", "")
    assert {row["key"] for row in rows} >= {HOSTILE}


def test_jsonl_is_strict_json(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.point("x", 0, math.nan, max=math.inf, min=-math.inf)
    maker.point("x", 1, 0.1 + 0.2)
    maker.finish()
    lines = call("export", tmp_path / "r", "--format", "jsonl").splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["value"], first["max"], first["min"]) == (None, "Infinity", "-Infinity")
    assert second["value"] == 0.1 + 0.2
    assert list(second) == list(export.COLUMNS)


def test_parquet_holds_the_same(runs, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    call("export", "run-a", "--format", "parquet", "-o", tmp_path / "run.parquet")
    table = parquet.read_table(tmp_path / "run.parquet")
    assert table.column_names == list(export.COLUMNS)
    rows = table.to_pylist()
    plain = [json.loads(line) for line in call("export", "run-a", "--format", "jsonl").splitlines()]
    assert rows == plain


def test_parquet_without_pyarrow_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"ddplog\[parquet\]"):
        call("export", "run-a", "--format", "parquet")


def test_an_empty_run_exports_to_an_empty_table(runs, tmp_path):
    assert call("export", "run-b", "--format", "csv") == ",".join(export.COLUMNS) + "\n"
    assert call("export", "run-b", "--format", "jsonl") == ""
    parquet = pytest.importorskip("pyarrow.parquet")
    call("export", "run-b", "--format", "parquet", "-o", tmp_path / "e.parquet")
    assert parquet.read_table(tmp_path / "e.parquet").num_rows == 0


def test_parquet_flushes_row_groups(runs, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(export._ParquetWriter, "ROWS", 10)
    call("export", "run-a", "--format", "parquet", "-o", tmp_path / "g.parquet")
    file = parquet.ParquetFile(tmp_path / "g.parquet")
    assert file.num_row_groups > 1
    assert file.metadata.num_rows == 31
    file.close()


def test_keys_are_chosen_by_glob(runs):
    text = call("export", "run-a", "--format", "csv", "--keys", "val/*", "--keys", "tok*")
    assert {row["key"] for row in csv.DictReader(io.StringIO(text))} == {"val/acc", "tokens"}
    with pytest.raises(UsageError, match="fits none"):
        call("export", "run-a", "--format", "csv", "--keys", "nope*")


def test_a_failed_export_leaves_no_file(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export._CsvWriter, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("export", "run-a", "--format", "csv", "-o", tmp_path / "part.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    with pytest.raises(ConfigError, match="output"):
        call("export", "run-a", "--format", "csv", "-o", tmp_path / "no" / "such.csv")


# Top.


def test_top_of_a_run_that_is_not_live_prints_once(runs):
    for arguments in ((), ("--once",)):
        text = call("top", "run-a", *arguments)
        assert "failed (why)" in text
        assert text.count("train/loss") == 1


@pytest.fixture
def live(runs):
    """A run whose aggregator, as far as the files say, is this process."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        maker = RunMaker(runs / "run-live")
        maker.control()
        socket = Path(folder) / "c.sock"
        (maker.folder / "control.json").write_text(
            json.dumps({**json.loads((maker.folder / "control.json").read_text()), "socket": str(socket)})
        )
        yield socket
        maker.close()


def test_top_asks_the_aggregator(live):
    reply = StatusReply(run_id="run-live", name="from-the-aggregator", status="running", ranks=[RankStatus(rank=3)])
    with ControlServer(live, status=lambda: reply, finish=lambda _: FinishReply()):
        assert "from-the-aggregator" in call("top", "run-live", "--once")


def test_top_falls_back_to_the_store(live):
    found = CliRunner().invoke(cli, ["top", "run-live"], catch_exceptions=False)
    assert found.exit_code == 0
    assert "run-live  running" in found.stdout
    assert "does not answer" in found.stderr


# Completion.


def test_run_ids_are_completed(runs, monkeypatch):
    monkeypatch.setenv("_DDPLOG_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ddplog show run-")
    monkeypatch.setenv("COMP_CWORD", "2")
    (runs / "run-junk").mkdir()
    found = CliRunner().invoke(cli, [], prog_name="ddplog", complete_var="_DDPLOG_COMPLETE")
    assert found.stdout.split() == ["plain,run-b", "plain,run-a"]
