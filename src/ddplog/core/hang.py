"""Decides whether an attempt hangs, and says of every rank how it stands. Touches nothing; time is an argument.

A rank moves when it sends a record or shows a step. It stands still when it has not moved for its limit: `hang_ns`, or
twice the longest pause it has come back from, if that is more. So a job that validates for ten minutes between its
epochs is taken for hung once at most, and one that logs once an hour never. The pause before the second step does not
count any more once there is one: it was the start-up, or the first step's compilation.

Only what could be seen counts: a rank whose node was silent (a stopped agent, a network that was cut, this process
itself when it was stopped) begins anew with the first sign of life.

An attempt hangs when a rank of it has shown a step and
  - every living rank stands still, or
  - living ranks stand still, at a lower step than another one, while at least as many move: where all but one stand
    still, they wait for that one, which validates or saves. Here only ranks count whose steps were seen to go on: one
    that logged a summary and left the rest to rank 0 is idle, not behind.
Ranks that ended are never behind; a job whose ranks all ended does not hang, nor does one before its first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ddplog.core.effects import ENDED, Writer
from ddplog.core.records import NO_STEP

UNSEEN_NS: Final = 5_000_000_000
"""An agent speaks every 250 ms; after 20 times that, nothing is known of its ranks."""
STRAGGLE_STEPS: Final = 3
"""A rank that moves and is further behind than this is a straggler; ranks of one job are a step apart all the time."""
_STEPS_OF_ITS_OWN: Final = 2
MAX_STACKS: Final = 8
"""Stacks collected by itself when a hang begins: so many of the ranks behind, and so many of those that wait."""
_MAX_NAMED: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """An attempt that hangs."""

    ranks: tuple[int, ...]
    """Those that stand still and are behind; if nobody is behind, all that stand still."""
    steps: tuple[int, ...]
    """The last step of each of them."""
    reached: int
    """The step that the furthest rank has shown."""
    is_everybody: bool
    """Whether no living rank moves."""
    num_living: int
    since_ns: int
    """When the last of `ranks` moved."""
    dead: tuple[int, ...] = ()
    """Ranks that died at `reached` or before it, and may be what the others wait for."""

    @property
    def step(self) -> int:
        """The lowest step of those behind."""
        return min(self.steps)

    def message(self, now_ns: int) -> str:
        """Return it in words."""
        for_s = (now_ns - self.since_ns) / 1e9
        which = f"{_ranks(self.ranks)} {'has' if len(self.ranks) == 1 else 'have'} not moved for {for_s:.1f} s"
        if len(self.ranks) == self.num_living:
            which = f"no rank has moved for {for_s:.1f} s"
        low, high = min(self.steps), max(self.steps)
        at = f"last step {low}" if low == high else f"last steps {low} to {high}"
        if low == high == self.reached:
            return f"{which}: {at}{self._deaths()}"
        num_others = self.num_living - len(self.ranks)
        others = (
            f"the other {num_others}" if num_others > 1 else "the other one" if num_others else "others before them"
        )
        has, do = ("has", "does") if num_others == 1 else ("have", "do")
        waiting = f" and {do} not move either" if self.is_everybody and num_others else ""
        return f"{which}: {at}; {others} {has} reached step {self.reached}{waiting}{self._deaths()}"

    def data(self, since_unix_ns: int) -> str:
        """Return it as the data of its event."""
        return json.dumps(
            {
                "ranks": self.ranks,
                "steps": self.steps,
                "reached": self.reached,
                "is_everybody": self.is_everybody,
                "num_living": self.num_living,
                "dead": self.dead,
                "since_unix_ns": since_unix_ns,
            }
        )

    def _deaths(self) -> str:
        return f"; {_ranks(self.dead)} died" if self.dead else ""


def restore_hang(data: str, now_ns: int) -> tuple[Hang, int]:
    """Return what an event's data says, for an aggregator that starts again at `now_ns`, and since when by the wall."""
    raw = json.loads(data)
    hang = Hang(
        ranks=tuple(raw["ranks"]),
        steps=tuple(raw["steps"]),
        reached=raw["reached"],
        is_everybody=raw["is_everybody"],
        num_living=raw["num_living"],
        since_ns=now_ns,
        dead=tuple(raw["dead"]),
    )
    return hang, raw["since_unix_ns"]


