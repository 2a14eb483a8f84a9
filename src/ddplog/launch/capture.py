"""Decides what `ddplog run --capture NAME` puts into the job's environment. site/sitecustomize.py acts on it.

PYTHONPATH is how a Python that somebody else starts can be reached without changing its script. A Python that ignores
it (`python -I`, `-E`, `-S`) is not captured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ddplog.launch.site.sitecustomize import VARIABLE

CAPTURES: Final[Mapping[str, tuple[str, str]]] = {"comet": ("comet_ml", "ddplog.comet")}
"""What may be captured -> the package that scripts import, and the module that stands in for it."""

SITE: Final = Path(__file__).with_name("site")


def add_captures(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the environment in which these trackers are captured.

    Args:
        environ: The job's environment without.
        names: Keys of CAPTURES.
    """
    if not names:
        return dict(environ)
    words = dict.fromkeys(["=".join(CAPTURES[name]) for name in names])
    given = environ.get("PYTHONPATH")
    folders = [folder for folder in given.split(os.pathsep) if folder != str(SITE)] if given else []
    return {**environ, VARIABLE: ",".join(words), "PYTHONPATH": os.pathsep.join([str(SITE), *folders])}
