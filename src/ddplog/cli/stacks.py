"""`ddplog stacks`: where the ranks of a live run are, without stopping them; else the last that were collected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddplog.cli import output
from ddplog.cli.target import find, run_argument
from ddplog.errors import ControlUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddplog.store.reader import Run
    from ddplog.v1.control_pb2 import RankStack


@click.command("stacks")
@run_argument
@click.option("--rank", "ranks", metavar="N", type=click.IntRange(0), multiple=True, help="Only this rank; repeatable.")
@click.option(
    "--wait", metavar="S", type=click.FloatRange(0.1, 30), default=5.0, help="How long to wait for the ranks."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(run: str, folder: str | None, ranks: tuple[int, ...], wait: float, as_json: bool) -> None:
    """Show the Python stacks of a live run's ranks: where does it hang?

    The ranks are not stopped: each gets a signal whose handler, faulthandler's, writes the stacks of its threads. Ranks
    that are at the same places are shown together, the odd ones first. Of a run that does not live, the stacks are shown
    that were collected when it hung.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run
    from ddplog.view import stacks as view

    with open_run(find(run, folder)) as opened:
        found = _collect(opened, ranks, wait)
    if as_json:
        output.show_json(view.as_dicts(found))
    else:
        output.show(view.render(found))


def _collect(run: Run, ranks: tuple[int, ...], wait_s: float) -> Sequence[RankStack]:
    from ddplog.aggregator.control import connect
    from ddplog.v1.control_pb2 import StacksRequest
    from ddplog.view import stacks as view

    socket = run.control_socket()
    trouble = "the run is not live"
    if socket is not None:
        try:
            with connect(Path(socket)) as client:
                reply = client.stacks(StacksRequest(ranks=ranks, wait_s=wait_s))
            if reply.num_left_out:
                click.echo(f"{reply.num_left_out} more ranks were not asked; name them with --rank", err=True)
            return list(reply.stacks)
        except ControlUnavailableError as exc:
            trouble = f"the run's aggregator does not answer ({exc})"
    click.echo(f"{trouble}; these are the last stacks that were collected", err=True)
    return [stack for stack in view.stored(run) if not ranks or stack.rank in ranks]
