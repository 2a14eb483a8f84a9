"""The report page: self-contained, escaped, and with the data it claims to have."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from store.test_step_times import entry
from view.run_maker import HOSTILE, RunMaker, typical

from ddplog.store.rank_log import RankLog
from ddplog.store.reader import open_run
from ddplog.view import report


class Page(HTMLParser):
    """Every tag with its attributes, every script's text, and the text people see."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.words, self._open = [], {}, [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("script", "style"):
            self._open = attrs.get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data):
        if self._open is None:
            self.words.append(data)
        else:
            self.scripts[self._open] = data

    def charts(self):
        cards = [attrs for tag, attrs in self.tags if tag == "article"]
        return {card["data-key"]: json.loads(self.scripts[f"chart-{card['data-chart']}"]) for card in cards}


def column(chart, name):
    packed = chart["columns"][name]
    if "c" in packed:
        return [packed["c"]] * chart["length"]
    return np.frombuffer(base64.b64decode(packed["b"]), dtype=f"<{packed['t']}").tolist()


def write(run, tmp_path):
    text = report.write_report(run, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def page(tmp_path):
    with open_run(typical(tmp_path / "run-a", name=HOSTILE).finish("failed", f"why {HOSTILE}")) as run:
        return write(run, tmp_path)


def test_the_page_loads_nothing(page):
    _, parsed = page
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "onerror", "onload"} & set(attrs)
        assert attrs.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    styles = parsed.scripts["style"]
    assert "url(" not in styles
    assert "@import" not in styles


def test_hostile_words_stay_words(page):
    text, parsed = page
    assert "<img" not in text
    assert "\x1b" not in text
    assert len(re.findall("</script", text, re.IGNORECASE)) == sum(tag == "script" for tag, _ in parsed.tags)
    assert any("evil\\x1b[2J</script><img" in word for word in parsed.words)
    assert "evil\\x1b[2J</script><img" in json.loads(parsed.scripts["page"])["marks"][-1]["text"]


def test_the_charts_hold_the_points(page):
    charts = page[1].charts()
    loss = charts["train/loss"]
    assert column(loss, "step") == list(range(10))
    np.testing.assert_allclose(column(loss, "value")[6:9], [-6, -7, -8])
    np.testing.assert_allclose(column(loss, "high")[1], 1.0)
    assert column(loss, "attempt") == [1, 1, 1, 1, 1, 1, 2, 2, 2, 1]
    assert column(loss, "max_rank") == [1] * 10
    assert math.isnan(column(charts["val/acc"], "value")[0])
    assert column(charts["val/acc"], "bad") == [2, 0]
    assert [line["label"] for line in charts["per_rank"]["lines"]] == ["rank 0", "rank 1"]


def test_a_scaled_reduction_is_not_drawn_in_the_ranks_band(tmp_path):
    """A sum lies far above every rank's own value: the band would be a line at the bottom."""
    maker = RunMaker(tmp_path / "r")
    for step in range(5):
        maker.point("tokens", step, 100.0, mean=50.0, min=40.0, max=60.0)
    maker.db.execute("UPDATE keys SET reduce='sum'")
    with open_run(maker.finish()) as run:
        text, parsed = write(run, tmp_path)
    chart = parsed.charts()["tokens"]
    assert not chart["band_fits"]
    assert column(chart, "mean") == [50.0] * 5
    assert "mean over ranks" in text


def test_attempts_and_events_are_marked(page):
    data = json.loads(page[1].scripts["page"])
    attempt, event = data["marks"]
    assert (attempt["attempt"], attempt["step"], attempt["label"]) == (True, 6, "attempt 2")
    assert (event["attempt"], event["step"], event["level"]) == (False, 6, "error")


def test_the_tables_tell_of_ranks_drops_and_sinks(page):
    words = " ".join(page[1].words)
    for expected in (
        "Which ranks are extreme", "signal 9 (SIGKILL)", "407 values logged = 400 stored + 7 dropped",
        "spool_full", "tensorboard", "retrying", "2 NaN, first at step 4, rank 0",
    ):  # fmt: skip
        assert expected in words


def test_a_large_series_is_thinned_and_says_so(tmp_path):
    maker = RunMaker(tmp_path / "r")
    maker.attempt(1, 2)
    maker.db.execute("BEGIN")
    for step in range(9000):
        maker.point("loss", step, 50.0 if step == 4321 else 1.0 + step % 7, min=0.5, max=60.0 if step == 77 else 9.0)
    maker.db.execute("COMMIT")
    with open_run(maker.finish()) as run:
        text, parsed = write(run, tmp_path)
    loss = parsed.charts()["loss"]
    assert loss["length"] <= 2000
    assert max(column(loss, "value")) == 50.0
    assert max(column(loss, "high")) == 60.0
    assert f"{loss['length']:,} of 9,000 points" in text
    assert "shown with fewer points than stored" in text


@pytest.mark.parametrize(("num_ranks", "num_lines"), [(3, 3), (20, 2)])
def test_step_times_are_lines_or_a_band(tmp_path, num_ranks, num_lines):
    maker = RunMaker(tmp_path / "r")
    maker.attempt(1, num_ranks)
    maker.point("x", 0, 1.0)
    log = RankLog(maker.folder / "ranks")
    for rank in range(num_ranks):
        took = 0.5 if rank == 2 else 0.1
        one = entry(rank, [(step, step * took) for step in range(50)])
        log.append(
            writer_id=rank, attempt=1, rank=rank, incarnation=one.incarnation, first_seq=0, num_records=50,
            payload=one.payload,
        )  # fmt: skip
    log.close()
    with open_run(maker.finish()) as run:
        text, parsed = write(run, tmp_path)
    chart = parsed.charts()["step time per rank"]
    assert len(chart["lines"]) == num_lines
    assert "slowest on average: rank 2, 500 ms" in text
    if num_ranks > report.MAX_LINES:
        assert chart["lines"][0]["label"] == "rank 2"
        assert set(column(chart, "max_rank")) == {2}


def test_an_empty_run_has_a_page(tmp_path):
    with open_run(RunMaker(tmp_path / "r").finish()) as run:
        _, parsed = write(run, tmp_path)
    assert any("no points yet" in word for word in parsed.words)
    assert parsed.charts() == {}


def test_values_that_are_all_nan_or_inf_have_a_chart(tmp_path):
    maker = RunMaker(tmp_path / "r")
    for step in range(3):
        maker.point("nan", step, math.nan)
        maker.point("inf", step, math.inf, inf_count=2, bad_rank=0)
        maker.rank_point("none", step, 0, None)
    with open_run(maker.finish()) as run:
        _, parsed = write(run, tmp_path)
    assert set(parsed.charts()) == {"nan", "inf", "none"}


def test_progress_is_told_and_the_file_is_replaced_whole(tmp_path):
    told = []
    with open_run(typical(tmp_path / "r").finish()) as run:
        target = tmp_path / "page.html"
        target.write_text("old")
        assert report.write_report(run, target, lambda done, total: told.append((done, total))) == target
    assert told == [(i, 5) for i in range(1, 6)]
    assert target.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_vendored_script_can_stand_in_a_page():
    for name in ("uPlot.iife.min.js", "report.js"):
        assert "</" not in report._static(name)
        assert "<!--" not in report._static(name)
