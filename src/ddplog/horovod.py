"""Measures what each rank of a Horovod job does in a step, and logs it: `ddplog.horovod.attach(hvd, optimizer)`.

    perf/step_s         from the end of one optimizer step to that of the next
    perf/data_s         from the end of one step to the first forward pass of the next: waiting for data, mostly. Left out
                        where the model was evaluated in between, and like the next only where attach() was given the model
    perf/forward_s      the model's forward passes since the last step
    perf/backward_s     from the gradient of the model's output, else from the first one handed to Horovod (a little
                        later), to the begin of synchronize()
    perf/comm_s         from the first gradient handed to Horovod to the end of synchronize(): part of it lies under the
                        backward pass
    perf/wait_s         inside synchronize(): the part of it that this rank waited for. The rank that waits least is the
                        one that the others wait for
    perf/optimizer_s    optimizer.step() without synchronize()
    perf/comm_bytes     bytes of gradients handed to Horovod, as compressed; sparse ones are not counted
    perf/samples_per_s  batch size by step_s; only where attach() was given the model or the batch size; summed over ranks
    optim/grad_norm     of the averaged gradients, before any clipping (and still scaled, under a GradScaler)
    optim/lr            of the first parameter group; optim/lr/1, ... of further ones

Time is the host's: on a GPU, where kernels run on after their launch, forward and backward are those of the launches, and
synchronize() is where the host waits. Nothing here waits for a device, calls a collective or changes a gradient.

MetricAverageCallback stands in for Horovod's: weighted, without a collective, and `logs` stays as it is.
"""

from __future__ import annotations

import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from ddplog.errors import UsageError
from ddplog.worker import contexts, current, doubts
from ddplog.worker import identity as identity_of
from ddplog.worker.absent import NullRun

if TYPE_CHECKING:
    from ddplog.worker.run import Run

_logger = logging.getLogger("ddplog")
_NS: Final = 1e-9


def attach(
    hvd: types.ModuleType, optimizer: Any, *, model: Any = None, batch_size: int | None = None, first_step: int = 0
) -> Attached:
    """Log the performance of every optimizer step from now on, on every rank.

    Args:
        hvd: horovod.torch, initialised.
        optimizer: What hvd.DistributedOptimizer() returned. One that is attached already is attached anew.
        model: For the times of the forward and of the whole backward pass, and the batch size: that of the first
            dimension of the first tensor that the model is called with.
        batch_size: Samples of this rank in each step, where the model's first argument does not tell.
        first_step: Step of the next optimizer step; that of run.set_step() counts where it is used.

    Returns:
        A handle whose detach() takes everything off again.

    Raises:
        UsageError: If ddplog or Horovod is not initialised, or the optimizer is not Horovod's.
    """
    run = current.run
    if run is None:
        raise UsageError("call ddplog.init() before ddplog.horovod.attach()")
    if not hvd.is_initialized():
        raise UsageError("call hvd.init() before ddplog.horovod.attach()")
    if not (hasattr(optimizer, "synchronize") and hasattr(optimizer, "skip_synchronize")):
        raise UsageError(
            f"attach(hvd, optimizer): the optimizer must be what hvd.DistributedOptimizer() returned, not a plain "
            f"{type(optimizer).__name__}"
        )
    earlier = getattr(vars(optimizer).get("synchronize"), "__self__", None)
    if isinstance(earlier, Attached):
        earlier.detach()
    handle = Attached(hvd, optimizer, model, batch_size, first_step)
    if isinstance(run, NullRun):
        return handle
    doubt = _find_doubt(hvd, run)
    if doubt is not None:
        doubts.tell(run, doubt)
    run.define_metric("perf/samples_per_s", reduce="sum")
    run.define_metric("optim/lr*", replicated=True)
    handle._put_on()  # noqa: SLF001 - the same module
    return handle


