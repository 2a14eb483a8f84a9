"""Owns the hooks on a model and its optimizer: what attach() puts on, and what detach() takes off again.

Nothing here raises into training or waits for a device, and nothing changes what is computed: only hooks that return
nothing are registered, and no communication hook (see buckets.py). A hook that fails is counted and warned about once.
"""

from __future__ import annotations

import atexit
import logging
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddplog.ddp import probes
from ddplog.ddp.buckets import Buckets
from ddplog.ddp.clock import Clock, EventClock, HostClock
from ddplog.ddp.grad_norm import GRAD_NORM, GradNorm
from ddplog.ddp.hook import Hook
from ddplog.ddp.loader import time_loader
from ddplog.ddp.recorder import SAMPLES_PER_S, Recorder, Step
from ddplog.worker.absent import NullRun
from ddplog.worker.run import Run

_logger = logging.getLogger("ddplog")
_OF_ALLOCATOR: Final = {"cuda/*_bytes": "max", "cuda/alloc_retries": "sum", "cuda/num_ooms": "sum"}


class Attachment:
    """What attach() put on a model, its optimizer and its loader. Made by attach(). A context manager: leaving it detaches.

    Args:
        run: Where it logs.
        model: The model that the training loop calls.
        optimizer: The one whose step() ends a training step.
        dataloader: The one whose next() is timed.
        parts: What is measured beside the phases: "grad_norm", "comm".
        clock: Measures; by the model's device if None.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: Any,
        dataloader: Any,
        *,
        parts: frozenset[str],
        clock: Clock | None = None,
    ) -> None:
        self._run = run
        self._model = model
        self._optimizer = optimizer
        self._device = probes.device_of(model)
        self._is_cuda = self._device.type == "cuda"
        self._undo: list[Callable[[], None]] = []
        self._num_steps = 0
        self.num_errors = 0
        """Hooks that failed: measurements that are missing. Training went on."""
        self._grad_norm = GradNorm(model) if "grad_norm" in parts else None
        self._recorder = Recorder(clock or self._make_clock(), self._log, has_loader=dataloader is not None)
        self._ddp = find_ddp(model)
        has_comm = self._ddp is not None and "comm" in parts
        self._buckets = Buckets(self._ddp, self._guarded(self._recorder.bucket_ready)) if has_comm else None
        self._on_gradient = self._guarded(self._backward_starts)
        self._on_computed = self._guarded(self._backward_computed)
        self._on_end = self._guarded(self._backward_ends)
        if not isinstance(run, NullRun):  # mode=off
            self._put_on(dataloader)

    @property
    def is_attached(self) -> bool:
        return bool(self._undo)

    def detach(self) -> None:
        """Take every hook off and log what was measured; model, optimizer and loader are as before. Again: nothing."""
        if not self._undo:
            return
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._guarded(self._recorder.close)()

    def __enter__(self) -> Attachment:  # noqa: PYI034 - typing has no Self on Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self._undo else "detached"
        return (
            f"<ddplog.Attachment {state} after {self._num_steps} steps, {self.num_errors} errors, {self._recorder!r}>"
        )

    # -- putting on

    def _make_clock(self) -> Clock:
        if not self._is_cuda:
            return HostClock()
        return EventClock(
            lambda: torch.cuda.Event(enable_timing=True),
            lambda: torch.cuda.current_stream(self._device),
        )

    def _put_on(self, dataloader: Any) -> None:
        if dataloader is not None:
            self._undo.append(time_loader(dataloader, self._recorder.loaded))
        for pattern, reduction in (_OF_ALLOCATOR if self._is_cuda else {}).items():
            self._run.define_metric(pattern, reduction)
        self._run.define_metric(SAMPLES_PER_S, "sum")
        self._run.define_metric(f"{probes.LEARNING_RATE}*", replicated=True)
        if self._grad_norm is not None:
            self._run.define_metric(GRAD_NORM, self._grad_norm.reduce)
        model, guarded = self._model, self._guarded
        pre = model.register_forward_pre_hook(guarded(self._forward_starts), prepend=True, with_kwargs=True)
        post = model.register_forward_hook(guarded(self._forward_ends))
        self._undo += [pre.remove, post.remove]
        if self._ddp is not None and self._buckets is not None:
            inner = self._ddp.module.register_forward_pre_hook(guarded(self._module_starts), prepend=True)
            self._undo += [inner.remove, self._buckets.detach]
        if self._optimizer is not None:
            before = self._optimizer.register_step_pre_hook(guarded(self._optimizer_starts))
            after = self._optimizer.register_step_post_hook(guarded(self._optimizer_ends))
            self._undo += [before.remove, after.remove]
        # The last steps, as far as the GPU is done with them. Weak: a model that nobody has any more is not kept for it.
        at_exit = partial(_close, weakref.ref(self._recorder))
        atexit.register(at_exit)
        self._undo.append(lambda: atexit.unregister(at_exit))

    def _guarded(self, call: Callable[..., None]) -> Hook:
        return Hook(call, self._report, is_cuda=self._is_cuda)

    def _report(self, exc: Exception) -> None:
        self.num_errors += 1
        if self.num_errors > 1:
            return
        message = f"ddplog.attach: a measurement failed (further ones are counted): {exc!r}"
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        except RuntimeWarning:  # the user runs with -W error; a warning must not stop training
            _logger.warning(message)

    # -- the hooks

    def _forward_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._recorder.forward_starts(probes.count_samples(args, kwargs))
        else:
            self._recorder.evaluated()

    def _module_starts(self, _module: nn.Module, _args: Any) -> None:
        self._recorder.module_starts()

    def _forward_ends(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._recorder.forward_ends()
            probes.on_gradient(output, self._on_gradient)

    def _backward_starts(self, _grad: Any) -> None:
        if self._undo and not self._recorder.is_in_backward:
            self._recorder.backward_starts()
            probes.queue_callback(self._on_computed)

    def _backward_computed(self) -> None:
        # Queued before DDP's callback, which waits for the buckets; the one queued from here runs after it.
        self._recorder.backward_computed()
        probes.queue_callback(self._on_end)

    def _backward_ends(self) -> None:
        is_synced = self._ddp is not None and bool(self._ddp.require_backward_grad_sync)
        self._recorder.backward_ends(is_synced=is_synced and self._buckets is not None)
        if is_synced and self._buckets is not None:
            self._buckets.look()
        if self._optimizer is None and (is_synced or self._ddp is None):
            self._recorder.add(self._norm(self._model.parameters()))
            self._step_ends()

    def _optimizer_starts(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._recorder.add(self._norm(parameters))
        self._recorder.add(probes.learning_rates(optimizer))
        self._recorder.optimizer_starts()

    def _optimizer_ends(self, *_: Any) -> None:
        self._recorder.optimizer_ends()
        self._step_ends()

    def _step_ends(self) -> None:
        values: dict[str, Any] = dict(self._buckets.values()) if self._buckets is not None else {}
        if self._is_cuda:
            values.update(probes.allocator(self._device))
        self._recorder.add(values)
        self._recorder.step_ends(self._number())

    def _number(self) -> int:
        ambient = self._run.step
        number = self._num_steps if ambient is None else ambient
        self._num_steps += 1
        return number

    def _norm(self, parameters: Any) -> dict[str, Any]:
        if self._grad_norm is None:
            return {}
        with torch.no_grad():
            norm = self._grad_norm.measure(parameters)
        if norm is None:
            return {}
        scale = getattr(self._optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale themselves
        return {GRAD_NORM: norm if scale is None else norm / scale}

    def _log(self, step: Step) -> None:
        self._run.log({**step.sums, **step.values}, step=step.number, weight=step.num_samples or 1)


def _close(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        try:
            recorder.close()
        except Exception as exc:  # noqa: BLE001 - the edge: a process that ends must not end with this
            _logger.warning("ddplog.attach: the last steps' times are not logged: %r", exc)


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP module that a model is, also where torch.compile() is around it."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return None
        model = inner
    return model
