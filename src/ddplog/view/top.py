"""Decides how a live run looks (`render`), and owns the loop that shows it (`watch`).

What it shows comes as control.proto's StatusReply: from the aggregator while the run lives, else made from the store.
Talks to no aggregator itself: the caller hands in the replies.
"""

from __future__ import annotations

import os
import queue
import select
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ddplog.errors import DdplogError
from ddplog.view.text import count, interest, number, seconds, size, status_words, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console, RenderableType

    from ddplog.store.reader import Run
    from ddplog.v1.control_pb2 import RankStatus, StatusReply

MAX_RANKS: Final = 32
"""More ranks than this and only the slowest and the most idle are listed."""

NUM_EXTREME: Final = 12
MAX_VALUES: Final = 12
_IDLE_WARN_S: Final = 10.0
_MAX_WORST: Final = 4
_LIVING: Final = ("running", "straggler", "idle", "waiting", "hung", "unseen")


def render(reply: StatusReply) -> RenderableType:
    """Return one frame of the live view."""
    parts: list[RenderableType] = [_heading(reply), "", _ranks(reply)]
    if any(rank.drops for rank in reply.ranks):
        parts += ["", _drops(reply)]
    if reply.last_values:
        parts += ["", _values(reply)]
    if reply.sinks:
        parts += ["", _sinks(reply)]
    return Group(*parts)


def reply_from_run(run: Run) -> StatusReply:
    """Make the reply that the run's aggregator would have given last, from the store."""
    from ddplog.v1.control_pb2 import DropCount, LastValue, RankStatus, SinkStatus, StatusReply

    attempts, writers, now_s = run.attempts, run.writers(), time.time()
    newest = attempts[-1].attempt if attempts else 0
    dropped: dict[int, dict[str, int]] = {}
    for drop in run.drops():
        dropped.setdefault(drop.writer_id, {})[drop.reason] = drop.count
    lives = {writer.rank: writer for writer in writers if writer.attempt == newest}
    ranks = []
    for _, writer in sorted(lives.items()):
        rank = RankStatus(
            rank=writer.rank,
            host=writer.host,
            pid=max(writer.pid, 0),
            state=writer.state,
            next_seq=writer.next_seq,
            num_values=writer.num_values,
            num_drops=sum(dropped.get(writer.writer_id, {}).values()),
            drops=[DropCount(reason=r, count=c) for r, c in sorted(dropped.get(writer.writer_id, {}).items())],
        )
        if writer.step is not None:
            rank.step = writer.step
        ranks.append(rank)
    reply = StatusReply(
        run_id=run.run_id,
        project=run.project,
        name=run.name,
        status=run.status,
        status_detail=run.detail,
        attempt=newest,
        world_size=attempts[-1].world_size if attempts else 0,
        ranks=ranks,
        sinks=[
            SinkStatus(
                name=s.name,
                state=s.state,
                cursor=s.cursor,
                lag=s.lag,
                detail=s.detail,
                num_delivered=s.num_delivered or 0,
                num_dead=s.num_dead,
            )
            for s in run.sink_states()
        ],
        num_points=run.num_points,
        time_unix_ns=int((run.ended.timestamp() if run.ended else now_s) * 1e9),
        started_unix_ns=int(run.created.timestamp() * 1e9),
        last_values=[
            LastValue(key=metric.key, step=int(metric.last.step[-1]), value=float(metric.last.value[-1]))
            for metric in run.metrics()
            if len(metric.last)
        ],
    )
    if run.watermark is not None:
        reply.watermark = run.watermark
    return reply


