"""Decides which ranks held up the others, from what each rank says it waited. Pure over a run's columns.

At every step each rank logs how long it spent on the others in communication (`perf/wait_s`). Whoever comes last
waits least: the rank with the minimum held up the step, by the largest wait minus its own. What all of them spend on
the transfer itself is in both and cancels.

Of ranks that are alike one is last at every step all the same, so a rank is named only if chance and trifles are out:

- a step counts as held up if it was by at least 1 ms and 5 % of the median step: below that lies what schedulers,
  clocks and interrupts do to any rank;
- the rank held up far more of those than its fair share: 5 standard deviations of a fair draw above it, and twice;
  and at least 20;
- all in all it cost at least 5 % of the run's time. Healthy ranks differ by less, and nobody would go and look for it.

Its cause is the phase that took it longer than the others by at least half of what it held them up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ddplog.view.text import count, seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddplog.store.columns import MetricColumns
    from ddplog.store.reader import Run

WAIT: Final = "perf/wait_s"
STEP: Final = "perf/step_s"
PHASES: Final = {
    "perf/data_s": "waiting for data",
    "perf/forward_s": "forward",
    "perf/backward_s": "backward",
    "perf/optimizer_s": "the optimizer",
}
"""Metric -> how the cause is called."""

MIN_HELD_UP_S: Final = 0.001
MIN_SHARE: Final = 0.05
MIN_STEPS: Final = 20
"""Steps it must have held up: 20 of 20 happen by chance to one of two equal ranks once in 500,000 runs, 10 once in 500."""
_MIN_EXPLAINED: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank for which the others waited, far more than by chance."""

    rank: int
    num_steps: int
    """Steps it held up."""
    num_compared: int
    """Steps at which ranks said how long they waited."""
    mean_s: float
    """How long the others waited for it at such a step, on average."""
    lost_s: float
    """All of it."""
    share: float
    """Of the time that all compared steps took."""
    cause: str
    """The phase that explains it; empty if none does."""

    def describe(self) -> str:
        """Return it as a sentence."""
        said = (
            f"rank {self.rank} held up {count(self.num_steps)} of {count(self.num_compared)} steps by "
            f"{seconds(self.mean_s)} on average ({self.share:.0%} of the time)"
        )
        return f"{said}: {self.cause} takes it longer than the others" if self.cause else said


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldUp:
    """Who held up each step, and by how much; columns of one length, ascending by step."""

    step: NDArray[np.int64]
    rank: NDArray[np.int64]
    seconds: NDArray[np.float64]


def held_up(wait: MetricColumns) -> HeldUp:
    """Return, of each step at which at least two ranks said how long they waited, who waited least and how much less."""
    chosen = wait.take((wait.n > 1) & (wait.min_rank >= 0))
    return HeldUp(step=chosen.step, rank=chosen.min_rank, seconds=chosen.max - chosen.min)


def find_stragglers(run: Run) -> tuple[Straggler, ...]:
    """Return the ranks that held up a run, the most costly first; nothing for a run that says nothing about it."""
    keys = set(run.keys())
    if not {WAIT, STEP} <= keys:
        return ()
    wait = run.metric(WAIT)
    chosen = [(rank, found) for rank, found in _suspects(wait, run.metric(STEP)).items() if found.share >= MIN_SHARE]
    if not chosen:
        return ()
    phases = {cause: run.metric(key) for key, cause in PHASES.items() if key in keys}
    stragglers = [
        Straggler(
            rank=rank,
            num_steps=len(found.steps),
            num_compared=found.num_compared,
            mean_s=found.lost_s / len(found.steps),
            lost_s=found.lost_s,
            share=found.share,
            cause=_cause(rank, found, phases),
        )
        for rank, found in chosen
    ]
    return tuple(sorted(stragglers, key=lambda straggler: (-straggler.lost_s, straggler.rank)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    steps: NDArray[np.int64]
    lost_s: float
    share: float
    num_compared: int


def _suspects(wait: MetricColumns, step: MetricColumns) -> dict[int, _Suspect]:
    """Return the ranks that held up more steps than chance would have them, whatever it cost."""
    found = held_up(wait)
    took = step.mean[np.isin(step.step, found.step) & np.isfinite(step.mean)]
    if not len(took):
        return {}
    counts = found.seconds >= max(MIN_HELD_UP_S, MIN_SHARE * float(np.median(took)))
    ranks, num_steps = np.unique(found.rank[counts], return_counts=True)
    num, fair = int(counts.sum()), 1 / float(wait.n[wait.n > 1].mean())
    suspects = {}
    for rank, num_held in zip(ranks.tolist(), num_steps.tolist(), strict=True):
        if num_held >= MIN_STEPS and num_held / num > _most_by_chance(fair, num):
            its = counts & (found.rank == rank)
            lost_s = float(found.seconds[its].sum())
            suspects[rank] = _Suspect(
                steps=found.step[its], lost_s=lost_s, share=lost_s / float(took.sum()), num_compared=len(found.step)
            )
    return suspects


def _most_by_chance(fair: float, num: int) -> float:
    spread = math.sqrt(fair * (1 - fair) / num)
    return min(max(fair + 5 * spread, min(2 * fair, 0.8)), 0.95)


def _cause(rank: int, found: _Suspect, phases: dict[str, MetricColumns]) -> str:
    longest, cause = _MIN_EXPLAINED * found.lost_s, ""
    for name, columns in phases.items():
        its = np.isin(columns.step, found.steps) & (columns.max_rank == rank)
        more_s = float(np.nansum((columns.max - columns.min)[its]))
        if more_s >= longest:
            longest, cause = more_s, name
    return cause
