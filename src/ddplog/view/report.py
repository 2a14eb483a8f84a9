"""Owns the report: one self-contained HTML file with a run's charts and tables. Loads nothing when it is opened.

Everything that a user or a rank named is escaped, in the HTML and in the JSON that stands in it. The page's policy
forbids every connection, so that a hole in the escaping could not send anything anywhere either.
"""

from __future__ import annotations

import html
import json
import math
import os
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ddplog.core.records import SYSTEM_PREFIX
from ddplog.core.stacks import alike, place
from ddplog.view import series
from ddplog.view.audit import rank_audits, sink_audits
from ddplog.view.stacks import stored
from ddplog.view.stragglers import find_stragglers
from ddplog.view.system import is_system
from ddplog.view.text import clean, count, how_ended, interest, moment, number, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ddplog.store.columns import Metric, MetricColumns, RankColumns
    from ddplog.store.reader import Run
    from ddplog.store.step_times import RankStepTimes
    from ddplog.view.audit import SinkAudit

MAX_LINES: Final = 16
"""More ranks than this are drawn as a band with the most extreme ones, not one line each."""

MAX_RANK_VALUES: Final = 5_000_000
"""A key kept per rank with more values than this is drawn as any other: mean and band."""

MAX_MARKS: Final = 200
MAX_TABLE_ROWS: Final = 2000
_SAMPLED_STEP: Final = SYSTEM_PREFIX + "step"
_SCALED: Final = ("sum", "rss", "std")
"""Reductions whose value lies outside the ranks' own min and max."""


@dataclass(slots=True, kw_only=True)
class _Chart:
    key: str
    kind: str
    """metric or lines."""
    subtitle: str
    columns: dict[str, Any]
    length: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    last: str = ""
    value_label: str = "value"
    unit: str = ""
    warning: str = ""
    band_fits: bool = True
    x: str = "step"
    """step, or time: its steps are seconds, whatever axis the others are shown over."""
    switch: tuple[str, str] | None = None
    """Labels of the two lines one can choose between: the declared reduction, the mean."""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "x": self.x,
            "length": self.length,
            "columns": self.columns,
            "lines": self.lines,
            "value_label": self.value_label,
            "unit": self.unit,
            "band_fits": self.band_fits,
        }


@dataclass(slots=True)
class _Collected:
    """What one pass over the metrics found."""

    charts: list[_Chart] = field(default_factory=list)
    extremes: list[series.Extremes] = field(default_factory=list)
    first_steps: dict[int, int] = field(default_factory=dict)
    """Attempt -> the first step it has."""
    num_thinned: int = 0


