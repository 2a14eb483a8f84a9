"""`ddplog sync`: complete a run whose job was killed, and deliver what its sinks have not got."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.console import Console

from ddplog import config
from ddplog.cli.target import find, run_argument
from ddplog.errors import RunNotFoundError
from ddplog.journal.spool import open_spool
from ddplog.launch.sync import deliver, finish_job, is_live, unfinished_jobs
from ddplog.store.reader import open_run


@click.command()
@run_argument
@click.option(
    "--to", "sinks", multiple=True, metavar="SINK", help="Deliver to this sink; repeatable. Default: the run's."
)
@click.option(
    "--timeout",
    "timeout_s",
    default=600.0,
    show_default=True,
    help="Longest wait for the journals, and again for the sinks, seconds.",
)
def command(run: str, folder: str | None, sinks: Sequence[str], timeout_s: float) -> None:
    """Complete RUN from the journals on this node, then deliver to its sinks what they have not got."""
    path = find(run, folder)
    console = Console(stderr=True)
    jobs = unfinished_jobs(open_spool(config.resolve().spool), path)
    if not jobs and not (path / "run.db").exists():
        raise RunNotFoundError(f"no run at {path}, and no journal of one on this node")
    is_complete = True
    with console.status("reading the journals left on this node") as status:
        for job in jobs:
            if is_live(job):
                console.print(f"its ranks still run: waiting for them to end, {timeout_s:g} s at most (Ctrl-C: not)")
            status.update(f"shipping what {job} still holds")
            is_complete &= finish_job(job, timeout_s)
    with open_run(path) as past:
        targets = tuple(sinks) or past.sinks
        states = deliver(path, targets, timeout_s)
        click.echo(f"{past.run_id}: {past.status}{f' ({past.detail})' if past.detail else ''}")
    for state in states:
        click.echo(f"  {state.name}: {state.state}{f' ({state.detail})' if state.detail else ''}")
    if not is_complete:
        click.secho("  some journals could not be read to the end in time; run it again", fg="yellow", err=True)
    if not is_complete or any(state.state != "drained" for state in states):
        sys.exit(1)
