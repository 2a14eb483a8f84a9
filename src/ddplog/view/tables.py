"""Decides how a run looks on a terminal, as rich renderables. Prints nothing itself.

Everything a user or a rank named is escaped: a metric called ESC[2J must not clear the reader's screen.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ddplog.core.effects import SYSTEM
from ddplog.store.columns import RankColumns, SinkState
from ddplog.view.audit import rank_audits, sink_audits
from ddplog.view.stragglers import find_stragglers
from ddplog.view.system import parted, system_table
from ddplog.view.text import count, how_ended, interest, moment, number, seconds, status_words, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from ddplog.store.columns import Drop, Event, Metric, MetricColumns, Param, RunSummary, WriterInfo
    from ddplog.store.reader import Run
    from ddplog.v1.control_pb2 import RankStatus, StatusReply
    from ddplog.view.audit import RankAudit, SinkAudit
    from ddplog.view.stragglers import Straggler

MAX_RANKS: Final = 64
MAX_METRICS: Final = 100
MAX_EVENTS: Final = 20
MAX_PARAMS: Final = 60
MAX_SUMMARY_METRICS: Final = 12
MAX_SUMMARY_RANKS: Final = 8
MAX_AUDIT_RANKS: Final = 64
MAX_STRAGGLERS: Final = 8
_FOLDER_HASH: Final = re.compile(r"-[0-9a-f]{8}$")
"""What a sink with a target has behind its name in its folder's."""

_BAD_STATES: Final = ("died", "failed", "killed")


def runs(found: Sequence[RunSummary], now: datetime | None = None) -> RenderableType:
    """Return the table of `ddplog ls`.

    Args:
        found: The runs, in the order to show.
        now: The time a running run's age is counted to; the clock's if None.
    """
    now = now or datetime.now(timezone.utc)
    table = _table("run", "project", "name", "status", "started", ">took", ">ranks", ">points")
    for run in found:
        end = run.ended or (now if run.status == "running" else None)
        took = seconds((end - run.started).total_seconds()) if run.started and end else ""
        is_readable = run.status != "unreadable"
        table.add_row(
            words(run.run_id, "bold"),
            words(run.project),
            words(run.name if run.name != run.run_id else ""),
            status_words(run.status, run.detail),
            moment(run.started) if run.started else "",
            took,
            str(run.world_size) if is_readable else "",
            count(run.num_points) if is_readable else "",
        )
    return table


def show(run: Run, live: StatusReply | None = None) -> RenderableType:
    """Return everything `ddplog show` prints of a run.

    Args:
        run: The run.
        live: What its aggregator says of the ranks now, if it lives and answers.
    """
    writers, drops = run.writers(), run.drops()
    metrics, sampled = parted(run.metrics())
    parts: list[RenderableType] = [_heading(run)]
    hang = hanging(run)
    if hang is not None:
        parts.append(words(f"hangs: {hang.message} (ddplog stacks {run.run_id})", "bold red", limit=400))
    world_size = run.attempts[-1].world_size if run.attempts else 0
    parts += _titled("Ranks", ranks(writers, drops, world_size, live.ranks if live is not None else ()))
    stragglers = find_stragglers(run)
    parts += _titled("Stragglers", stragglers_table(stragglers)) if stragglers else []
    parts += _titled(f"Metrics ({len(metrics)})", metrics_table(metrics))
    parts += _titled("System", system_table(sampled, run.drops(SYSTEM))) if sampled else []
    params = run.params()
    parts += _titled(f"Params ({len(params)})", params_table(params[:MAX_PARAMS])) if params else []
    events = run.events()
    parts += _titled(f"Events ({len(events)})", events_table(events[-MAX_EVENTS:])) if events else []
    parts += _titled("Delivery audit: logged = stored + dropped", audit(writers, drops))
    sinks = sinks_table(run)
    parts += _titled("Sinks: emitted = delivered + refused + waiting", sinks) if sinks else []
    return Group(*parts)


