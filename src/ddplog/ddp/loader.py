"""Times a data loader without another object in its place: the loader itself gets a subclass of its own class.

`for batch in loader` looks `__iter__` up on the class, so nothing less than the class will do. It is an instance of
what it was, keeps its attributes, pickles as what it was, and gets its class back at the end.
"""

from __future__ import annotations

import copyreg
import time
from collections.abc import Callable, Iterator
from typing import Any

from ddplog.errors import UsageError


class TimedIterator:
    """An iterator that tells how long each next() took; everything else is the iterator's own."""

    def __init__(self, iterator: Iterator[Any], took: Callable[[float], None]) -> None:
        self._iterator = iterator
        self._took = took

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Any:
        start_s = time.perf_counter()
        item = next(self._iterator)
        self._took(time.perf_counter() - start_s)
        return item

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]  # as the iterator has it: DataLoader's has one

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def make(cls: Any, *args: Any) -> Any:
    """Make an object without initialising it: what copyreg.__newobj__ does."""
    return cls.__new__(cls, *args)


def time_loader(loader: Any, took: Callable[[float], None]) -> Callable[[], None]:
    """Have every iteration of a loader tell how long it waited.

    Args:
        loader: Anything iterable whose class can be subclassed: a DataLoader, or one's own.
        took: Called with seconds, after each next(), and for the start of the iteration. Must not raise.

    Returns:
        What takes it off again.

    Raises:
        UsageError: If it is no such object.
    """
    plain: Any = type(loader)

    def timed_iter(self: Any) -> TimedIterator:
        start_s = time.perf_counter()
        iterator = plain.__iter__(self)
        took(time.perf_counter() - start_s)
        return TimedIterator(iterator, took)

    def reduce(self: Any, protocol: Any) -> Any:
        made = plain.__reduce_ex__(self, protocol)
        if not isinstance(made, tuple):
            return made
        function, arguments, *rest = made
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle insists on the object's own class for it
            function = make
        return (function, tuple(plain if item is timed else item for item in arguments), *rest)

    try:
        if not hasattr(plain, "__iter__") or hasattr(plain, "__next__"):
            raise TypeError("not iterable again and again")
        body = {"__slots__": (), "__iter__": timed_iter, "__reduce_ex__": reduce, "__module__": plain.__module__}
        timed = type(plain.__name__, (plain,), body)
        loader.__class__ = timed
    except TypeError as exc:
        raise UsageError(
            f"attach(dataloader=...): a {plain.__name__} cannot be timed ({exc}); it must be a DataLoader, or an object "
            "of a class of your own with __iter__. Without it the gap between two steps counts"
        ) from exc

    def restore() -> None:
        if type(loader) is timed:
            loader.__class__ = plain

    return restore
