"""`ddplog top`: watches a live run; of one that is not live it shows the last state and ends."""

from __future__ import annotations

from pathlib import Path

import click

from ddplog.cli import output
from ddplog.cli.target import find, run_argument
from ddplog.errors import DdplogError


@click.command("top")
@run_argument
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--interval", metavar="S", type=click.FloatRange(0.1, 3600), default=1.0, help="Seconds between frames.")
def command(run: str, folder: str | None, once: bool, interval: float) -> None:
    """Watch a live run: ranks, steps, rates, lag, drops, last values. q or Ctrl-C leaves.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run
    from ddplog.view import top

    with open_run(find(run, folder)) as opened:
        socket = opened.control_socket()
        if socket is None or not _watch(socket, interval, once=once):
            output.show(top.render(top.reply_from_run(opened)))


def _watch(socket: str, interval_s: float, *, once: bool) -> bool:
    """Show what the aggregator says; False if it said nothing."""
    from ddplog.aggregator.control import connect
    from ddplog.view import top

    console = output.console()
    try:
        with connect(Path(socket)) as client:
            if once or not console.is_terminal:
                output.show(top.render(client.status()))
                return True
            return top.watch(client.watch(interval_s), console) is not None
    except DdplogError as exc:
        click.echo(f"the run's aggregator does not answer ({exc}); this is what the store holds", err=True)
        return False