def summary(run: Run) -> RenderableType:
    """Return what the launcher prints when a job has ended: the run in one panel.

    Args:
        run: The run. Read once, here.
    """
    own, _ = parted(run.metrics())
    metrics = sorted((m for m in own if len(m.last)), key=lambda metric: interest(metric.key))
    facts = _facts(run)
    for event in run.events():
        if event.kind in ("hang", "loss"):
            facts.add_row(event.kind, words(event.message, "yellow"))
    for straggler in find_stragglers(run)[:MAX_STRAGGLERS]:
        facts.add_row("straggler", Text(straggler.describe(), style="yellow"))
    audits = rank_audits(run.writers(), run.drops())
    facts.add_row("values", _ranks_total(audits))
    counts = {audit_.name: audit_ for audit_ in sink_audits(run)}
    for state in _sink_states(run):
        line = _sink_line(state)
        if state.name in counts and counts[state.name].delivered is not None:
            line.append_text(Text(": ", style="dim")).append_text(_sink_sum(counts[state.name]))
        facts.add_row(words(f"sink {state.name}"), line)
    parts: list[RenderableType] = [facts]
    if any(audit_.num_dropped for audit_ in audits):
        parts += ["", _ranks_audit(audits, MAX_SUMMARY_RANKS, run.run_id)]
    if metrics:
        table = _table("metric", ">step", ">last", ">min .. max over ranks", ">n")
        for metric in metrics[:MAX_SUMMARY_METRICS]:
            last = metric.last
            table.add_row(
                words(metric.key),
                str(last.step[-1]),
                number(last.value[-1]),
                _span(last),
                f"{last.n[-1]}/{last.expected[-1]}",
            )
        parts += ["", table]
    if len(metrics) > MAX_SUMMARY_METRICS:
        parts.append(Text(f"and {len(metrics) - MAX_SUMMARY_METRICS} more metrics", style="dim"))
    status = run.status
    colour = {"finished": "green", "running": "cyan", "preempted": "yellow", "unknown": "yellow"}.get(status, "red")
    return Panel(Group(*parts), title=words(run.name, "bold"), border_style=colour, expand=False, padding=(0, 1))


def ranks(
    writers: Sequence[WriterInfo], drops: Sequence[Drop], world_size: int = 0, live: Sequence[RankStatus] = ()
) -> RenderableType:
    """Return the ranks table; of a large world those that died, then the first ones.

    Args:
        writers: Every life of every rank.
        drops: What they dropped.
        world_size: Of the newest attempt; a rank of it that never appeared is named.
        live: How the living ones stand now, beyond what the store knows: hung, idle, ...
    """
    if not writers:
        return Text("no rank has joined", style="dim")
    dropped = _dropped(drops)
    standing = {(status.rank, status.pid): status for status in live}
    has_attempts = len({writer.attempt for writer in writers}) > 1
    newest = sorted(writers, key=lambda w: (w.state not in _BAD_STATES, -w.attempt, w.rank, w.writer_id))
    shown = sorted(newest[:MAX_RANKS], key=lambda w: (w.attempt, w.rank, w.writer_id))
    attempt_column = (">attempt",) if has_attempts else ()
    table = _table(*attempt_column, ">rank", "host", ">pid", "state", ">step", ">records", ">drops")
    for writer in shown:
        detail = how_ended(writer.exit_code, writer.signal, writer.detail)
        num_drops = sum(dropped[writer.writer_id].values())
        state, now = writer.state, standing.get((writer.rank, writer.pid))
        if now is not None and state == "running" and now.state != "running":
            state, detail = now.state, f"for {seconds(now.idle_s)}"
        table.add_row(
            *([str(writer.attempt)] if has_attempts else []),
            str(writer.rank),
            words(writer.host),
            str(writer.pid),
            status_words(state, detail),
            "-" if writer.step is None else str(writer.step),
            count(writer.next_seq),
            Text(count(num_drops), style="yellow" if num_drops else ""),
        )
    newest_attempt = max(writer.attempt for writer in writers)
    missing = sorted(set(range(world_size)) - {w.rank for w in writers if w.attempt == newest_attempt})
    parts: list[RenderableType] = [_with_rest(table, len(writers) - len(shown), "ranks, in --json")]
    if missing:
        named = ", ".join(map(str, missing[:MAX_SUMMARY_RANKS])) + (", ..." if len(missing) > MAX_SUMMARY_RANKS else "")
        parts.append(Text(f"{count(len(missing))} of {count(world_size)} ranks have not appeared: {named}", "yellow"))
    return Group(*parts)


