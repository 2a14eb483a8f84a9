"""Decides which run a command means: a path, a run id under the folder of runs, or the newest one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ddplog import config
from ddplog.errors import RunNotFoundError
from ddplog.store.columns import RunSummary
from ddplog.store.reader import list_runs

_Command = TypeVar("_Command", bound=Callable[..., Any])
LATEST = "latest"


def run_argument(command: _Command) -> _Command:
    """Give a command the argument RUN and the option --dir, as `run` and `folder`."""
    command = click.argument("run", required=False, default=LATEST, shell_complete=_complete)(command)
    return dir_option(command)


def dir_option(command: _Command) -> _Command:
    """Give a command the option --dir, as `folder`."""
    return click.option(
        "--dir", "folder", metavar="DIR", default=None, help="Folder of runs; the setting `dir`, `runs`, if not given."
    )(command)


def runs_folder(folder: str | None) -> Path:
    """Return the folder of runs: the option, else the setting."""
    return Path(folder if folder is not None else config.resolve().dir)


def find(run: str, folder: str | None) -> Path:
    """Return the run's folder.

    Args:
        run: What the user wrote: a path, a run id, or `latest`.
        folder: The option --dir.

    Raises:
        RunNotFoundError: If there is no run at all. A name that fits none is returned as a path under the folder of
            runs, for open_run to say what is near it.
    """
    runs = runs_folder(folder)
    inside = runs / run
    if run == LATEST and not inside.exists():
        readable = [found for found in list_runs(runs) if found.status != "unreadable"]
        if not readable:
            raise RunNotFoundError(f"no run in {runs.absolute()}; name one, or its folder with --dir")
        return readable[0].path
    is_path = os.sep in run or run in (".", "..") or run.endswith(".db")
    if not is_path and (inside / "run.db").is_file():
        return inside
    return Path(run) if is_path or (Path(run) / "run.db").is_file() else inside


def _complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        found = list_runs(runs_folder(context.params.get("folder")))
    except (OSError, ValueError):  # a shell that asks for words must not be shown a traceback
        return []
    return [
        CompletionItem(run.run_id, type="plain", help=_help(run))
        for run in found
        if run.run_id.startswith(incomplete) and run.status != "unreadable"
    ]


def _help(run: RunSummary) -> str:
    from ddplog.view.text import clean

    return clean(f"{run.status} {run.name}")
