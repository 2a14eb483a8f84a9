"""Decides what a logged value is: flattens nested dicts and turns numbers of any library into floats.

A tensor on a device stays one: its number is not known without waiting, which is never done here. device.py fetches it.
torch and numpy are never imported here: a value of theirs can only exist if the user's process has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from ddplog.worker.metrics import is_metric, local_result

MAX_KEY_BYTES: Final = 250
_MAX_DEPTH: Final = 16


class BadValueError(Exception):
    """A key or value that cannot be logged; `reason` is one of journal.segment.DROP_REASONS.

    Args:
        reason: Why.
        message: For people.
        num_values: How many values are not taken because of it.
    """

    def __init__(self, reason: str, message: str, num_values: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.num_values = num_values


def flatten(
    data: Mapping[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any, BadValueError | None]]:
    """Yield (key, value, what is wrong with the key) of every leaf; keys of nested dicts are joined by "/"."""
    for name, value in data.items():
        if not isinstance(name, str):
            yield (
                prefix + repr(name),
                value,
                BadValueError("bad_key", f"key {name!r} is {_article(name)}, not a string"),
            )
            continue
        key = prefix + name
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from flatten(value, key + "/", depth + 1)
        elif is_metric(value):
            yield from _of_metric(name, value, prefix, depth)
        else:
            yield key, value, _check_key(key)


def _of_metric(name: str, metric: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any, BadValueError | None]]:
    try:
        found = local_result(metric)
    except Exception as exc:  # noqa: BLE001 - compute() of a user's metric may raise anything
        yield prefix + name, metric, BadValueError("bad_value", f"{prefix}{name}: {type(metric).__name__}: {exc}")
    else:
        yield from flatten({name: found}, prefix, depth)


def _check_key(key: str) -> BadValueError | None:
    if not key.isprintable() or not key.strip() or "\u202e" in key:
        return BadValueError("bad_key", f"key {key!r} is empty or has characters that cannot be shown")
    if len(key) > MAX_KEY_BYTES or len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
        return BadValueError("bad_key", f"key {key[:40]!r}... is longer than {MAX_KEY_BYTES} bytes")
    return None


def as_number(key: str, value: Any) -> Any:
    """Return a number as a float, or as a plain tensor of one element if it is on a device, which is not waited for.

    Ints beyond 2**53 are rounded. The key is for messages.

    Raises:
        BadValueError: If it is not one number, or has none on this rank.
    """
    if isinstance(value, (float, int)):  # bool is an int, numpy.float64 a float
        try:
            return float(value)
        except OverflowError:
            raise BadValueError("bad_value", f"{key}: {str(value)[:20]}... is too large for a float") from None
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            what = f"shape {tuple(value.shape)}" if value.numel() != 1 else f"type {value.dtype}"
            raise BadValueError("bad_value", f"{key}: a tensor of {what}; log() takes single real numbers")
        tensor = value if type(value) is torch.Tensor else _unwrap(key, value)
        if tensor.is_cpu:
            return float(tensor.item())  # a third of the time of float(tensor.detach()), whatever requires_grad
        if tensor.is_meta:
            raise BadValueError("bad_value", f"{key}: a tensor on the meta device has no value")
        return tensor
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        if value.size == 1 and value.dtype.kind in "biuf":
            return float(value.reshape(()))
        what = f"numpy array of shape {value.shape}" if value.size != 1 else f"numpy value of type {value.dtype}"
        raise BadValueError("bad_value", f"{key}: a {what}; log() takes single real numbers")
    raise BadValueError("bad_value", f"{key}: {_article(value)}; log() takes numbers (log_text() takes text)")


def is_remote(value: Any) -> bool:
    """Whether a value is a tensor whose number, and so its repr, would have to be waited for."""
    if type(value) is int:
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and not value.is_cpu


def shown(value: Any) -> str:
    """Return what a message shows of a value. Not a tensor's repr, which waits for its device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"<a tensor of shape {tuple(value.shape)} on {value.device}>"
    return repr(value)


def _unwrap(key: str, value: Any) -> Any:
    """Return the plain tensor in what is derived from one."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the latter before torch 2.5
        dtensor = getattr(sys.modules.get(name), "DTensor", None)
        if dtensor is not None and isinstance(value, dtensor):
            return _local(key, value)
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(value, fake.FakeTensor):
        raise BadValueError("bad_value", f"{key}: a FakeTensor has no value (is something being traced?)")
    return value


def _local(key: str, value: Any) -> Any:
    """Return the local tensor of a DTensor that is the same on every rank of its mesh."""
    if not all(placement.is_replicate() for placement in value.placements):
        how = ", ".join(map(str, value.placements))
        why = f"{key}: a DTensor placed {how}: no rank has its value. Log {key}.full_tensor(), which is a collective"
        raise BadValueError("bad_value", f"{why}: every rank of its mesh has to call it")
    return value.to_local()


def exempt_from_tracing() -> bool:
    """Tell torch.compile, if it is loaded, to leave ddplog's code alone; True if that is done.

    It would compile the frames of log(), which has nothing that can be compiled, one by one: seconds at the first call. A
    call in a compiled step is then one graph break. torch itself loads it when the first optimizer is made.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    with suppress(Exception):  # not a public interface: without it, it is slower at first
        sys.modules["torch._dynamo"].trace_rules.add("ddplog")
    return True


def as_int(value: Any) -> int | None:
    """Return a whole number of any library as an int; None if it is not one, or not an int64."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, float) or (numpy is not None and isinstance(value, numpy.floating)):
        number = int(value) if value.is_integer() else None
    else:
        try:
            number = value.__index__()
        except Exception:  # noqa: BLE001 - the value is the user's: whatever it raises, it is not a whole number
            number = None
    if number is None or not -(1 << 63) < number < 1 << 63:
        return None
    return number


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