def hanging(run: Run) -> Event | None:
    """Return the event of the hang that a running run is in, if it is in one."""
    if run.status != "running":
        return None
    last = next((event for event in reversed(run.events()) if event.kind in ("hang", "hang_over")), None)
    newest = run.attempts[-1].attempt if run.attempts else 0
    return last if last is not None and last.kind == "hang" and last.attempt == newest else None


def stragglers_table(stragglers: Sequence[Straggler]) -> RenderableType:
    """Return the ranks that held up the others, the most costly first."""
    table = _table(">rank", ">steps held up", ">of", ">by, on average", ">of the time", "what takes it longer")
    for straggler in stragglers[:MAX_STRAGGLERS]:
        table.add_row(
            Text(str(straggler.rank), style="yellow"),
            count(straggler.num_steps),
            count(straggler.num_compared),
            seconds(straggler.mean_s),
            f"{straggler.share:.0%}",
            straggler.cause or Text("nothing that was measured", style="dim"),
        )
    return _with_rest(table, len(stragglers) - MAX_STRAGGLERS, "ranks, in --json")


def metrics_table(metrics: Sequence[Metric]) -> RenderableType:
    """Return the metrics with their last point."""
    if not metrics:
        return Text("no metric has been logged", style="dim")
    table = _table("metric", "reduce", ">points", ">step", ">last", ">min .. max over ranks", ">n", "")
    for metric in metrics[:MAX_METRICS]:
        last = metric.last
        if not len(last):
            table.add_row(words(metric.key), words(metric.reduce), count(metric.num_points), "", "", "", "", "")
            continue
        missing = int(last.n[-1]) < int(last.expected[-1])
        table.add_row(
            words(metric.key),
            words(metric.reduce),
            count(metric.num_points),
            str(last.step[-1]),
            number(last.value[-1]),
            _span(last),
            Text(f"{last.n[-1]}/{last.expected[-1]}", style="yellow" if missing else ""),
            _bad(last),
        )
    return _with_rest(table, len(metrics) - MAX_METRICS, "metrics, in --json")


def points_table(columns: MetricColumns | RankColumns, limit: int = 1000) -> RenderableType:
    """Return a metric's last `limit` points."""
    if isinstance(columns, RankColumns):
        return _rank_points_table(columns, limit)
    has_attempts = len(set(columns.attempt.tolist())) > 1
    attempt_column = (">attempt",) if has_attempts else ()
    table = _table(">step", *attempt_column, ">value", ">mean", ">std", ">min", ">max", ">n", "")
    for i in range(max(0, len(columns) - limit), len(columns)):
        one = columns.take(np.array([i]))
        table.add_row(
            str(one.step[0]),
            *([str(one.attempt[0])] if has_attempts else []),
            number(one.value[0]),
            number(one.mean[0]),
            number(one.std[0]),
            f"{number(one.min[0])} {_rank(one.min_rank[0])}",
            f"{number(one.max[0])} {_rank(one.max_rank[0])}",
            f"{one.n[0]}/{one.expected[0]}",
            _bad(one),
        )
    return _with_rest(table, len(columns) - limit, "before them; ddplog export has all")


def _rank_points_table(columns: RankColumns, limit: int) -> RenderableType:
    table = _table(">step", ">attempt", ">rank", ">value")
    for i in range(max(0, len(columns) - limit), len(columns)):
        table.add_row(
            *(str(column[i]) for column in (columns.step, columns.attempt, columns.rank)), number(columns.value[i])
        )
    return _with_rest(table, len(columns) - limit, "before them, in --json")


