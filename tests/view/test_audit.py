"""The delivery audit: every row adds up, or says by how much it does not; where it is shown."""

import json

import pytest
from rich.console import Console
from view.run_maker import RunMaker

from ddplog.cli.show import _as_dict
from ddplog.store.reader import open_run
from ddplog.v1.control_pb2 import RankStatus, StatusReply
from ddplog.view import tables, top
from ddplog.view.audit import rank_audits, sink_audits
from ddplog.view.report import write_report
from ddplog.view.stacks import as_dicts, render, stored

STACK = """Current thread 0x00007f1 (most recent call first):
  File "/home/u/train.py", line {line} in step
"""


def shown(renderable):
    console = Console(width=200, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


@pytest.fixture
def maker(tmp_path):
    maker = RunMaker(tmp_path / "r1", sinks=["jsonl"])
    maker.attempt(0, 3)
    for rank in range(2):
        maker.writer(rank, attempt=0, world_size=3, num_values=100)
    return maker


def sink(maker, **state):
    folder = maker.folder / "sinks" / "jsonl"
    folder.mkdir(parents=True)
    row = {"name": "jsonl", "state": "running", "lag": 0, "detail": "", "time_unix_ns": 1, **state}
    (folder / "state.json").write_text(json.dumps(row))


def emit(maker, count):
    for step in range(count):
        maker.point("x", step, 1.0, attempt=0)
    maker.meta("next_id", maker.next_id)


def test_of_every_rank_logged_is_stored_and_dropped_by_reason(maker):
    maker.drop(1, "spool_full", 7)
    maker.drop(1, "bad_value", 2)
    maker.drop(1, "bad_weight", 5)
    maker.drop(9, "key_limit", 1)  # of a writer that the store does not know: shown, never left out
    with open_run(maker.finish()) as run:
        rows = rank_audits(run.writers(), run.drops())
        text = shown(tables.show(run)) + shown(tables.summary(run))
    assert [(row.rank, row.logged, row.stored, row.num_dropped) for row in rows] == [
        (-1, 1, 0, 1), (0, 109, 100, 9), (1, 100, 100, 0),
    ]  # fmt: skip
    assert text.count("210 values logged = 200 stored + 10 dropped") == 2
    for reason in ("spool_full", "bad_value", "bad_weight", "key_limit"):
        assert text.count(reason) == 2, "in `show` and in the summary at the end of a job"
    assert "1 of 3 ranks have not appeared: 2" in text


@pytest.mark.parametrize(
    ("state", "missing", "said"),
    [
        ({"cursor": 6, "num_delivered": 5, "num_dead": 1}, 0, "10 emitted = 5 delivered + 1 refused + 4 waiting"),
        ({"cursor": 10, "num_delivered": 10, "num_dead": 0}, 0, "10 emitted = 10 delivered + 0 refused + 0 waiting"),
        ({"cursor": 10, "num_delivered": 8, "num_dead": 0}, 2, "2 lost"),
        ({"cursor": 10, "num_delivered": 11, "num_dead": 0}, -1, "1 too many"),
        ({"cursor": 10}, 0, ""),
    ],
)
def test_of_every_sink_emitted_is_delivered_refused_and_waiting(maker, state, missing, said):
    emit(maker, 10)
    sink(maker, **state)
    with open_run(maker.finish()) as run:
        (row,) = sink_audits(run)
        assert row.missing == missing
        assert said in shown(tables.summary(run))
        line = next(line for line in shown(tables.show(run)).splitlines() if line.startswith("jsonl "))
        found = _as_dict(run, None)["audit"]["sinks"][0]
        write_report(run, maker.folder / "report.html")
    delivered = "-" if row.delivered is None else str(row.delivered)
    assert line.split()[4:8] == ["10", delivered, str(row.refused), str(row.waiting)]
    assert (found["emitted"], found["missing"]) == (10, missing)
    assert "missing" in (maker.folder / "report.html").read_text()


def test_a_value_of_a_rank_that_was_replaced_may_have_been_delivered_or_not(maker):
    """Its first emission has no row any more: delivered twice, or once, and neither is a loss."""
    emit(maker, 10)
    maker.meta("replaced", 2)
    sink(maker, cursor=10, num_delivered=11, num_dead=0)
    with open_run(maker.finish()) as run:
        (row,) = sink_audits(run)
        text = shown(tables.summary(run))
    assert (row.emitted, row.missing) == (12, 0)
    assert "2 of them replaced" in text


def test_top_names_every_reason_with_its_count_and_ranks(maker):
    maker.drop(1, "spool_full", 7)
    maker.drop(2, "spool_full", 70)
    maker.drop(2, "key_limit", 1)
    with open_run(maker.finish()) as run:
        text = shown(top.render(top.reply_from_run(run)))
    lines = [line.split() for line in text.splitlines() if line.startswith(("spool_full", "key_limit"))]
    assert lines == [["key_limit", "1", "1", "(1)"], ["spool_full", "77", "1", "(70),", "0", "(7)"]]


def test_show_says_how_the_ranks_of_a_live_run_stand(maker):
    maker.db.execute("UPDATE writers SET state = 'running'")
    maker.event("hang", "rank 1 has not moved for 300.0 s", rank=1, attempt=0)
    maker.control()
    live = StatusReply(ranks=[RankStatus(rank=1, pid=1001, state="hung", idle_s=301.0)])
    with open_run(maker.close()) as run:
        text = shown(tables.show(run, live))
        found = _as_dict(run, live)
    assert "hangs: rank 1 has not moved for 300.0 s (ddplog stacks r1)" in text
    assert "hung (for 5m 01s)" in text
    assert found["hang"].startswith("rank 1 has not moved")
    assert [rank["standing"] for rank in found["ranks"]] == ["running", "hung"]


@pytest.mark.parametrize("how", ["over", "ended", "another attempt"])
def test_a_hang_that_is_over_is_not_shown_as_one(maker, how):
    maker.event("hang", "rank 1 has not moved for 300.0 s", rank=1, attempt=0)
    if how == "over":
        maker.event("hang_over", "it moved again", rank=1, attempt=0)
    if how == "another attempt":
        maker.attempt(1, 3)
    maker.control()
    with open_run(maker.finish() if how == "ended" else maker.close()) as run:
        assert tables.hanging(run) is None
        assert "hangs:" not in shown(tables.show(run))


def test_the_last_stacks_of_each_rank_are_shown_together_where_they_are_equal(maker):
    for rank, line in ((0, 17), (1, 17), (1, 99), (2, 17)):
        maker.event(
            "stack", f"rank {rank} is in step", rank=rank, step=4, attempt=0, data={"text": STACK.format(line=line)}
        )
    maker.event("stack", "no stack of rank 3: it is stopped", rank=3, attempt=0, data={"text": ""})
    with open_run(maker.finish()) as run:
        found = stored(run)
        text = shown(render(found))
        write_report(run, maker.folder / "report.html")
    assert text.index("train.py:99") < text.index("train.py:17"), "the odd one first"
    assert text.count("Current thread") == 2
    assert "rank 3: no stack of rank 3: it is stopped" in text
    assert [(row["rank"], row["at"], row["trouble"] is None) for row in as_dicts(found)] == [
        (0, "step (train.py:17)", True), (1, "step (train.py:99)", True), (2, "step (train.py:17)", True),
        (3, None, False),
    ]  # fmt: skip
    html = (maker.folder / "report.html").read_text()
    assert "Python stacks" in html
    assert html.count("line 17 in step") == 1