def find_hang(writers: Sequence[Writer], hang_ns: int, now_ns: int) -> Hang | None:
    """Decide whether the attempt hangs.

    Args:
        writers: Who holds the attempt's ranks, dead or alive.
        hang_ns: The setting, more than 0.
        now_ns: Monotonic time.
    """
    living = [writer for writer in writers if writer.state == "running"]
    stepping = [writer for writer in living if writer.step != NO_STEP]
    if not stepping:
        return None
    still = {writer.info.rank for writer in living if is_still(writer, hang_ns, now_ns)}
    if not still:
        return None
    reached = max(writer.step for writer in writers)
    is_everybody = len(still) == len(living)
    furthest = max(writer.step for writer in living)
    behind = [
        writer
        for writer in stepping
        if writer.info.rank in still
        and writer.step < (reached if is_everybody else furthest)
        and (is_everybody or writer.step - writer.first_step >= _STEPS_OF_ITS_OWN)
    ]
    if not is_everybody and not 0 < len(behind) <= len(living) - len(still):
        return None
    named = behind or stepping
    return Hang(
        ranks=tuple(writer.info.rank for writer in named),
        steps=tuple(writer.step for writer in named),
        reached=reached,
        is_everybody=is_everybody,
        num_living=len(living),
        since_ns=max(writer.last_moved_ns for writer in named),
        dead=tuple(w.info.rank for w in writers if w.state == "died" and w.step <= reached),
    )


def is_over(hang: Hang, writers: Iterable[Writer]) -> bool:
    """Return whether one of those that stood still has moved since, or has ended."""
    named = set(hang.ranks)
    return any(w.info.rank in named and (w.state != "running" or w.last_moved_ns > hang.since_ns) for w in writers)


def is_still(writer: Writer, hang_ns: int, now_ns: int) -> bool:
    """Return whether a living rank has not moved for its limit, and was seen all that time."""
    if now_ns - writer.last_seen_ns > UNSEEN_NS or writer.pending_step is not None:
        return False
    return now_ns - max(writer.last_moved_ns, writer.watched_ns) > max(hang_ns, 2 * writer.longest_pause_ns)


def stacks_wanted(hang: Hang, writers: Sequence[Writer], hang_ns: int, now_ns: int) -> list[bytes]:
    """Return whose stacks say why: those behind, and some of those that wait for them (at least half the limit)."""
    named = set(hang.ranks)
    behind = [writer for writer in writers if writer.info.rank in named]
    others = [
        writer
        for writer in writers
        if writer.info.rank not in named
        and writer.state == "running"
        and now_ns - max(writer.last_moved_ns, writer.watched_ns) > hang_ns // 2
    ]
    return [writer.info.incarnation for writer in (*behind[:MAX_STACKS], *others[:MAX_STACKS])]


def standing(writer: Writer, hang: Hang | None, reached: int, idle_ns: int, now_ns: int) -> str:
    """Say in a word how a rank stands.

    Returns:
        For a living rank: running; straggler (it moves, more than STRAGGLE_STEPS steps behind); idle (it has not
        moved for `idle_ns`); hung; waiting (it stands still while others hang); unseen (nothing is heard of its
        node). Else how it ended, or duplicate.
    """
    if writer.state in ENDED or writer.state == "duplicate":
        return writer.state
    if now_ns - writer.last_seen_ns > UNSEEN_NS:
        return "unseen"
    if hang is not None and writer.info.rank in hang.ranks:
        return "hung"
    if hang is not None and now_ns - writer.last_moved_ns > (now_ns - hang.since_ns) // 2:
        return "waiting"
    if now_ns - writer.last_moved_ns > idle_ns:
        return "idle"
    is_far = writer.step != NO_STEP and reached - writer.step > STRAGGLE_STEPS
    return "straggler" if is_far else "running"


def _ranks(ranks: Sequence[int]) -> str:
    """Return `rank 1`, `ranks 0-3, 7`."""
    spans: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    shown = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans[:_MAX_NAMED])
    more = f" and {sum(high - low + 1 for low, high in spans[_MAX_NAMED:])} more" if len(spans) > _MAX_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
