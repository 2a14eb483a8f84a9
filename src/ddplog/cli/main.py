"""Owns the `ddplog` command: the table of subcommands, loaded lazily, and how errors are shown."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

import click

from ddplog.errors import DdplogError

COMMANDS: Final = {
    "run": "Start a training job with every rank's metrics collected.",
    "ls": "List runs.",
    "show": "Show one run: its ranks, metrics, events, drops and sinks.",
    "top": "Watch a live run.",
    "stacks": "Show where the ranks of a live run are: their Python stacks.",
    "report": "Write one self-contained HTML page of charts.",
    "sync": "Complete a run from the journals on this node, and deliver what its sinks have not got.",
    "export": "Write a run's points as CSV, JSON lines or Parquet.",
    "doctor": "Check this machine and print every setting with its origin.",
}


class LazyGroup(click.Group):
    """A group whose commands live in `ddplog.cli.<name>`, attribute `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ddplog.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddplog")
def cli() -> None:
    """One coherent run from every rank of a distributed training job."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a DdplogError becomes one line on stderr and exit status 2."""
    try:
        cli.main(args=list(argv) if argv is not None else None, prog_name="ddplog")
    except DdplogError as exc:
        click.secho(f"ddplog: {exc}", fg="red", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
