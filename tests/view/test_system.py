"""What samplers measured has a place of its own on the terminal and in the report."""

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console
from view.run_maker import RunMaker
from view.test_report import Page, column

from ddplog.cli.main import cli
from ddplog.errors import DdplogError
from ddplog.store.reader import open_run
from ddplog.view import report, tables


@pytest.fixture
def run(tmp_path):
    maker = RunMaker(tmp_path / "r1")
    maker.attempt(1, 2)
    for rank in (0, 1):
        maker.writer(rank)
    samples = maker.writer(0, role="system", next_seq=7)
    for step in range(3):
        maker.point("loss", step, 1.0)
    for second in (0, 5, 10):
        more = {"time_unix_ns": 1_785_000_000_000_000_000 + second * 10**9}
        maker.point("sys/gpu/util_pct", second, 60.0, min=40.0, min_rank=1, max=80.0, max_rank=0, **more)
        maker.point("sys/gpu/mem_used_bytes", second, 3 * 2.0**30, min=2.0**30, max=5 * 2.0**30, **more)
        maker.point("sys/gpu/throttle/idle", second, 0.0)
        maker.point("sys/gpu/throttle/hw_slowdown", second, 0.5, min=0.0, max=1.0)
        maker.point("sys/host/disk_read_bytes_per_s", second, 2048.0, n=1, min_rank=0, max_rank=0)
        maker.point("sys/step", second, 100.0 * second)
    maker.event("alert", "XID 79: rank 1", rank=1, level="error")
    maker.drop(samples, "disk_full", 12)
    with open_run(maker.finish()) as opened:
        yield opened


def shown(renderable):
    console = Console(width=160, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def section(text, title):
    lines = text.splitlines()
    start = lines.index(title) + 1
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [line.split() for line in lines[start:end]]


def test_show_has_a_table_of_the_last_values_and_who_has_the_extremes(run):
    text = shown(tables.show(run))
    rows = section(text, "System")

    assert rows[:2] == [
        ["sampled", "at", "mean", "min", "max", "ranks"],
        ["gpu/mem_used_bytes", "10.0", "s", "3.0", "GiB", "1.0", "GiB", "r0", "5.0", "GiB", "r1", "2/2"],
    ]
    assert ["gpu/util_pct", "10.0", "s", "60", "40", "r1", "80", "r0", "2/2"] in rows
    assert ["host/disk_read_bytes_per_s", "10.0", "s", "2.0", "KiB/s", "1/2"] in rows
    assert "throttle/hw_slowdown" in text
    assert "throttle/idle" not in text, "what is 0 says nothing"
    assert "12 sampled values could not be written" in text
    assert [row[0] for row in section(text, "Metrics (1)")] == ["metric", "loss"]


def test_a_sampler_is_no_rank_in_any_table(run):
    text = shown(tables.show(run))
    assert len(section(text, "Ranks")) == 3
    assert "200 values logged = 200 stored + 0 dropped" in text
    assert "sys/" not in shown(tables.summary(run))


def test_a_run_without_samples_has_no_such_table(tmp_path):
    maker = RunMaker(tmp_path / "r1")
    maker.attempt(1, 1)
    maker.writer(0)
    maker.point("loss", 0, 1.0)
    with open_run(maker.finish()) as opened:
        assert "System" not in shown(tables.show(opened))
        assert 'id="system"' not in report.render(opened)


def test_the_report_draws_samples_over_time_in_a_section_of_their_own(run):
    text = report.render(run)
    charts = Page(text).charts()

    assert text.index('id="metrics"') < text.index('id="system"') < text.index('id="ranks"')
    assert (charts["loss"]["x"], charts["sys/gpu/util_pct"]["x"]) == ("step", "time")
    assert column(charts["sys/gpu/util_pct"], "time") == [0, 5, 10]
    metrics = text[text.index('id="metrics"') : text.index('id="system"')]
    assert 'data-key="loss"' in metrics
    assert 'data-key="sys/' not in metrics


def test_seconds_are_no_rows_among_steps(run):
    assert run.to_pandas().columns.tolist() == ["loss"]
    assert run.metric("sys/step").to_pandas().index.tolist() == [0, 5, 10]


def test_seconds_are_no_steps_of_an_attempt(tmp_path):
    """The mark of an attempt stands at its first training step."""
    maker = RunMaker(tmp_path / "r1")
    maker.attempt(1, 1)
    maker.attempt(2, 1)
    maker.point("loss", 40, 1.0, attempt=2)
    maker.point("sys/step", 5, 1.0, attempt=2)
    with open_run(maker.finish()) as opened:
        page = json.loads(Page(report.render(opened)).scripts["page"])
    assert [mark["step"] for mark in page["marks"] if mark["attempt"]] == [40]


def call(*words):
    done = CliRunner().invoke(cli, ["show", *map(str, words)], catch_exceptions=False)
    return done.output


def test_show_json_has_them_apart(run):
    found = json.loads(call(run.path, "--json"))
    assert [metric["key"] for metric in found["metrics"]] == ["loss"]
    assert {metric["key"] for metric in found["system"]["metrics"]} >= {"sys/gpu/util_pct", "sys/step"}
    assert [(drop["reason"], drop["count"]) for drop in found["system"]["drops"]] == [("disk_full", 12)]
    assert found["drops"] == []
    assert len(found["ranks"]) == 2


def test_every_ranks_values_are_asked_for_with_a_metric_and_need_the_rank_log(run):
    assert "--ranks goes with --metric" in call(run.path, "--ranks")
    with pytest.raises(DdplogError, match="rank_log_bytes"):
        call(run.path, "--metric", "loss", "--ranks")
