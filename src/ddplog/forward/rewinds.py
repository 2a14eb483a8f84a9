"""Notes which attempts repeat steps that the sink has from an earlier one: training went back to a checkpoint.

What a sink does with them is its own policy (`Capabilities.on_rewind`); this is so that the run says where it did it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ddplog.core.delivery import Emission, Point

_MOST_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Rewind:
    """Where an attempt first repeated a step."""

    attempt: int
    step: int
    key: str


class Rewinds:
    """The rewinds of one sink, in the order of their delivery.

    Args:
        known: Those that were noted with the cursor.
        last_step: Returns the last step that a key has in the attempts below the given one; None if it has none.
    """

    def __init__(self, known: Sequence[Rewind], last_step: Callable[[str, int], int | None]) -> None:
        self.known = list(known)
        self._last_step = last_step
        self._asked: set[tuple[int, str]] = set()

    def note(self, batch: Sequence[Emission]) -> None:
        """Look at what the sink has just taken. Asks the store once per attempt and key, until the first repetition."""
        for emission in batch:
            if not isinstance(emission, Point) or not emission.attempt or emission.revision:
                continue
            place = emission.attempt, emission.key
            if place in self._asked or any(rewind.attempt == emission.attempt for rewind in self.known):
                continue
            self._asked.add(place)
            last = self._last_step(emission.key, emission.attempt)
            if last is not None and emission.step <= last:
                self.known.append(Rewind(emission.attempt, emission.step, emission.key))
                self._asked.clear()

    def describe(self, policy: str) -> str:
        """Return one line for people; empty if there was none."""
        if not self.known:
            return ""
        shown = [f"attempt {r.attempt} from {r.step} on ({r.key})" for r in self.known[-_MOST_SHOWN:]]
        more = len(self.known) - len(shown)
        earlier = f"{more} attempts before, " if more else ""
        return f"steps that came again: {earlier}{', '.join(shown)}; {policy}"

    def __repr__(self) -> str:
        return f"Rewinds({self.known})"
