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
