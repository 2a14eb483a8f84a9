"""Runs real jobs for the system tests: each in a folder of its own, with its own spool, and nothing left behind."""

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from ddplog.errors import DdplogError
from ddplog.store.reader import Run, open_run
from ddplog.testing import read_jsonl

Found = TypeVar("Found")

SOURCE = Path(__file__).parents[2] / "src"
LAUNCHER = Path(__file__).with_name("launcher.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
DDPLOG = (sys.executable, "-m", "ddplog.cli.main")
_FLOCK = struct.Struct("hhqqi4x")
_FOREIGN = ("DDPLOG_", "SLURM_", "KUBERNETES_", "TORCHELASTIC_", "HOROVOD_", "OMPI_", "PMI_", "PYTHONWARNINGS")


def wait_until(predicate: Callable[[], Found], timeout_s: float = 30.0) -> Found:
    """Poll until the predicate is true, and return what it returned; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = predicate()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {predicate.__name__}")
        time.sleep(0.02)


class Job:
    """One job, with the run id r1 unless told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spool = folder / "s"
        self.runs = folder / "runs"
        self.run_dir = self.runs / "r1"
        self.processes: list[subprocess.Popen[str]] = []
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)},
            "PYTHONPATH": str(SOURCE),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "DDPLOG_SPOOL": str(self.spool),
            "DDPLOG_DIR": str(self.runs),
            "DDPLOG_RUN_ID": "r1",
            "DDPLOG_SAMPLE_S": "0",  # what is counted here is what ranks log; tests/sampling has its own
        }

    # -- starting

    def script(self, text: str, name: str = "train.py") -> str:
        """Write the training script; return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def start(self, *words: str, **environ: str | None) -> subprocess.Popen[str]:
        """Start a command in the job's folder; a variable that is None is taken out."""
        wanted = {name: value for name, value in {**self.environ, **environ}.items() if value is not None}
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=wanted,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def ranks(self, world_size: int, *words: str) -> tuple[str, ...]:
        """Return the command that runs a script as that many ranks, without torch."""
        return (sys.executable, str(LAUNCHER), str(world_size), *words)

    def torchrun(self, world_size: int, *words: str) -> tuple[str, ...]:
        """Return torchrun's command, on a free port."""
        return (*TORCHRUN, "--standalone", "--nproc-per-node", str(world_size), *words)

    def end(self, process: subprocess.Popen[str], *, code: int = 0, timeout_s: float = 60.0) -> tuple[str, str]:
        """Wait for a process that must exit with `code`; return its stdout and stderr."""
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}\n{self.logs()}"
        return out, err

    def run(self, *words: str, code: int = 0, timeout_s: float = 60.0, **environ: str | None) -> tuple[str, str]:
        """Start a command and wait for it."""
        return self.end(self.start(*words, **environ), code=code, timeout_s=timeout_s)

    # -- looking

    def open(self, timeout_s: float = 30.0) -> Run:
        """Open the run once its aggregator has nothing left to do: everything stored, every sink done."""

        def has_ended() -> bool:
            if (self.run_dir / "control.json").exists():
                return False
            try:
                with open_run(self.run_dir) as run:
                    return run.status not in ("running", "unknown")
            except DdplogError:
                return False

        try:
            wait_until(has_ended, timeout_s)
        except pytest.fail.Exception:
            print(self.logs())
            raise
        return open_run(self.run_dir)

    def peek(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric of the live run; nothing if there is none yet."""
        try:
            with open_run(self.run_dir) as run:
                metric = run.metric(key)
        except DdplogError:
            return []
        return list(zip(metric.step.tolist(), metric.value.tolist(), strict=True))

    def jsonl(self, kind: str = "point") -> list[dict[str, Any]]:
        """Return what the JSONL sink has."""
        lines = read_jsonl(self.run_dir / "sinks" / "jsonl" / f"{self.run_dir.name}.jsonl")
        return [line for line in lines if line["type"] == kind]

    def folders(self) -> list[Path]:
        """Return the job's folders in the spool."""
        return sorted(path.parent for path in self.spool.glob("*/job.json"))

    def agent_pid(self) -> int | None:
        """Return the pid of the agent that lives, as the kernel knows it from its lock."""
        return next((pid for folder in self.folders() if (pid := _holder(folder / "agent.lock"))), None)

    def aggregator_pid(self) -> int | None:
        """Return the pid of the aggregator that lives."""
        for folder in self.folders():
            try:
                pid = int(json.loads((folder / "aggregator.json").read_text())["pid"])
                os.kill(pid, 0)
            except (OSError, ValueError):
                continue
            return pid
        return None

    def logs(self) -> str:
        """Return what the helpers wrote, for the message of a test that fails."""
        paths = [*self.spool.glob("*/logs/*.log"), *self.runs.glob("*/logs/*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in sorted(paths))

    # -- the end

    def close(self) -> None:
        """End every process of the job, each by its own pid."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        helpers = [p for p in _with_children(filter(None, [self.agent_pid(), self.aggregator_pid()])) if self._owns(p)]
        for process in helpers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not any(map(_lives, helpers)))

    def _owns(self, process: psutil.Process) -> bool:
        """Whether it is a helper of this job: a pid out of a file may be of another PID namespace."""
        try:
            return any(str(self.folder) in word for word in process.cmdline())
        except psutil.NoSuchProcess:
            return False

    def __repr__(self) -> str:
        return f"<Job {self.folder} agent={self.agent_pid()} aggregator={self.aggregator_pid()}>"


def _with_children(pids: Iterator[int]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found.update({p.pid: p for p in (process, *process.children(recursive=True))})
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holder(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(descriptor)
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None