class Attached:
    """What attach() returned: an optimizer whose steps are logged until detach()."""

    def __init__(self, hvd: Any, optimizer: Any, model: Any, batch_size: int | None, first_step: int) -> None:
        self._hvd = hvd
        self._optimizer = optimizer
        self._model = model
        self._batch_size = batch_size
        self._next_step = first_step
        self._is_on = False
        self._hooks: list[Any] = []
        self._earlier: Any = None
        self._synchronize_of: Callable[..., Any] = _do_nothing
        self._compression: _Compression | None = None
        self._depth = 0
        self._step_began_ns = 0
        self._step_ended_ns = 0
        self._forget()

    def detach(self) -> None:
        """Take everything off; the optimizer and the model are as they were. Calls after the first do nothing."""
        self._is_on = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        optimizer = self._optimizer
        if self._compression is not None and optimizer._compression is self._compression:  # noqa: SLF001
            optimizer._compression = self._compression.inner  # noqa: SLF001
        self._compression = None
        if getattr(vars(optimizer).get("synchronize"), "__self__", None) is not self:
            return  # something else was put on since, and calls us, which now does nothing
        if self._earlier is None:
            del optimizer.synchronize
        else:
            optimizer.synchronize = self._earlier

    def _put_on(self) -> None:
        optimizer, model = self._optimizer, self._model
        self._earlier = vars(optimizer).get("synchronize")
        self._synchronize_of = optimizer.synchronize
        optimizer.synchronize = self._synchronize
        inner = getattr(optimizer, "_compression", None)  # not public, and no other place sees what is sent, and when
        if inner is not None:
            self._compression = optimizer._compression = _Compression(inner, self)  # noqa: SLF001
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if model is not None:
            self._hooks += [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward),
            ]
        self._is_on = True

    def _forget(self) -> None:
        """Begin a step."""
        self._num_samples = 0
        self._data_ns: int | None = None
        self._is_evaluated = False
        self._forward_began_ns = self._forward_ns = 0
        self._backward_began_ns = self._backward_ended_ns = 0
        self._sent_ns = self._synchronized_ns = 0
        self._wait_ns = self._inside_ns = 0
        self._num_bytes = 0
        self._grad_norm: Any = None

    # -- what happens in a step, in this order

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._is_on or module is not self._model:
            return
        if not module.training:
            self._is_evaluated = True
            return
        self._forward_began_ns = perf_counter_ns()
        if self._data_ns is None:
            self._data_ns = self._forward_began_ns - self._step_ended_ns
        first = next(_tensors((*args, *kwargs.values())), None)
        if first is not None and first.ndim:
            self._num_samples += int(first.shape[0])

    def _after_forward(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 - the hook's signature
        if not self._is_on or not self._forward_began_ns or module is not self._model:
            return
        self._forward_ns += perf_counter_ns() - self._forward_began_ns
        self._forward_began_ns = 0
        last = next((tensor for tensor in _tensors((output,)) if tensor.requires_grad), None)
        if last is not None:
            last.register_hook(self._begin_backward)

    def _begin_backward(self, gradient: Any) -> None:  # noqa: ARG002 - the hook's signature
        if not self._backward_began_ns:
            self._backward_began_ns = perf_counter_ns()

    def _send(self, num_bytes: int) -> None:
        """A gradient is handed to Horovod."""
        if not self._sent_ns:
            self._sent_ns = perf_counter_ns()
        self._num_bytes += num_bytes

    def _synchronize(self, *args: Any, **kwargs: Any) -> Any:
        began_ns = perf_counter_ns()
        try:
            result = self._synchronize_of(*args, **kwargs)
        except BaseException:  # an elastic job goes on after it, from its last commit
            self._depth = 0
            self._forget()
            raise
        if self._is_on:
            self._synchronized_ns = perf_counter_ns()
            self._wait_ns += self._synchronized_ns - began_ns
            self._backward_ended_ns = self._backward_ended_ns or began_ns
            try:
                self._grad_norm = _norm(self._optimizer)
            except Exception as exc:  # noqa: BLE001 - training goes on
                self._give_up(exc)
            if self._depth:
                self._inside_ns += perf_counter_ns() - began_ns
        return result

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        """Horovod's step() calls that of the class it extends, whose hooks are the same: only the outer one counts."""
        if not self._synchronized_ns:
            self._depth = 0  # that before raised
        if not self._depth:
            self._step_began_ns = perf_counter_ns()
        self._depth += 1

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - the hook's signature
        self._depth = max(0, self._depth - 1)
        if self._depth or not self._is_on or not self._synchronized_ns:  # broadcast_optimizer_state() steps without it
            return
        ended_ns = perf_counter_ns()
        try:
            self._log(ended_ns)
        except Exception as exc:  # noqa: BLE001 - training goes on
            self._give_up(exc)
        self._step_ended_ns = ended_ns
        self._next_step += 1
        self._forget()

    # -- what is logged of it

    def _log(self, ended_ns: int) -> None:
        run = current.run
        if run is None or isinstance(run, NullRun):
            return
        if self._hvd.size() != run.world_size:  # resized, and ddplog.init() was not called again
            doubt = _find_doubt(self._hvd, run)
            if doubt is not None:
                doubts.tell(run, doubt)
        run.log({**self._times(ended_ns), **self._optim()}, step=self._next_step if run.step is None else run.step)

    def _times(self, ended_ns: int) -> dict[str, float]:
        values = {
            "perf/wait_s": self._wait_ns * _NS,
            "perf/optimizer_s": (ended_ns - self._step_began_ns - self._inside_ns) * _NS,
            "perf/comm_bytes": float(self._num_bytes),
        }
        if self._sent_ns:
            values["perf/comm_s"] = (self._synchronized_ns - self._sent_ns) * _NS
        if self._data_ns is not None and self._step_ended_ns and not self._is_evaluated:
            values["perf/data_s"] = self._data_ns * _NS
        if self._forward_ns:
            values["perf/forward_s"] = self._forward_ns * _NS
        backward_began_ns = self._backward_began_ns or self._sent_ns
        if 0 < backward_began_ns < self._backward_ended_ns:
            values["perf/backward_s"] = (self._backward_ended_ns - backward_began_ns) * _NS
        if self._step_ended_ns:
            step_s = values["perf/step_s"] = (ended_ns - self._step_ended_ns) * _NS
            num_samples = self._batch_size or self._num_samples
            if num_samples:
                values["perf/samples_per_s"] = num_samples / step_s
        return values

    def _optim(self) -> dict[str, Any]:
        values = {}
        for number, group in enumerate(self._optimizer.param_groups):
            values[f"optim/lr/{number}" if number else "optim/lr"] = group["lr"]
        if self._grad_norm is not None:
            values["optim/grad_norm"] = self._grad_norm
        return values

    def _give_up(self, exc: Exception) -> None:
        self._is_on = False
        _logger.warning("ddplog: this optimizer's steps are not measured any more: %r", exc)

    def __reduce__(self) -> Any:
        return Attached, (None, None, None, None, 0)  # in a copy of the model, whose hooks these are, too

    def __repr__(self) -> str:
        return f"<ddplog.horovod.Attached {'on' if self._is_on else 'off'} next_step={self._next_step}>"


class _Compression:
    """Horovod's compression of the gradients, which sees each of them when it is handed over."""

    def __init__(self, inner: Any, handle: Attached) -> None:
        self.inner = inner
        self._handle = handle

    def compress(self, tensor: Any) -> Any:
        compressed, context = self.inner.compress(tensor)
        self._handle._send(compressed.numel() * compressed.element_size())  # noqa: SLF001 - the same module
        return compressed, context

    def decompress(self, tensor: Any, context: Any) -> Any:
        return self.inner.decompress(tensor, context)


class MetricAverageCallback:
    """Logs the metrics of an epoch, as Horovod's callback of that name averages them: in Keras, or called by hand.

    Every rank's values become one with their weights: an epoch of 90 samples on one rank and of 10 on another are averaged
    as 100 samples. There is no collective, so that it is no matter whether every rank calls it, and `logs` stays as it is:
    callbacks that need the mean of all ranks (ReduceLROnPlateau) need Horovod's own, behind this one.

    Args:
        weight: What this rank's values count for, usually the number of its samples; or a function of `logs`.
        prefix: Before each name: epochs are counted otherwise than steps.
    """

    def __init__(self, weight: float | Callable[[Mapping[str, Any]], float] = 1.0, *, prefix: str = "epoch/") -> None:
        self.weight = weight
        self.prefix = prefix

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Log what is in `logs` as the values of an epoch."""
        run = current.run
        if run is None:
            raise UsageError("call ddplog.init() first")
        logs = logs or {}
        weight = self.weight(logs) if callable(self.weight) else self.weight
        run.log({f"{self.prefix}{name}": value for name, value in logs.items()}, step=epoch, weight=weight)

    def __getattr__(self, name: str) -> Any:
        """Answer everything else that Keras calls, whose class we do not extend: it need not be there."""
        if name.startswith(("on_", "_implements_")) or name in ("set_params", "set_model"):
            return _do_nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _find_doubt(hvd: types.ModuleType, run: Run) -> doubts.Doubt | None:
    """Return what init() could not know where it was called before hvd.init(), or before the job was resized."""
    if (hvd.rank(), hvd.size()) == (run.rank, run.world_size):
        return None
    launched = identity_of.from_environment(os.environ)
    found = contexts.initialised(sys.modules)
    if identity_of.is_split(os.environ, launched, found):
        return doubts.find(os.environ, launched, found, sys.modules, sys.orig_argv)
    return doubts.stale(run.rank, run.world_size, hvd.rank(), hvd.size())


def _tensors(values: Any) -> Iterator[Any]:
    """Yield the tensors in what a model takes or gives."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _norm(optimizer: Any) -> Any:
    """Return the norm of all gradients, as a tensor on their device; None if there are none."""
    import torch

    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    dense = [gradient.detach() for gradient in gradients if not gradient.is_sparse]
    if not dense or len(dense) < len(gradients):
        return None
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense)))  # noqa: SLF001 - as clip_grad_norm_() does it


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that has nothing to do."""
