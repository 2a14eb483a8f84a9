"""Time in which this process could have heard somebody: its own stalls do not count.

A process that was stopped (SIGSTOP, a suspended host, a disk that stayed full) finds all deadlines over and nobody
heard of when it goes on. What others sent meanwhile is still to be read; none of them was silent.
"""

from __future__ import annotations

from typing import Final

LONGEST_ROUND_NS: Final = 1_000_000_000


class AwakeTime:
    """Turns monotonic time into awake time: equal to it at first, behind it by every stall from then on.

    Args:
        now_ns: Monotonic time.
    """

    def __init__(self, now_ns: int) -> None:
        self._last_ns = now_ns
        self._stalled_ns = 0

    def at(self, now_ns: int) -> int:
        """Return the awake time at a monotonic time. To be asked every round: what lies between two calls counts as
        LONGEST_ROUND_NS at most."""
        self._stalled_ns += max(0, now_ns - self._last_ns - LONGEST_ROUND_NS)
        self._last_ns = now_ns
        return now_ns - self._stalled_ns

    def __repr__(self) -> str:
        return f"<AwakeTime stalled={self._stalled_ns / 1e9:.1f} s>"
