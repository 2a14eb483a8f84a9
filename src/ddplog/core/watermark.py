"""Decides how far each rank has come and which steps are over: progress, watermark, who is waited for.

The watermark of an attempt is the largest step for which no rank that is waited for will send more. A rank's
progress is the largest step it has shown, in a record or by set_step(); it may still send at that step, so the
watermark is the smallest progress minus one. The declared world is waited for from the start: a rank that has not
appeared counts as being at no step, otherwise step 0 would look complete with the first rank's value.

A rank is not waited for once it has ended (finished, or dead with everything it left stored), or when it has shown
no new step for `grace_ns`. It is waited for again when it shows one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ddplog.core.records import MAX_STEP, NO_STEP
from ddplog.core.reduce import Bool

NOTHING_YET: Final = NO_STEP
EVERYTHING: Final = MAX_STEP


class Watermark:
    """Progress of the ranks of one attempt.

    Args:
        world_size: Number of declared ranks.
        grace_ns: How long a rank without a new step is waited for.
        now_ns: Monotonic time at which the attempt opened.
    """

    def __init__(self, world_size: int, grace_ns: int, now_ns: int) -> None:
        self.grace_ns = grace_ns
        self.progress = np.full(world_size, NO_STEP, np.int64)
        self.moved_ns = np.full(world_size, now_ns, np.int64)
        self.ended: Bool = np.zeros(world_size, np.bool_)
        self.finished: Bool = np.zeros(world_size, np.bool_)

    @property
    def world_size(self) -> int:
        return len(self.progress)

    def join(self, rank: int, now_ns: int) -> None:
        """A process holds the rank (again): its grace begins anew."""
        self.ended[rank] = self.finished[rank] = False
        self.moved_ns[rank] = now_ns

    def advance(self, rank: int, step: int, now_ns: int) -> None:
        """The rank has shown `step`; a smaller one than before is no progress."""
        if step > self.progress[rank]:
            self.progress[rank] = step
            self.moved_ns[rank] = now_ns

    def end(self, rank: int, *, finished: bool = True) -> None:
        """The rank will send nothing more; `finished`: as it was meant to."""
        self.ended[rank] = True
        self.finished[rank] = finished

    def waited_for(self, now_ns: int) -> Bool:
        """Return [W]: the ranks that hold the watermark."""
        return np.asarray(~self.ended & (now_ns - self.moved_ns <= self.grace_ns))

    def silent(self, now_ns: int) -> Bool:
        """Return [W]: ranks that have shown no step although their grace is over."""
        return np.asarray((self.progress == NO_STEP) & (now_ns - self.moved_ns > self.grace_ns))

    def value(self, now_ns: int) -> int:
        """Return the watermark; NOTHING_YET if a rank has shown no step, EVERYTHING if none is waited for."""
        waited = self.waited_for(now_ns)
        if not waited.any():
            return EVERYTHING
        lowest = int(self.progress[waited].min())
        return lowest - 1 if lowest != NO_STEP else NOTHING_YET

    def __repr__(self) -> str:
        known = self.progress[self.progress != NO_STEP]
        span = f"{known.min()}..{known.max()}" if len(known) else "none"
        return f"<Watermark ranks={self.world_size} shown={len(known)} ended={int(self.ended.sum())} steps={span}>"
