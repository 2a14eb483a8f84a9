"""`ddplog show`: one run, or one metric's points."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddplog.cli import output
from ddplog.cli.target import find, run_argument

if TYPE_CHECKING:
    from ddplog.store.columns import Metric, MetricColumns, RankColumns
    from ddplog.store.reader import Run
    from ddplog.v1.control_pb2 import StatusReply

_ASK_S: Final = 1.0
_MAX_STEPS: Final = 1000


@click.command("show")
@run_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--metric", "key", metavar="KEY", help="Print this metric's points.")
@click.option("--ranks", "every_rank", is_flag=True, help="With --metric: print every rank's values.")
def command(run: str, folder: str | None, as_json: bool, key: str | None, every_rank: bool) -> None:
    """Show one run: its ranks, metrics, events, drops and sinks.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run
    from ddplog.view import tables

    if every_rank and key is None:
        raise click.UsageError("--ranks goes with --metric KEY")
    with open_run(find(run, folder)) as opened:
        if key is not None:
            _show_metric(opened, key, as_json=as_json, every_rank=every_rank)
        elif as_json:
            output.show_json(_as_dict(opened, _ask(opened)))
        else:
            output.show(tables.show(opened, _ask(opened)))


def _ask(run: Run) -> StatusReply | None:
    """Return how the ranks of a live run stand now; None if its aggregator does not say so at once."""
    from ddplog.aggregator.control import connect
    from ddplog.errors import DdplogError

    socket = run.control_socket()
    if socket is None:
        return None
    try:
        with connect(Path(socket)) as client:
            return client.status(timeout_s=_ASK_S)
    except DdplogError:
        return None


def _show_metric(run: Run, key: str, *, as_json: bool, every_rank: bool) -> None:
    from ddplog.view import tables

    columns: MetricColumns | RankColumns = run.rank_metric(key)  # empty unless declared with reduce="none"
    if not len(columns):
        columns = _every_rank(run, key) if every_rank else run.metric(key)
    if as_json:
        output.show_json(_rows(columns))
    else:
        output.show(tables.points_table(columns))


def _every_rank(run: Run, key: str) -> RankColumns:
    """Return the ranks' values at the last steps of a metric."""
    from ddplog.errors import DdplogError

    steps = run.metric(key).step
    columns = run.rank_values(key, from_step=int(steps[-_MAX_STEPS:][0]) if len(steps) else None)
    if len(steps) and not len(columns):
        raise DdplogError(f"{run.path}: the ranks' own values of {key} are gone: the rank log keeps rank_log_bytes")
    return columns


def _as_dict(run: Run, live: StatusReply | None) -> dict[str, Any]:
    from ddplog.core.effects import SYSTEM
    from ddplog.view import audit, stragglers, system, tables

    writers, drops = run.writers(), run.drops()
    metrics, sampled = system.parted(run.metrics())
    hang = tables.hanging(run)
    states = {(status.rank, status.pid): status.state for status in live.ranks} if live is not None else {}
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
        "ranks": [{**asdict(w), "standing": states.get((w.rank, w.pid), w.state)} for w in writers],
        "hang": hang.message if hang is not None else None,
        "metrics": [_metric(metric) for metric in metrics],
        "system": {"metrics": [_metric(metric) for metric in sampled], "drops": run.drops(SYSTEM)},
        "stragglers": stragglers.find_stragglers(run),
        "params": run.params(),
        "texts": run.texts(),
        "events": run.events(),
        "drops": drops,
        "sinks": run.sink_states(),
        "audit": {
            "ranks": [
                {**asdict(row), "num_dropped": row.num_dropped, "logged": row.logged}
                for row in audit.rank_audits(writers, drops)
            ],
            "sinks": [{**asdict(row), "missing": row.missing} for row in audit.sink_audits(run)],
        },
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
    lists = {name: column.tolist() for name, column in asdict(columns).items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
