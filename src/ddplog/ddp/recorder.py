"""Decides what a training step is and how long its parts took, from the moments that hooks report.

Knows no torch: marks come from a clock, and a closed step goes to `emit`. A step ends with the optimizer's step, or,
without an optimizer, with a backward pass that synchronised gradients; until then everything adds up, so gradient
accumulation and a model that is called several times are one step.

    perf/step_s          from the end of the step before to the end of this one, on the host
    perf/data_s          time inside the loader's next(); without a loader, from the end of the step before, or of the
                         micro-batch, to the start of forward, left out where the model was evaluated in between
    perf/forward_s       the model's forward, without what DDP waits for before it
    perf/backward_s      backward from the model's outputs on, without the communication left at its end
    perf/optimizer_s     optimizer.step()
    perf/comm_s          from when the first bucket was ready to the end of the last
    perf/comm_exposed_s  the end of backward in which nothing was computed any more: communication only
    perf/wait_s          the same, and the broadcast of buffers before forward: what the rank spent on the others
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ddplog.ddp.clock import Clock, Sums

STEP_S: Final = "perf/step_s"
DATA_S: Final = "perf/data_s"
FORWARD_S: Final = "perf/forward_s"
BACKWARD_S: Final = "perf/backward_s"
OPTIMIZER_S: Final = "perf/optimizer_s"
COMM_S: Final = "perf/comm_s"
EXPOSED_S: Final = "perf/comm_exposed_s"
WAIT_S: Final = "perf/wait_s"
SAMPLES_PER_S: Final = "perf/samples_per_s"


@dataclass(slots=True, kw_only=True)
class Step:
    """What is known of one step; the sums may still grow until it is emitted."""

    sums: Sums = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """What is no time: numbers, or scalars that are still on the device."""
    num_samples: int = 0
    number: int = 0


class Recorder:
    """The state of one training loop. Called by hooks, from the thread that trains or, in backward, from autograd's.

    Args:
        clock: Measures forward, backward, optimizer and communication.
        emit: Takes a step that has ended, once its times are known.
        has_loader: Whether loaded() is told how long the data took; else it is the gap.
        now_s: The host's clock.
    """

    def __init__(
        self,
        clock: Clock,
        emit: Callable[[Step], None],
        *,
        has_loader: bool,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._emit = emit
        self._has_loader = has_loader
        self._now_s = now_s
        self._step = Step()
        self._since_s: float | None = None
        """When the step before ended; of the first step, when it began."""
        self._idle_since_s: float | None = None
        self._called: Any = None
        """Mark: DDP's forward was called, and the module's own has not begun."""
        self._forward: Any = None
        self._backward: Any = None
        self._bucket: Any = None
        self._computed: Any = None
        self._optimizer: Any = None

    @property
    def is_in_backward(self) -> bool:
        return self._backward is not None

    def loaded(self, took_s: float) -> None:
        """Count time that the loader took."""
        self._step.sums[DATA_S] = self._step.sums.get(DATA_S, 0.0) + took_s

    def evaluated(self) -> None:
        """Leave out this gap: the model was called, not for training."""
        self._idle_since_s = None

    def forward_starts(self, num_samples: int) -> None:
        self._clock.sweep()
        now_s = self._now_s()
        if self._since_s is None:
            self._since_s = now_s
        if self._idle_since_s is not None and not self._has_loader:
            self.loaded(now_s - self._idle_since_s)
        self._idle_since_s = None
        self._step.num_samples += num_samples
        self._backward = self._bucket = None  # of a pass that raised
        self._called = self._forward = self._clock.mark()

    def module_starts(self) -> None:
        """The module inside DDP begins: what was before it, DDP waited for."""
        if self._called is None:
            return
        self._forward = self._clock.mark()
        self._clock.span(self._step.sums, WAIT_S, self._called, self._forward)
        self._called = None

    def forward_ends(self) -> None:
        if self._forward is not None:
            self._clock.span(self._step.sums, FORWARD_S, self._forward, self._clock.mark())
        self._called = self._forward = None

    def backward_starts(self) -> None:
        self._backward = self._clock.mark()
        self._bucket = None

    def bucket_ready(self) -> None:
        """A gradient of the first bucket is there: the last call before the end of backward counts."""
        self._bucket = self._clock.mark()

    def backward_computed(self) -> None:
        """Every gradient of this rank is there; what is left of backward is communication."""
        if self._backward is not None:
            self._computed = self._clock.mark()
            self._clock.span(self._step.sums, BACKWARD_S, self._backward, self._computed)

    def backward_ends(self, *, is_synced: bool) -> None:
        """Backward is over.

        Args:
            is_synced: Whether the rest was the gradients' communication.
        """
        if self._computed is not None and is_synced:
            end, sums = self._clock.mark(), self._step.sums
            self._clock.span(sums, EXPOSED_S, self._computed, end)
            self._clock.span(sums, WAIT_S, self._computed, end)
            if self._bucket is not None:
                self._clock.span(sums, COMM_S, self._bucket, end)
        self._backward = self._bucket = self._computed = None
        self._idle_since_s = self._now_s()

    def optimizer_starts(self) -> None:
        self._optimizer = self._clock.mark()

    def optimizer_ends(self) -> None:
        if self._optimizer is not None:
            self._clock.span(self._step.sums, OPTIMIZER_S, self._optimizer, self._clock.mark())
        self._optimizer = None

    def add(self, values: dict[str, Any]) -> None:
        """Put values beside the step's times."""
        self._step.values.update(values)

    def step_ends(self, number: int) -> None:
        """Close the step under its number; it is emitted when the clock knows its times."""
        step, self._step = self._step, Step()
        step.number = number
        now_s = self._now_s()
        if self._since_s is not None:
            took_s = step.sums[STEP_S] = now_s - self._since_s
            if step.num_samples and took_s > 0:
                step.values[SAMPLES_PER_S] = step.num_samples / took_s
        self._since_s = self._idle_since_s = now_s
        self._clock.then(lambda: self._emit(step))

    def close(self) -> None:
        """Emit what has ended, without the times that are not known yet."""
        self._clock.close()

    def __repr__(self) -> str:
        return f"<Recorder {sorted(self._step.sums)} {self._clock!r}>"
