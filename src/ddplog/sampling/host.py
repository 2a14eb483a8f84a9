"""Reads what the host and single processes do, from /proc through psutil.

What is a rate needs two looks, and is left out of the first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import psutil

_LOOPBACK: Final = "lo"


class Host:
    """This machine. What a container may use of it is not looked at: these are the whole node's numbers."""

    def __init__(self) -> None:
        self._cpu: tuple[float, float] | None = None
        self._totals: dict[str, tuple[float, float]] = {}

    def values(self) -> dict[str, float]:
        """Return the metrics below `sys/host/` that can be had now."""
        memory = psutil.virtual_memory()
        found = {"mem_used_bytes": float(memory.used), "mem_available_bytes": float(memory.available)}
        found |= self._cpu_pct()
        now_s = time.monotonic()
        for name, total in _totals().items():
            before = self._totals.get(name)
            self._totals[name] = now_s, total
            if before is not None and now_s > before[0] and total >= before[1]:
                found[name] = (total - before[1]) / (now_s - before[0])
        return found

    def _cpu_pct(self) -> dict[str, float]:
        times = psutil.cpu_times()
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # in user and nice, too
        idle = times.idle + getattr(times, "iowait", 0.0)
        before, self._cpu = self._cpu, (total, idle)
        if before is None or total <= before[0]:
            return {}
        return {"cpu_pct": max(0.0, 100 * (1 - (idle - before[1]) / (total - before[0])))}

    def __repr__(self) -> str:
        return f"<Host rates={sorted(self._totals)}>"


class Process:
    """A rank's process.

    Args:
        pid: As this process sees it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process: psutil.Process | None = None
        self._cpu: tuple[float, float] | None = None

    def values(self) -> dict[str, float]:
        """Return the metrics below `sys/proc/` that can be had now; none of a process that is gone."""
        try:
            if self._process is None:
                self._process = psutil.Process(self.pid)
            with self._process.oneshot():
                found = {"rss_bytes": float(self._process.memory_info().rss)}
                times = self._process.cpu_times()
        except psutil.Error:
            return {}
        now = time.monotonic(), times.user + times.system
        before, self._cpu = self._cpu, now
        if before is not None and now[0] > before[0]:
            found["cpu_pct"] = max(0.0, 100 * (now[1] - before[1]) / (now[0] - before[0]))
        return found

    def __repr__(self) -> str:
        return f"<Process {self.pid}>"


def _totals() -> Mapping[str, float]:
    """Return what only ever grows, in bytes, by the name of its rate."""
    found: dict[str, float] = {}
    disk = psutil.disk_io_counters()
    if disk is not None:  # there is none to be seen
        found["disk_read_bytes_per_s"] = float(disk.read_bytes)
        found["disk_write_bytes_per_s"] = float(disk.write_bytes)
    links = [link for name, link in psutil.net_io_counters(pernic=True).items() if name != _LOOPBACK]
    if links:
        found["net_sent_bytes_per_s"] = float(sum(link.bytes_sent for link in links))
        found["net_recv_bytes_per_s"] = float(sum(link.bytes_recv for link in links))
    return found
