"""Watches what the processes of a job use, against bounds that follow from its settings."""

import threading
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import psutil

MIB = 1024 * 1024
KINDS = ("rank", "agent", "aggregator", "forwarder")


class Use(NamedTuple):
    """Of one process at one moment."""

    rss: int
    fds: int
    threads: int


class Watch:
    """Samples every process of a job until it is left, and keeps the most that each used of anything."""

    def __init__(self, job, interval_s=0.02):
        self.job = job
        self.most: dict[tuple[str, int], Use] = {}
        """By kind and pid."""
        self.spool_bytes: dict[str, int] = defaultdict(int)
        """Most bytes that a rank's journal took."""
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _run(self):
        while not self._done.wait(self._interval_s):
            for kind, process in self._processes():
                with suppress(psutil.Error):
                    with process.oneshot():
                        use = Use(process.memory_info().rss, process.num_fds(), process.num_threads())
                    key = kind, process.pid
                    self.most[key] = Use(*map(max, use, self.most.get(key, use)))
            for folder in self.job.spool.glob("*/*.*/"):
                with suppress(FileNotFoundError):
                    size = sum(path.stat().st_size for path in folder.glob("*.seg"))
                    self.spool_bytes[folder.name] = max(size, self.spool_bytes[folder.name])

    def _processes(self):
        started = [process.pid for process in self.job.processes if process.poll() is None]
        helpers = [("agent", self.job.agent_pid()), ("aggregator", self.job.aggregator_pid())]
        for pid in started:
            with suppress(psutil.Error):  # it may end at any moment
                children = psutil.Process(pid).children(recursive=True)
                yield from (("rank", rank) for rank in children if _is_rank(rank))
        for kind, pid in helpers:
            with suppress(psutil.Error):
                if pid:
                    process = psutil.Process(pid)
                    yield kind, process
                    if kind == "aggregator":
                        yield from (("forwarder", child) for child in process.children() if _is_forwarder(child))

    @property
    def kinds(self):
        """The kinds of processes that were seen."""
        return {kind for kind, _ in self.most}

    def pids(self, *kinds):
        return [pid for kind, pid in self.most if kind in kinds]

    def check(self, **limits):
        """Assert kind=Use(...) of every process of every kind, and print what was seen."""
        found = {
            kind: Use(*map(max, zip(*(u for (k, _), u in self.most.items() if k == kind), strict=True)))
            for kind in KINDS
        }
        for kind, (rss, fds, threads) in found.items():
            most = limits[kind]
            said = f"{rss / MIB:6.1f} of {most.rss / MIB:4.0f} MiB, {fds:2} of {most.fds} fds"
            print(f"{kind:10} {said}, {threads:2} of {most.threads} threads")
        for kind, use in found.items():
            assert all(have <= limit for have, limit in zip(use, limits[kind], strict=True)), kind


def _is_rank(process):
    return process.name() != "sh" and any(word.endswith("train.py") for word in process.cmdline()[1:2])


def _is_forwarder(process):
    return any("ddplog.forward" in word for word in process.cmdline())