def events_table(events: Iterable[Event]) -> RenderableType:
    """Return events in order."""
    table = _table("time", ">rank", ">step", "event", "message")
    styles = {"warning": "yellow", "error": "red"}
    for event in events:
        table.add_row(
            moment(datetime.fromtimestamp(event.time_unix_ns / 1e9, tz=timezone.utc)),
            "" if event.rank is None else str(event.rank),
            "" if event.step is None else str(event.step),
            words(event.kind, styles.get(event.level, "")),
            words(event.message),
        )
    return table


def params_table(params: Sequence[Param]) -> RenderableType:
    """Return the params, by name."""
    table = _table("param", "value")
    for param in sorted(params, key=lambda param: param.name):
        table.add_row(words(param.name), words(str(param.value)))
    return table


def audit(writers: Sequence[WriterInfo], drops: Sequence[Drop]) -> RenderableType:
    """Return, per rank, what it accepted, what is stored, and what was dropped by reason."""
    audits = rank_audits(writers, drops)
    return Group(_ranks_total(audits), _ranks_audit(audits, MAX_AUDIT_RANKS)) if audits else _ranks_total(audits)


def _ranks_total(audits: Sequence[RankAudit]) -> Text:
    stored, dropped = sum(row.stored for row in audits), sum(row.num_dropped for row in audits)
    said = f"{count(stored + dropped)} values logged = {count(stored)} stored + {count(dropped)} dropped"
    return Text(said, style="yellow" if dropped else "green")


def _ranks_audit(audits: Sequence[RankAudit], limit: int, run_id: str = "") -> RenderableType:
    """Return the table of the ranks, those that dropped first where they are too many."""
    reasons = sorted({reason for row in audits for reason in row.dropped})
    has_attempts = len({row.attempt for row in audits}) > 1
    shown = sorted(sorted(audits, key=lambda row: -row.num_dropped)[:limit], key=lambda row: (row.attempt, row.rank))
    table = _table(*((">attempt",) if has_attempts else ()), ">rank", ">logged", ">stored", *(f">{r}" for r in reasons))
    for row in shown:
        table.add_row(
            *([str(row.attempt)] if has_attempts else []),
            str(row.rank),
            count(row.logged),
            count(row.stored),
            *(count(row.dropped.get(reason, 0)) for reason in reasons),
        )
    return _with_rest(
        table, len(audits) - len(shown), f"ranks, in ddplog show {run_id}" if run_id else "ranks, in --json"
    )


def _sink_cells(row: SinkAudit) -> list[Text]:
    return [
        Text(count(row.emitted)),
        Text("-" if row.delivered is None else count(row.delivered)),
        Text(count(row.refused), style="yellow" if row.refused else ""),
        Text(count(row.waiting), style="yellow" if row.waiting else ""),
        _sink_rest(row),
    ]


def _sink_sum(row: SinkAudit) -> Text:
    said = f"{count(row.emitted)} emitted = {count(row.delivered or 0)} delivered + {count(row.refused)} refused"
    text = Text(f"{said} + {count(row.waiting)} waiting", style="yellow" if row.refused or row.waiting else "green")
    rest = _sink_rest(row)
    return text.append(" ").append_text(rest) if rest.plain else text


def _sink_rest(row: SinkAudit) -> Text:
    if row.missing:
        return Text(f"{count(abs(row.missing))} {'lost' if row.missing > 0 else 'too many'}", style="bold red")
    return Text(f"{count(row.replaced)} of them replaced" if row.replaced else "", style="dim")


