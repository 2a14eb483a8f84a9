"""The drop-in hook for training loops: `ddplog.attach(model, optimizer)` for DDP, FSDP 1 and 2, and plain modules.

May import torch: whoever attaches a model has it. Logs through the run it found, like any other user of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import nn

from ddplog.ddp.attachment import Attachment, find_ddp
from ddplog.ddp.grad_norm import is_fsdp
from ddplog.ddp.hook import has_hook
from ddplog.errors import UsageError
from ddplog.worker import current

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["PARTS", "Attachment", "attach"]

_logger = logging.getLogger("ddplog")
PARTS: Final = ("comm", "grad_norm")


def attach(
    model: nn.Module, optimizer: Any = None, dataloader: Any = None, *, parts: Collection[str] = PARTS
) -> Attachment:
    """Measure every training step of a model, and log it to the current run, on this rank.

    Logged are `perf/*` (seconds of the step and of its parts, samples/s, communication), `optim/grad_norm` as the
    optimizer sees it (after clipping), `optim/lr`, and on a GPU `cuda/*`. The step is that of set_step(), else the
    number of the optimizer's steps since; the weight is the batch size, the first dimension of the first tensor that
    forward was given. Only forwards in training mode with gradients count. Gradients stay bit for bit what they are,
    and on a GPU nothing waits for the device: times are logged, under their own step, when its events are done.

    Args:
        model: What the training loop calls: DDP or FSDP around the model, torch.compile() around that; or a plain one.
        optimizer: The one whose step() ends a training step; None: a backward pass that synchronises ends it.
        dataloader: What the training loop iterates, unchanged; its next() is then `perf/data_s`, which is else the
            gap between two steps.
        parts: What is measured besides times: comm (of DDP), grad_norm.

    Returns:
        A handle whose detach() takes everything off again; also a context manager.

    Raises:
        UsageError: If there is no run, an argument is not what it must be, or the model is attached already.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach(model=...): must be a torch.nn.Module, not {type(model).__name__}")
    optimizer = _inner(optimizer)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"attach(optimizer=...): must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UsageError(f"attach(parts={parts!r}): must be of {', '.join(PARTS)}")
    if current.run is None:
        raise UsageError("call ddplog.init() before ddplog.attach()")
    if has_hook(model):
        raise UsageError("attach(model=...): this model is attached already; detach() it first")
    attachment = Attachment(current.run, model, optimizer, dataloader, parts=frozenset(parts))
    if attachment.is_attached and _is_bare(model):
        _logger.warning(
            "ddplog.attach: the model is neither DDP nor FSDP, though there are %d ranks: their communication is not "
            "measured; if it will be wrapped, attach what comes out",
            dist.get_world_size(),
        )
    return attachment


def _inner(optimizer: Any) -> Any:
    """Return the optimizer inside a wrapper that only looks like one, such as Accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _is_bare(model: nn.Module) -> bool:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return find_ddp(model) is None and not is_fsdp(model)