def watch(replies: Iterable[StatusReply], console: Console) -> StatusReply | None:
    """Show replies as they come, until they end, or the user presses q or Ctrl-C. Blocks.

    Args:
        replies: Taken from another thread, which is left behind blocked in it when the user goes: the caller
            closes whatever feeds it.
        console: Where to show it; keys are read where its input is a terminal.

    Returns:
        The last reply shown.

    Raises:
        DdplogError: If the replies broke off with one.
    """
    last: StatusReply | None = None
    if not console.is_terminal:
        for last in replies:
            console.print(render(last), "")
        return last
    box: queue.SimpleQueue[StatusReply | DdplogError | None] = queue.SimpleQueue()
    awake, bell = os.pipe()
    threading.Thread(target=_pump, args=(replies, box, bell), name="ddplog-top", daemon=True).start()
    try:
        with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
            for reply in _replies(box, awake, keyboard):
                last = reply
                live.update(Group(render(reply), "", Text("q leaves", style="dim")), refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        os.close(awake)  # the pump's next write fails, which ends it
    if last is not None:
        console.print(render(last))
    return last


def _pump(replies: Iterable[StatusReply], box: queue.SimpleQueue[StatusReply | DdplogError | None], bell: int) -> None:
    try:
        try:
            for reply in replies:
                box.put(reply)
                os.write(bell, b".")
        except DdplogError as exc:
            box.put(exc)
        box.put(None)
        os.write(bell, b".")
    except BrokenPipeError:
        pass
    finally:
        os.close(bell)


def _replies(
    box: queue.SimpleQueue[StatusReply | DdplogError | None], awake: int, keyboard: int | None
) -> Iterator[StatusReply]:
    """Yield what the pump took, newest only, until it or the user ends."""
    while True:
        ready, _, _ = select.select([awake] if keyboard is None else [awake, keyboard], [], [])
        if keyboard in ready and os.read(keyboard or 0, 32).lower()[:1] in (b"q", b"\x03", b""):
            return
        if awake not in ready:
            continue
        rings = os.read(awake, 4096)
        if not rings:
            return
        got: StatusReply | None = None
        for _ in rings:
            item = box.get()
            if isinstance(item, DdplogError):
                raise item
            if item is None:
                if got is not None:
                    yield got
                return
            got = item
        if got is not None:
            yield got


@contextmanager
def _keys() -> Iterator[int | None]:
    """Read single keys from the terminal while the context lasts; None where there is none."""
    import termios
    import tty

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _heading(reply: StatusReply) -> RenderableType:
    line = Text()
    line.append_text(words(reply.name or reply.run_id, "bold")).append("  ")
    line.append_text(status_words(reply.status, reply.status_detail))
    facts = [f"project {reply.project}"] if reply.project else []
    if reply.started_unix_ns and reply.time_unix_ns > reply.started_unix_ns:
        facts.append(seconds((reply.time_unix_ns - reply.started_unix_ns) / 1e9))
    facts.append(f"{reply.world_size} ranks")
    if reply.attempt > 0:
        facts.append(f"attempt {reply.attempt}")
    if reply.HasField("watermark"):
        facts.append(f"watermark {count(reply.watermark)}")
    facts.append(f"{count(reply.num_points)} points")
    if reply.num_values:
        facts.append(f"{count(reply.num_values)} values")
    parts: list[RenderableType] = [line, words("  ".join(facts), "dim")]
    if reply.hang:
        parts.append(words(f"hangs: {reply.hang} (ddplog stacks {reply.run_id})", "bold red", limit=400))
    return Group(*parts)


def _ranks(reply: StatusReply) -> RenderableType:
    if not reply.ranks:
        return Text("no rank has joined yet", style="dim")
    shown = sorted(reply.ranks, key=lambda rank: rank.rank)
    if len(shown) > MAX_RANKS:
        shown = _extremes(shown)
    newest = max((rank.step for rank in reply.ranks if rank.HasField("step")), default=0)
    table = _table(">rank", "host", "state", ">step", ">behind", ">steps/s", ">idle", ">backlog", ">drops")
    for rank in shown:
        _add_rank(table, rank, newest)
    if len(shown) == len(reply.ranks):
        return table
    return Group(table, _totals(reply.ranks, len(shown)))


def _add_rank(table: Table, rank: RankStatus, newest: int) -> None:
    behind = newest - rank.step if rank.HasField("step") else None
    is_idle = rank.state in _LIVING and rank.idle_s >= _IDLE_WARN_S
    table.add_row(
        str(rank.rank),
        words(rank.host, limit=40),
        status_words(rank.state),
        count(rank.step) if rank.HasField("step") else "-",
        "-" if behind is None else count(behind),
        f"{rank.steps_per_s:.2f}" if rank.steps_per_s else "-",
        Text(seconds(rank.idle_s) if rank.state in _LIVING else "", style="yellow" if is_idle else ""),
        size(rank.backlog_bytes),
        Text(count(rank.num_drops), style="yellow" if rank.num_drops else ""),
    )


def _extremes(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Choose who is worth a line: hung, died, dropping, slowest, most idle."""
    quiet = ("running", "finished", "idle", "straggler", "waiting", "missing")
    troubled = [rank for rank in ranks if rank.state not in quiet or rank.num_drops]
    troubled.sort(key=lambda rank: rank.state != "hung")
    running = [rank for rank in ranks if rank.state in _LIVING]
    slowest = sorted(running, key=lambda rank: (rank.step if rank.HasField("step") else -1, rank.steps_per_s))
    idle = sorted(running, key=lambda rank: -rank.idle_s)
    chosen = {rank.rank: rank for rank in (*troubled[:NUM_EXTREME], *slowest[:NUM_EXTREME], *idle[: NUM_EXTREME // 2])}
    return [chosen[rank] for rank in sorted(chosen)] or list(ranks[:NUM_EXTREME])


def _totals(ranks: Sequence[RankStatus], num_shown: int) -> Text:
    states: dict[str, int] = {}
    for rank in ranks:
        states[rank.state] = states.get(rank.state, 0) + 1
    steps = [rank.step for rank in ranks if rank.HasField("step")]
    facts = [f"{count(number_)} {state}" for state, number_ in sorted(states.items())]
    if steps:
        facts.append(f"steps {count(min(steps))} .. {count(max(steps))}")
    facts.append(f"backlog {size(sum(rank.backlog_bytes for rank in ranks))}")
    facts.append(f"{count(sum(rank.num_drops for rank in ranks))} drops")
    return words(f"all {len(ranks)} ranks: {', '.join(facts)}; the {num_shown} slowest and most idle above", "dim")


def _drops(reply: StatusReply) -> RenderableType:
    """Return why values were not taken, by reason: how many, and of which ranks the most."""
    table = _table("dropped because", ">values", "ranks")
    by_reason: dict[str, dict[int, int]] = {}
    for rank in reply.ranks:
        for drop in rank.drops:
            by_rank = by_reason.setdefault(drop.reason, {})
            by_rank[rank.rank] = by_rank.get(rank.rank, 0) + drop.count
    for reason, by_rank in sorted(by_reason.items()):
        worst = sorted(by_rank, key=lambda number_: (-by_rank[number_], number_))
        shown = ", ".join(f"{number_} ({count(by_rank[number_])})" for number_ in worst[:_MAX_WORST])
        more = f" and {len(worst) - _MAX_WORST} more" if len(worst) > _MAX_WORST else ""
        table.add_row(words(reason, "yellow"), count(sum(by_rank.values())), shown + more)
    return table


def _values(reply: StatusReply) -> RenderableType:
    table = _table("metric", ">step", ">last")
    found = sorted(reply.last_values, key=lambda value: interest(value.key))
    for value in found[:MAX_VALUES]:
        table.add_row(words(value.key, limit=60), count(value.step), number(value.value))
    if len(found) > MAX_VALUES:
        return Group(table, Text(f"and {len(found) - MAX_VALUES} more metrics", style="dim"))
    return table


def _sinks(reply: StatusReply) -> RenderableType:
    table = _table("sink", "state", ">delivered", ">refused", ">lag", "detail")
    for sink in reply.sinks:
        table.add_row(
            words(sink.name),
            status_words(sink.state),
            count(sink.num_delivered),
            Text(count(sink.num_dead), style="yellow" if sink.num_dead else ""),
            count(sink.lag),
            words(sink.detail),
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table
