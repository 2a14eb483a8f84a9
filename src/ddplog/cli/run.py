"""Owns `ddplog run`: its options, which of the two launchers is meant, and what is checked before the start.

`ddplog run [ours] [torchrun's] SCRIPT ...` or `ddplog run [ours] -- COMMAND ...`. Our options reach the ranks
as `DDPLOG_*` variables, so that what a script passes to `ddplog.init()` still wins.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click
from click.shell_completion import CompletionItem

from ddplog.config import Settings, resolve
from ddplog.errors import ConfigError
from ddplog.journal.spool import JOB_VARIABLE, open_spool
from ddplog.launch import torchrun
from ddplog.launch.capture import CAPTURES, add_captures
from ddplog.launch.command import die_of, run_command
from ddplog.launch.finale import Finale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ddplog.launch.outcome import Outcome

USAGE: Final = "ddplog run [options] [torchrun's options] SCRIPT ...\n       ddplog run [options] -- COMMAND ..."
_VARIABLES: Final = {
    "project": "DDPLOG_PROJECT",
    "name": "DDPLOG_NAME",
    "run_id": "DDPLOG_RUN_ID",
    "dir": "DDPLOG_DIR",
    "sink": "DDPLOG_SINKS",
    "tag": "DDPLOG_TAGS",
}


class _RawCommand(click.Command):
    """Leaves the arguments to argparse: torchrun's parser is one, and click would swallow the `--`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete our own options, which click does not know, and the values of --capture."""
        if ctx.args[-1:] == ["--capture"]:
            words = sorted(CAPTURES)
        else:
            parser = _add_options(argparse.ArgumentParser(add_help=False))
            words = sorted(parser._option_string_actions)  # noqa: SLF001 - argparse has no public list
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


@click.command(cls=_RawCommand, help="Start a training job with every rank's metrics collected.")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run a job; exits as the job does."""
    argv: list[str] = ctx.args
    ours, rest = _split_command(argv)
    if rest is not None:
        _run_command(ours, rest)
    _run_torchrun(argv)


def _split_command(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str] | None]:
    """Return our options and the words after `--`, or None where a script (or a torchrun option) comes first."""
    parser = _add_options(argparse.ArgumentParser(prog="ddplog run", usage=USAGE, allow_abbrev=False))
    if not torchrun.is_installed() and argv and argv[0] in ("-h", "--help"):
        parser.epilog = "torchrun's options are shown here once torch is installed."
        parser.print_help()
        sys.exit(0)
    if "--" in argv:
        split = list(argv).index("--")
        if not {"-h", "--help"} & set(argv[:split]):
            ours, others = parser.parse_known_args(argv[:split])
            if not others:
                if not argv[split + 1 :]:
                    parser.error("there is no command after --")
                return ours, list(argv[split + 1 :])
    return argparse.Namespace(), None


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("ddplog", "What a script passes to ddplog.init() wins over these.")
    group.add_argument("--project", help="The tracker's project.")
    group.add_argument("--name", help="The run's display name.")
    group.add_argument("--run-id", help="The run's folder name; one that exists is continued.")
    group.add_argument("--dir", help="Folder of runs (default: runs).")
    group.add_argument("--sink", action="append", help="A tracker to forward to, name or name://target; repeatable.")
    group.add_argument("--tag", action="append", help="A word the trackers show; repeatable.")
    group.add_argument(
        "--capture",
        action="append",
        choices=sorted(CAPTURES),
        help="Let a script that is written for this tracker log to ddplog instead, unchanged; repeatable.",
    )
    group.add_argument("--quiet", action="store_true", help="Print problems only.")
    group.add_argument("--no-summary", action="store_true", help="No summary and no report at the end.")
    return parser


def _run_command(ours: argparse.Namespace, words: list[str]) -> NoReturn:
    environ = _make_environ(ours, os.environ)
    settings = check_settings(environ)
    outcome, problem = run_command(words, environ)
    if problem is not None:
        click.secho(f"ddplog run: {problem}", fg="red", err=True)
        sys.exit(outcome.exit_code)
    _end(ours, settings, environ[JOB_VARIABLE], outcome)


def _run_torchrun(argv: Sequence[str]) -> NoReturn:
    parser = _add_options(torchrun.make_parser())
    parser.prog, parser.usage = "ddplog run", USAGE
    arguments = parser.parse_args(argv)
    torchrun.check_script(arguments)
    environ = _make_environ(arguments, os.environ)
    settings = check_settings(environ)
    os.environ.update(environ)  # torchrun's workers inherit it.
    outcome = torchrun.run_torchrun(arguments, environ)
    _end(arguments, settings, environ[JOB_VARIABLE], outcome)


def _make_environ(ours: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    result = {**environ, JOB_VARIABLE: secrets.token_hex(8)}
    for option, variable in _VARIABLES.items():
        value = getattr(ours, option)
        if value is not None:
            result[variable] = ",".join(value) if isinstance(value, list) else value
    if ours.dir is not None:
        result["DDPLOG_DIR"] = str(Path(ours.dir).absolute())  # A rank may change its working directory.
    return add_captures(result, ours.capture or ())


def check_settings(environ: Mapping[str, str]) -> Settings:
    """Resolve the settings, and check what would otherwise fail in every rank.

    Raises:
        ConfigError: If a setting cannot work on this machine.
    """
    settings = resolve(environ=environ)
    if settings.mode == "off":
        return settings
    open_spool(settings.spool)
    if settings.origins["dir"] != "default":  # The default may well be replaced by the script's own argument.
        check_folder(Path(settings.dir))
    if settings.port:
        check_port(settings.host, settings.port)
    return settings


def check_folder(folder: Path) -> None:
    """Check that a folder can be written, or made.

    Raises:
        ConfigError: If not, naming the first folder above it that exists.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError("dir", str(folder), f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("dir", str(folder), f"{existing} cannot be written")


def check_port(host: str, port: int) -> None:
    """Check that the aggregator can listen.

    Raises:
        ConfigError: If the port is taken, or the host is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        raise ConfigError("host", host, f"is no address of this machine: {exc}") from exc
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As libzmq does: TIME_WAIT is no obstacle.
        try:
            probe.bind(address)
        except OSError as exc:
            raise ConfigError("port", port, f"cannot listen on {host}: {exc.strerror}; 0 takes any free port") from exc


def _end(ours: argparse.Namespace, settings: Settings, job: str, outcome: Outcome) -> NoReturn:
    Finale(settings, outcome, is_quiet=ours.quiet, has_summary=not ours.no_summary).end_job(job)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if outcome.death_signal is not None:
        die_of(outcome.death_signal)
    sys.exit(outcome.exit_code)
