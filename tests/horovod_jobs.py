"""What the tests that run real Horovod jobs share."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
HOROVODRUN = (str(BIN / "horovodrun"),)

needs_horovod = pytest.mark.skipif(
    find_spec("horovod") is None, reason="Horovod is not installed: scripts/install_horovod.sh builds it"
)


def use_venv(job):
    """Let a job's commands find the Python that runs the tests: horovodrun starts `python` by its name."""
    job.environ["PATH"] = f"{BIN}:{job.environ['PATH']}"
    return job
