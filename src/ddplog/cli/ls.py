"""`ddplog ls`: lists runs."""

from __future__ import annotations

import click

from ddplog.cli import output
from ddplog.cli.target import dir_option, runs_folder


@click.command("ls")
@dir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: str | None, as_json: bool) -> None:  # click passes by name
    """List runs, the newest first."""
    from ddplog.store.reader import list_runs
    from ddplog.view import tables

    where = runs_folder(folder)
    found = list_runs(where)
    if as_json:
        output.show_json(found)
    elif found:
        output.show(tables.runs(found))
    else:
        click.echo(f"no runs in {where.absolute()}", err=True)
