import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.jobs import Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job in a folder of its own; its processes end with the test."""
    job = Job(tmp_path)
    yield job
    job.close()


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """A folder in memory, if there is one for files: thousands of trials make tens of thousands of them."""
    has_memory = os.access("/dev/shm", os.W_OK | os.X_OK)
    path = Path(tempfile.mkdtemp(prefix="ddplog-test-", dir="/dev/shm" if has_memory else None))
    yield path
    shutil.rmtree(path)
