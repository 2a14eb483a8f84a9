"""The stub of NVML, built once, and what it answers in a test."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.jobs import Job


class Stub:
    """What the stub answers: lines as in nvml_stub.c."""

    def __init__(self, library: Path, path: Path) -> None:
        self.path = path
        self.path.touch()
        self.environ = {"LD_LIBRARY_PATH": str(library.parent), "NVML_STUB": str(path)}

    def say(self, *lines: str) -> None:
        """Add lines; what is called from now on answers so."""
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the stub."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the stub of NVML with")
    path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-O1", "-fPIC", "-shared", "-o", path, source], check=True)
    return path


@pytest.fixture
def stub(nvml_library: Path, tmp_path: Path) -> Stub:
    """A stub without GPUs so far."""
    return Stub(nvml_library, tmp_path / "nvml.conf")


@pytest.fixture
def job(tmp_path: Path, stub: Stub) -> Iterator[Job]:
    """A job on the stub's GPUs that is sampled every second."""
    job = Job(tmp_path)
    job.environ |= stub.environ | {"DDPLOG_SAMPLE_S": "1"}
    yield job
    job.close()
