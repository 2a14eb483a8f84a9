"""The live view: frames from replies, and the loop around them."""

from __future__ import annotations

import io
import os
import pty
from contextlib import suppress

import pytest
from rich.console import Console
from view.run_maker import HOSTILE, RunMaker, typical
from view.test_tables import shown

from ddplog.errors import DdplogError
from ddplog.store.reader import open_run
from ddplog.v1.control_pb2 import LastValue, RankStatus, SinkStatus, StatusReply
from ddplog.view import top


def reply(num_ranks, **more):
    ranks = [
        RankStatus(
            rank=i, host=f"n{i}", state="running", step=1000 - i, steps_per_s=2.5, idle_s=0.1, backlog_bytes=2048
        )
        for i in range(num_ranks)
    ]
    return StatusReply(
        run_id="r", name="r", status="running", world_size=num_ranks, ranks=ranks, started_unix_ns=1,
        time_unix_ns=61_000_000_001, watermark=990, num_points=12, **more,
    )  # fmt: skip


def test_a_frame_shows_ranks_values_and_sinks():
    text = shown(
        top.render(
            reply(
                2,
                last_values=[LastValue(key="lr", step=9, value=0.1), LastValue(key="train/loss", step=9, value=0.25)],
                sinks=[SinkStatus(name="tensorboard", state="retrying", cursor=5, lag=7, detail=HOSTILE)],
            )
        )
    )
    assert "1m 01s" in text
    assert "watermark 990" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "n0", "running", "1,000", "0", "2.50", "100", "ms", "2.0", "KiB", "0"] in rows
    assert text.index("train/loss") < text.index("lr ")
    assert "\x1b" not in text


def test_a_rank_without_a_step_is_shown():
    text = shown(top.render(StatusReply(run_id="r", ranks=[RankStatus(rank=0, state="running")])))
    assert ["0", "running", "-", "-", "-", "0", "ms", "0", "B", "0"] in [line.split() for line in text.splitlines()]


def test_a_large_world_shows_the_slowest_the_idle_and_the_dead():
    big = reply(4096)
    big.ranks[7].state = "died"
    big.ranks[9].idle_s = 99
    text = shown(top.render(big))
    ranks = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {"7", "9", "4095", "4090"} <= ranks
    assert "2000" not in ranks
    assert len(text.splitlines()) < 50
    assert "all 4096 ranks: 1 died, 4,095 running" in text
    assert "8.0 MiB" in text


def test_a_finished_large_world_is_shown():
    big = reply(40)
    for rank in big.ranks:
        rank.state = "finished"
    assert "40 finished" in shown(top.render(big))


def test_the_store_gives_the_reply_of_a_run_that_is_not_live(tmp_path):
    with open_run(typical(tmp_path / "r").finish("failed", "why")) as run:
        made = top.reply_from_run(run)
    assert (made.status, made.status_detail, made.attempt, made.world_size) == ("failed", "why", 2, 2)
    assert [(rank.rank, rank.step) for rank in made.ranks] == [(0, 9), (1, 9)]
    assert {value.key for value in made.last_values} >= {"train/loss", "tokens"}
    assert "failed (why)" in shown(top.render(made))


def test_an_empty_run_gives_a_frame(tmp_path):
    with open_run(RunMaker(tmp_path / "r").finish()) as run:
        assert "no rank has joined yet" in shown(top.render(top.reply_from_run(run)))


def test_without_a_terminal_each_frame_is_printed():
    out = io.StringIO()
    last = top.watch(iter([reply(1), reply(2)]), Console(file=out, width=150))
    assert len(last.ranks) == 2
    assert out.getvalue().count("watermark") == 2


class Terminal:
    """Stands for sys.stdin: the near end of a pseudo-terminal."""

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def fileno(self):
        return self._descriptor


@pytest.fixture
def keyboard(monkeypatch):
    far, near = pty.openpty()
    monkeypatch.setattr("sys.stdin", Terminal(near))
    yield far
    os.close(far)
    os.close(near)


def test_on_a_terminal_q_leaves(keyboard):
    """The replies never end by themselves: only the key ends this test."""

    def replies():
        while True:
            yield reply(1)
            with suppress(OSError):  # the pump may outlive the keyboard
                os.write(keyboard, b"q")
            yield reply(3)

    screen = io.StringIO()
    top.watch(replies(), Console(file=screen, force_terminal=True, width=150, height=50))
    assert "\x1b[?1049l" in screen.getvalue()  # the screen was given back


def test_on_a_terminal_the_end_of_the_replies_leaves(keyboard):
    screen = io.StringIO()
    last = top.watch(iter([reply(1), reply(2)]), Console(file=screen, force_terminal=True, width=150, height=50))
    assert len(last.ranks) == 2


def test_a_lost_aggregator_is_the_callers_to_tell(keyboard):
    def replies():
        yield reply(1)
        raise DdplogError("gone")

    with pytest.raises(DdplogError, match="gone"):
        top.watch(replies(), Console(file=io.StringIO(), force_terminal=True, width=150, height=50))
