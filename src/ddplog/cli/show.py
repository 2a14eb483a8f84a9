"""`ddplog show`: one run, or one metric's points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ddplog.cli import output
from ddplog.cli.target import find, run_argument

if TYPE_CHECKING:
    from ddplog.store.columns import Metric, MetricColumns, RankColumns
    from ddplog.store.reader import Run


@click.command("show")
@run_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--metric", "key", metavar="KEY", help="Print this metric's points.")
def command(run: str, folder: str | None, as_json: bool, key: str | None) -> None:
    """Show one run: its ranks, metrics, events, drops and sinks.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run
    from ddplog.view import tables

    with open_run(find(run, folder)) as opened:
        if key is not None:
            _show_metric(opened, key, as_json=as_json)
        elif as_json:
            output.show_json(_as_dict(opened))
        else:
            output.show(tables.show(opened))


def _show_metric(run: Run, key: str, *, as_json: bool) -> None:
    from ddplog.view import tables

    columns: MetricColumns | RankColumns = run.rank_metric(key)  # empty unless declared with reduce="none"
    if not len(columns):
        columns = run.metric(key)
    if as_json:
        output.show_json(_rows(columns))
    else:
        output.show(tables.points_table(columns))


def _as_dict(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "path": run.path.absolute(),
        "project": run.project,
        "name": run.name,
        "status": run.status,
        "detail": run.detail,
        "created": run.created,
        "ended": run.ended,
        "tags": run.tags,
        "config": run.config,
        "num_points": run.num_points,
        "watermark": run.watermark,
        "attempts": run.attempts,
        "ranks": run.writers(),
        "metrics": [_metric(metric) for metric in run.metrics()],
        "params": run.params(),
        "texts": run.texts(),
        "events": run.events(),
        "drops": run.drops(),
        "sinks": run.sink_states(),
    }


def _metric(metric: Metric) -> dict[str, Any]:
    last = _rows(metric.last)
    return {
        "key": metric.key,
        "reduce": metric.reduce,
        "replicated": metric.is_replicated,
        "num_points": metric.num_points,
        "last": last[0] if last else None,
    }


def _rows(columns: MetricColumns | RankColumns) -> list[dict[str, Any]]:
    from dataclasses import asdict

    lists = {name: column.tolist() for name, column in asdict(columns).items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