def write_report(run: Run, path: str | os.PathLike[str], on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the report of a run, live or finished.

    Args:
        run: The run.
        path: The file; replaced as a whole.
        on_progress: Called with (metrics done, metrics in all) after each metric.

    Returns:
        The file written.

    Raises:
        OSError: If the file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render(run, on_progress)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def render(run: Run, on_progress: Callable[[int, int], None] | None = None) -> str:
    """Return the report's HTML."""
    metrics = run.metrics()
    found = _collect(run, metrics, on_progress)
    step_times = run.rank_step_times()
    rank_charts = [_step_time_chart(step_times)] if len(step_times) else []
    everything = found.charts + rank_charts
    sections = [
        ("Metrics", _metrics_section(found)),
        ("System", _system_section(found)),
        ("Ranks", _ranks_section(run, found, rank_charts, len(found.charts))),
        ("Params", _params_section(run)),
        ("Texts", _texts_section(run)),
        ("Events", _events_section(run)),
        ("Delivery", _delivery_section(run)),
    ]
    shown = [(title, body) for title, body in sections if body]
    status, detail = run.status, run.detail
    body = _facts(run, len(metrics)) + _banner(status, detail) + "".join(
        f'<section id="{title.lower()}">{content}</section>' for title, content in shown
    )  # fmt: skip
    data = "".join(
        f'<script type="application/json" id="chart-{i}">{_script(chart.as_json())}</script>\n'
        for i, chart in enumerate(everything)
    )
    return _fill(
        _static("report.html"),
        {
            "title": _e(f"{run.name} - ddplog"),
            "name": _e(run.name),
            "status": _e(status),
            "status_class": _e("".join(c for c in status if c.isalpha())),
            "nav": "".join(f'<a href="#{title.lower()}">{title}</a>' for title, _ in shown),
            "body": body,
            "page": _script({"marks": _marks(run, found), "num_attempts": len(run.attempts)}),
            "data": data,
            "css": _static("report.css"),
            "js": _static("report.js"),
            "uplot_css": _static("uPlot.min.css"),
            "uplot_js": _static("uPlot.iife.min.js"),
            "uplot_license": _static("LICENSE").replace("*/", ""),
        },
    )


# Charts.


def _collect(run: Run, metrics: Sequence[Metric], on_progress: Callable[[int, int], None] | None) -> _Collected:
    found = _Collected()
    max_points = series.points_per_series(len(metrics))
    has_attempts = len(run.attempts) > 1
    start_ns = int(run.created.timestamp() * 1e9)
    world_size = max((attempt.world_size for attempt in run.attempts), default=1)
    for i, metric in enumerate(sorted(metrics, key=lambda m: interest(m.key))):
        columns = run.metric(metric.key)
        is_small = metric.num_points * world_size <= MAX_RANK_VALUES
        if metric.reduce == "none" and is_small and len(values := run.rank_metric(metric.key)):
            found.charts.append(_rank_chart(metric.key, values, max_points))
        elif len(columns):
            found.charts.append(_metric_chart(metric, columns, max_points, start_ns, has_attempts=has_attempts))
            found.num_thinned += found.charts[-1].length < len(columns)
        if is_system(metric.key) and found.charts and found.charts[-1].key == metric.key:
            found.charts[-1].x = "time"
            found.charts[-1].columns["time"] = found.charts[-1].columns["step"]
        if len(columns) and metric.key != _SAMPLED_STEP:
            found.extremes.append(series.Extremes(metric.key, columns))
            for attempt in np.unique(columns.attempt).tolist() if not is_system(metric.key) else ():
                first = int(columns.step[columns.attempt == attempt].min())
                found.first_steps[attempt] = min(first, found.first_steps.get(attempt, first))
        if on_progress is not None:
            on_progress(i + 1, len(metrics))
    return found


def _metric_chart(
    metric: Metric, columns: MetricColumns, max_points: int, start_ns: int, *, has_attempts: bool
) -> _Chart:
    is_apart = bool(((columns.min < columns.max) & (columns.n > 1)).any())
    rows = [columns.value, columns.min, columns.max] if is_apart else [columns.value]
    kept = columns.take(series.keep_extremes(rows, max_points))
    packed = {
        "step": series.pack(kept.step),
        "time": series.pack((kept.time_unix_ns - start_ns) / 1e9),
        "value": series.pack(kept.value),
        "n": series.pack(kept.n),
        "expected": series.pack(kept.expected),
        "min_rank": series.pack(kept.min_rank),
    }
    if is_apart:
        packed.update(low=series.pack(kept.min), high=series.pack(kept.max), max_rank=series.pack(kept.max_rank))
    bad = kept.nan_count + kept.inf_count
    if bad.any():
        packed.update(bad=series.pack(bad), bad_rank=series.pack(kept.bad_rank))
    if has_attempts:
        packed["attempt"] = series.pack(kept.attempt)
    differs = is_apart and not np.array_equal(columns.mean, columns.value, equal_nan=True)
    if differs:
        packed["mean"] = series.pack(kept.mean)
    shown = (
        f"{count(len(kept))} of {count(len(columns))} points"
        if len(kept) < len(columns)
        else _plural(len(kept), "point")
    )
    is_scaled = metric.reduce in _SCALED
    return _Chart(
        key=metric.key,
        kind="metric",
        subtitle=" · ".join([metric.reduce, *(["replicated"] if metric.is_replicated else []), shown]),
        columns=packed,
        length=len(kept),
        last=number(float(metric.last.value[-1])) if len(metric.last) else "",
        value_label=metric.reduce,
        warning=_bad_note(columns),
        band_fits=not is_scaled,
        switch=(metric.reduce, "mean") if differs else None,
    )


def _bad_note(columns: MetricColumns) -> str:
    num_nan, num_inf = int(columns.nan_count.sum()), int(columns.inf_count.sum())
    if not num_nan + num_inf:
        return ""
    first = int(np.flatnonzero(columns.nan_count + columns.inf_count)[0])
    what = " and ".join([f"{count(num_nan)} NaN"] * bool(num_nan) + [f"{count(num_inf)} Inf"] * bool(num_inf))
    return f"{what}, first at step {columns.step[first]}, rank {columns.bad_rank[first]}"


def _rank_chart(key: str, values: RankColumns, max_points: int) -> _Chart:
    ranks, steps = np.unique(values.rank), np.unique(values.step)
    matrix = np.full((len(ranks), len(steps)), np.nan)
    matrix[np.searchsorted(ranks, values.rank), np.searchsorted(steps, values.step)] = values.value
    chart = _matrix_chart(key, ranks, steps, matrix, max_points, unit="")
    chart.subtitle = f"kept per rank · {_plural(len(ranks), 'rank')} · {_plural(len(steps), 'step')}"
    return chart


def _step_time_chart(times: RankStepTimes) -> _Chart:
    chart = _matrix_chart("step time per rank", times.ranks, times.steps, times.seconds, series.MAX_POINTS, unit=" s")
    means = np.nanmean(times.seconds, axis=1)  # every rank in it has at least one step time
    slow = int(times.ranks[np.nanargmax(means)])
    apart = int(np.median(np.diff(times.steps))) if len(times) > 1 else 1
    each = f" · each the mean over {apart} steps" if apart > 1 else ""
    chart.subtitle = (
        f"seconds between a rank's first records of successive steps · mean {seconds(float(np.nanmean(means)))} · "
        f"slowest on average: rank {slow}, {seconds(float(np.nanmax(means)))}{each}"
    )
    return chart


def _matrix_chart(
    key: str,
    ranks: NDArray[np.int64],
    steps: NDArray[np.int64],
    values: NDArray[np.float64],
    max_points: int,
    unit: str,
) -> _Chart:
    """Chart values [R, S]: a line per rank, or the median with a band and the two ranks that are highest overall."""
    held = np.isfinite(values).any(axis=0)
    steps, values = steps[held], np.where(np.isfinite(values), values, np.nan)[:, held]
    if not len(steps):
        return _Chart(key=key, kind="lines", subtitle="", columns={"step": {"c": None}}, length=0)
    low, high, middle = np.nanmin(values, axis=0), np.nanmax(values, axis=0), np.nanmedian(values, axis=0)
    kept = series.keep_extremes([low, high], max_points)
    columns = {"step": series.pack(steps[kept])}
    kept_values = values[:, kept]
    if len(ranks) <= MAX_LINES:
        lines = [{"label": f"rank {r}", "y": series.pack(kept_values[i])} for i, r in enumerate(ranks.tolist())]
        return _Chart(key=key, kind="lines", subtitle="", columns=columns, length=len(kept), lines=lines, unit=unit)
    columns.update(
        value=series.pack(middle[kept]),
        low=series.pack(low[kept]),
        high=series.pack(high[kept]),
        min_rank=series.pack(ranks[np.nanargmin(kept_values, axis=0)]),
        max_rank=series.pack(ranks[np.nanargmax(kept_values, axis=0)]),
        n=series.pack(np.isfinite(kept_values).sum(axis=0)),
        expected=series.pack(np.full(len(kept), len(ranks))),
    )
    levels = np.array([np.nanmean(row) if np.isfinite(row).any() else -math.inf for row in values])
    lines = [{"label": f"rank {ranks[i]}", "y": series.pack(kept_values[i])} for i in np.argsort(-levels)[:2].tolist()]
    return _Chart(
        key=key, kind="metric", subtitle="", columns=columns, length=len(kept), lines=lines, value_label="median", unit=unit
    )  # fmt: skip


def _marks(run: Run, found: _Collected) -> list[dict[str, Any]]:
    """Return what is marked on every chart: openings of attempts, and events that have a step or a time."""
    start_ns = int(run.created.timestamp() * 1e9)
    marks: list[dict[str, Any]] = [
        {
            "step": found.first_steps.get(attempt.attempt),
            "time": (attempt.opened_unix_ns - start_ns) / 1e9,
            "label": f"attempt {attempt.attempt}",
            "text": clean(f"attempt {attempt.attempt}: {attempt.reason}"),
            "level": "info",
            "attempt": True,
        }
        for attempt in run.attempts[1:]
    ]
    for event in run.events()[-MAX_MARKS:]:
        rank = "" if event.rank is None else f" (rank {event.rank})"
        marks.append(
            {
                "step": event.step,
                "time": (event.time_unix_ns - start_ns) / 1e9,
                "label": event.kind,
                "text": clean(f"{event.kind}{rank}: {event.message}")[:300],
                "level": event.level,
                "attempt": False,
            }
        )
    return marks


# Sections.


def _facts(run: Run, num_metrics: int) -> str:
    attempts, ended = run.attempts, run.ended
    pairs = [
        ("run", run.run_id),
        ("project", run.project),
        ("started", moment(run.created)),
        *([("took", seconds((ended - run.created).total_seconds()))] if ended else []),
        ("ranks", str(attempts[-1].world_size) if attempts else "0"),
        *([("attempts", str(len(attempts)))] if len(attempts) > 1 else []),
        ("metrics", count(num_metrics)),
        ("points", count(run.num_points)),
        *([("tags", ", ".join(run.tags))] if run.tags else []),
        ("report made", moment(datetime.now(timezone.utc))),
    ]
    return '<dl class="facts">' + "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in pairs) + "</dl>"


def _banner(status: str, detail: str) -> str:
    return f'<p class="banner {_e(status)}"><b>{_e(status)}</b> {_e(detail)}</p>' if detail else ""


def _metrics_section(found: _Collected) -> str:
    groups = _groups([(i, chart) for i, chart in enumerate(found.charts) if chart.x == "step"])
    if not groups:
        return '<h2>Metrics</h2><p class="note">This run has no points yet.</p>'
    note = "Line: the declared reduction. Band: the smallest to the largest rank. Drag to zoom, double-click to reset."
    if found.num_thinned:
        note += (
            f" {_plural(found.num_thinned, 'metric')} of {len(found.charts)} shown with fewer points than stored: of each"
            " stretch of steps the smallest and the largest values are kept; ddplog export has all of them."
        )
    none = '<p class="note" id="none" hidden>No metric has that in its name.</p>'
    return f'<p class="note">{_e(note)}</p>{none}{_group_cards(groups)}'


def _system_section(found: _Collected) -> str:
    """Return the charts of what the samplers measured; empty if there was none."""
    sampled = [(i, chart) for i, chart in enumerate(found.charts) if chart.x == "time"]
    if not sampled:
        return ""
    groups: dict[str, list[tuple[int, _Chart]]] = {}
    for i, chart in sampled:
        groups.setdefault(chart.key.removeprefix(SYSTEM_PREFIX).partition("/")[0], []).append((i, chart))
    note = "GPUs, hosts and processes, over the time since the run began. Line: the mean. Band: the ranks."
    return f'<h2>System</h2><p class="note">{_e(note)}</p>' + _group_cards(groups)


def _group_cards(groups: Mapping[str, Sequence[tuple[int, _Chart]]]) -> str:
    parts = []
    for prefix, members in groups.items():
        title = _e(prefix) if prefix else "metrics"
        cards = "".join(_card(i, chart) for i, chart in members)
        summary = f"<summary>{title} <span>{len(members)}</span></summary>"
        parts.append(f'<details class="group" open>{summary}<div class="cards">{cards}</div></details>')
    return "".join(parts)


def _groups(charts: Sequence[tuple[int, _Chart]]) -> dict[str, list[tuple[int, _Chart]]]:
    """Group charts by their key's prefix, training first; those alone in theirs stand together under ""."""
    by_prefix: dict[str, list[tuple[int, _Chart]]] = {}
    for i, chart in charts:
        prefix, slash, _ = chart.key.partition("/")
        by_prefix.setdefault(prefix if slash else "", []).append((i, chart))
    groups: dict[str, list[tuple[int, _Chart]]] = {}
    for prefix in sorted(by_prefix, key=_group_order):
        groups.setdefault(prefix if len(by_prefix[prefix]) > 1 else "", []).extend(by_prefix[prefix])
    return groups


def _group_order(prefix: str) -> tuple[int, str]:
    for order, names in enumerate((("train", "training"), ("val", "valid", "validation", "eval", "test"), ("",))):
        if prefix.lower() in names:
            return order, prefix
    return 3 + interest(f"{prefix}/")[0], prefix


def _card(index: int, chart: _Chart) -> str:
    switch = ""
    if chart.switch:
        first, second = chart.switch
        switch = (
            f'<span class="seg"><button type="button" data-line="value" aria-pressed="true">{_e(first)}</button>'
            f'<button type="button" data-line="mean" aria-pressed="false">{_e(second)} over ranks</button></span>'
        )
    warning = f'<span class="bad">{_e(chart.warning)}</span>' if chart.warning else ""
    keys = '<div class="keys"></div>' if chart.lines else ""
    return (
        f'<article class="card" data-chart="{index}" data-key="{_e(chart.key)}"><header><h3>{_e(chart.key)}</h3>'
        f'<span class="last">{_e(chart.last)}</span></header><div class="sub"><span>{_e(chart.subtitle)}</span>{switch}'
        f'{warning}</div><div class="plot"></div>{keys}</article>\n'
    )


def _ranks_section(run: Run, found: _Collected, charts: Sequence[_Chart], first_index: int) -> str:
    parts = ["<h2>Ranks</h2>"]
    if charts:
        cards = "".join(_card(first_index + i, chart) for i, chart in enumerate(charts))
        parts.append(f'<div class="cards wide">{cards}</div>')
    parts.append(_stragglers_table(run))
    parts.append(_extremes_table(found.extremes))
    dropped: dict[int, int] = {}
    for drop in run.drops():
        dropped[drop.writer_id] = dropped.get(drop.writer_id, 0) + drop.count
    writers = run.writers()
    rows = [
        (
            writer.attempt, writer.rank, writer.host, writer.pid, _State(writer.state),
            how_ended(writer.exit_code, writer.signal, writer.detail),
            "" if writer.step is None else count(writer.step), count(writer.next_seq),
            count(dropped.get(writer.writer_id, 0)),
        )
        for writer in writers
    ]  # fmt: skip
    heads = ("#attempt", "#rank", "host", "#pid", "state", "exit", "#step", "#records stored", "#drops")
    parts.append(_titled_table("Every rank", heads, rows) if rows else '<p class="note">No rank has joined.</p>')
    return "".join(parts)


def _stragglers_table(run: Run) -> str:
    rows = [
        (
            found.rank,
            count(found.num_steps),
            count(found.num_compared),
            seconds(found.mean_s),
            f"{found.share:.0%}",
            found.cause or "nothing that was measured",
        )
        for found in find_stragglers(run)
    ]
    note = (
        "Ranks for which the others waited, in perf/wait_s: whoever comes last waits least. Only those who did so far more "
        "often than by chance, and cost the run at least 5 % of its time."
    )
    heads = ("#rank", "#steps held up", "#of", "#by, on average", "#of the time", "what takes it longer")
    return _titled_table("Stragglers", heads, rows, note) if rows else ""


def _extremes_table(extremes: Iterable[series.Extremes]) -> str:
    apart = sorted((e for e in extremes if e.num_points), key=lambda e: (not e.is_notable, -e.excess, e.key))
    if not apart:
        return ""
    rows = [
        (
            ("⚠ " if found.is_notable else "") + found.key,
            _Share(found.min_rank, found.min_share),
            _Share(found.max_rank, found.max_share),
            count(found.num_points),
            f"{100 / found.mean_n:.3g} %",
        )
        for found in apart
    ]
    note = (
        "The rank that was most often the smallest and the largest, and in how many of the points where ranks differed. "
        "⚠: far more often than its fair share: its data, its hardware or its code differs."
    )
    heads = ("metric", "smallest", "largest", "#points", "#fair share")
    return _titled_table("Which ranks are extreme", heads, rows, note)


def _params_section(run: Run) -> str:
    params = {param.name: param.value for param in run.params()}
    rows = [
        (name, _shown(value)) for name, value in sorted({**run.config, **params}.items(), key=lambda kv: str(kv[0]))
    ]
    return _titled_table("Params", ("name", "value"), rows) if rows else ""


def _texts_section(run: Run) -> str:
    rows = [(text.key, "" if text.step is None else text.step, text.rank, _Pre(text.text)) for text in run.texts()]
    return _titled_table("Texts", ("key", "#step", "#rank", "text"), rows) if rows else ""


def _events_section(run: Run) -> str:
    rows = [
        (
            moment(datetime.fromtimestamp(event.time_unix_ns / 1e9, tz=timezone.utc)),
            event.attempt,
            "" if event.rank is None else event.rank,
            "" if event.step is None else count(event.step),
            _State(event.kind, event.level),
            event.message,
            json.dumps(event.data, ensure_ascii=False) if event.data and event.kind != "stack" else "",
        )
        for event in run.events()
    ]
    heads = ("time", "#attempt", "#rank", "#step", "event", "message", "data")
    return _titled_table("Events", heads, rows) + _stacks_section(run) if rows else ""


def _stacks_section(run: Run) -> str:
    """Return the last stacks of each rank that were collected, equal ones together, the odd ones first."""
    found = stored(run)
    rows = [
        (", ".join(map(str, ranks)), place(text), _Pre(text))
        for ranks, text in alike((stack.rank, stack.text) for stack in found if stack.text)
    ]
    note = "Where the ranks were when the run hung, or when ddplog stacks asked last. Equal ones are one row."
    return _titled_table("Python stacks", ("ranks", "main thread", "threads"), rows, note) if rows else ""


def _delivery_section(run: Run) -> str:
    drops, audits = run.drops(), rank_audits(run.writers(), run.drops())
    kept, lost = sum(row.stored for row in audits), sum(row.num_dropped for row in audits)
    total = f"{count(kept + lost)} values logged = {count(kept)} stored + {count(lost)} dropped."
    colour = "warn" if lost else "ok"
    parts = [f'<h2>Delivery audit</h2><p class="{colour}">{total}</p><div class="two">']
    if drops:
        rows = [(d.rank, d.attempt, d.reason, count(d.count)) for d in drops]
        parts.append("<div>" + _titled_table("Drops", ("#rank", "#attempt", "reason", "#values"), rows) + "</div>")
    states = run.sink_states()
    if states:
        sums = {row.name: row for row in sink_audits(run)}
        rows_ = [(s.name, _State(s.state), count(s.lag), *_sink_cells(sums.get(s.name)), s.detail) for s in states]
        heads = ("sink", "state", "#lag", "#emitted", "#delivered", "#refused", "#waiting", "#missing", "detail")
        parts.append("<div>" + _titled_table("Sinks", heads, rows_) + "</div>")
    return "".join(parts) + "</div>"


def _sink_cells(row: SinkAudit | None) -> tuple[str, ...]:
    if row is None or row.delivered is None:
        return ("",) * 5
    return tuple(count(number) for number in (row.emitted, row.delivered, row.refused, row.waiting, row.missing))


# HTML.


@dataclass(frozen=True, slots=True)
class _State:
    state: str
    level: str = ""


@dataclass(frozen=True, slots=True)
class _Share:
    rank: int
    share: float


@dataclass(frozen=True, slots=True)
class _Pre:
    text: str


def _titled_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """Return a heading and a table; a head that begins with "#" is one of numbers."""
    numeric = [head.startswith("#") for head in heads]
    attributes = [' class="num"' if is_number else "" for is_number in numeric]
    head_cells = "".join(f"<th{a}>{_e(h.lstrip('#'))}</th>" for h, a in zip(heads, attributes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{a}>{_cell(c)}</td>" for c, a in zip(row, attributes, strict=True)) + "</tr>\n"
        for row in rows[:MAX_TABLE_ROWS]
    )
    more = f" The first {count(MAX_TABLE_ROWS)} of {count(len(rows))} rows." if len(rows) > MAX_TABLE_ROWS else ""
    noted = f'<p class="note">{_e(note + more)}</p>' if note + more else ""
    return (
        f'<h2>{_e(title)}</h2>{noted}<div class="scroll"><table><thead><tr>{head_cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, _State):
        by_level = {"error": "bad", "warning": "warn"}
        by_state = {
            "died": "bad",
            "failed": "bad",
            "killed": "bad",
            "retrying": "warn",
            "finished": "ok",
            "drained": "ok",
        }
        colour = by_level.get(value.level) or by_state.get(value.state, "")
        return f'<span class="state {colour}">{_e(value.state)}</span>'
    if isinstance(value, _Share):
        return f'rank {value.rank} <meter min="0" max="1" value="{value.share:.3f}"></meter> {value.share:.0%}'
    if isinstance(value, _Pre):
        return f"<pre>{_lines(value.text)}</pre>"
    return _e(value)


def _lines(text: str) -> str:
    return "\n".join(_e(line) for line in text.splitlines())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plural(num: int, what: str) -> str:
    return f"{count(num)} {what}{'' if num == 1 else 's'}"


def _e(value: object) -> str:
    return html.escape(clean(value), quote=True)


def _script(value: Any) -> str:
    r"""Return JSON that may stand in a script element: "<" as \u003c, so that no "</script" or "<!--" can occur."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _static(name: str) -> str:
    return (resources.files("ddplog.view") / "static" / name).read_text(encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into a template's @@names@@; in one pass, so that a value that holds @@name@@ stays as it is."""
    parts = template.split("@@")
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts))
