"""Owns how one process of ddplog starts another: with this interpreter, and with this very ddplog."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_CODE: Final = "import sys; sys.path[0] = sys.argv.pop(1); from {module} import main; main()"
"""sys.path[0] would be the working directory, where a user's file may be called like a standard library's module."""


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module`.main() with these arguments in sys.argv[1:].

    The word behind -X tells launch/site/sitecustomize.py to leave this process alone.
    """
    package = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-X", "ddplog_helper", "-c", _CODE.format(module=module), package, *arguments]
