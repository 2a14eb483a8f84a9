"""Owns what goes to stdout: rich tables, as wide as their content where nobody looks, and JSON."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

_PIPE_WIDTH = 200


def console() -> Console:
    """Return a console on stdout; in a pipe lines are not folded to 80 columns. Respects NO_COLOR."""
    found = Console(file=sys.stdout, highlight=False)
    return found if found.is_terminal else Console(file=sys.stdout, highlight=False, width=_PIPE_WIDTH)


def show(renderable: RenderableType) -> None:
    """Print to stdout, without the blanks that fill a line where it goes into a pipe."""
    target = console()
    if target.is_terminal:
        target.print(renderable)
        return
    with target.capture() as captured:
        target.print(renderable)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(value: Any) -> None:
    """Print JSON to stdout. NaN is null; infinity is "Infinity" or "-Infinity"."""
    click.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return what json can write, from dataclasses, numpy columns, times and paths."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float):
        return plain_float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def plain_float(value: float) -> float | str | None:
    """Return a float as the project's JSON has it."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