def sinks_table(run: Run) -> RenderableType | None:
    """Return the sinks with state and cursor, and what became of everything emitted; None if the run has none."""
    states = _sink_states(run)
    if not states:
        return None
    audits = {row.name: row for row in sink_audits(run)}
    names = (">cursor", ">lag", ">emitted", ">delivered", ">refused", ">waiting", "", "detail")
    table = _table("sink", "state", *names)
    for state in states:
        row = audits.get(state.name)
        table.add_row(
            words(state.name),
            status_words(state.state),
            count(state.cursor),
            count(state.lag),
            *(_sink_cells(row) if row is not None else [""] * 5),
            words(state.detail),
        )
    return table


def _sink_states(run: Run) -> Sequence[SinkState]:
    found = run.sink_states()
    silent = {spec.partition("://")[0] for spec in run.sinks} - {_FOLDER_HASH.sub("", state.name) for state in found}
    return (
        *found,
        *(
            SinkState(name=name, state="starting", cursor=0, lag=0, detail="it has not spoken yet", time_unix_ns=0)
            for name in sorted(silent)
        ),
    )


def _sink_line(state: SinkState) -> Text:
    behind = f", {count(state.lag)} behind" if state.lag else ""
    return status_words(state.state).append_text(words(behind + (f": {state.detail}" if state.detail else ""), "dim"))


def _heading(run: Run) -> RenderableType:
    facts = _facts(run)
    if run.tags:
        facts.add_row("tags", words(", ".join(run.tags)))
    for attempt in run.attempts[1:]:
        opened = moment(datetime.fromtimestamp(attempt.opened_unix_ns / 1e9, tz=timezone.utc))
        facts.add_row(f"attempt {attempt.attempt}", words(f"{opened}, {attempt.world_size} ranks: {attempt.reason}"))
    if run.is_immutable:
        facts.add_row("note", Text("read-only folder: what was not checkpointed is not shown", style="yellow"))
    return facts


def _facts(run: Run) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    status, detail, ended, attempts = run.status, run.detail, run.ended, run.attempts
    facts.add_row("run", words(run.run_id, "bold"))
    facts.add_row("project", words(run.project))
    facts.add_row("status", status_words(status, detail))
    end = ended or (datetime.now(timezone.utc) if status == "running" else None)
    took = f", took {seconds((end - run.created).total_seconds())}" if end else ""
    facts.add_row("started", f"{moment(run.created)}{took}")
    if attempts:
        restarts = f", {len(attempts)} attempts" if len(attempts) > 1 else ""
        facts.add_row("ranks", f"{attempts[-1].world_size}{restarts}")
    facts.add_row("points", count(run.num_points))
    facts.add_row("path", words(run.path, limit=4096))
    return facts


def _titled(title: str, body: RenderableType) -> list[RenderableType]:
    return ["", Text(title, style="bold"), body]


def _table(*names: str) -> Table:
    """Return a table without lines; a name that begins with ">" heads a column of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in names:
        is_number = name.startswith(">")
        heading = words(name[1:] if is_number else name, limit=30)
        is_id = name in ("run", "metric")  # to be copied: never over two lines
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold", no_wrap=is_id)
    return table


def _with_rest(table: Table, num_left: int, what: str) -> RenderableType:
    return Group(table, Text(f"and {count(num_left)} more {what}", style="dim")) if num_left > 0 else table


def _dropped(drops: Iterable[Drop]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for drop in drops:
        found[drop.writer_id][drop.reason] = found[drop.writer_id].get(drop.reason, 0) + drop.count
    return found


def _span(last: MetricColumns) -> str:
    low, high = float(last.min[-1]), float(last.max[-1])
    if math.isnan(low) or int(last.n[-1]) < 2:
        return ""
    return f"{number(low)} {_rank(last.min_rank[-1])} .. {number(high)} {_rank(last.max_rank[-1])}"


def _rank(rank: int) -> str:
    return f"r{rank}" if rank >= 0 else ""


def _bad(last: MetricColumns) -> Text:
    parts = [f"{last.nan_count[-1]} NaN"] if last.nan_count[-1] else []
    parts += [f"{last.inf_count[-1]} Inf"] if last.inf_count[-1] else []
    return Text(f"{', '.join(parts)} (rank {last.bad_rank[-1]})" if parts else "", style="red")
