"""A timed loader is the loader: the same object, class and batches, and as it was afterwards."""

import copy
import pickle

import pytest

from ddplog.ddp.loader import time_loader
from ddplog.errors import UsageError

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402


class Plain:
    def __init__(self):
        self.items = [1, 2, 3]

    def __iter__(self):
        return iter(self.items)


class Slotted:
    __slots__ = ("items",)

    def __init__(self):
        self.items = [1, 2, 3]

    def __iter__(self):
        yield from self.items


@pytest.mark.parametrize("make", [Plain, Slotted, lambda: DataLoader([1, 2, 3], batch_size=None)])
def test_it_yields_the_same_and_tells_its_time(make):
    loader, took = make(), []
    plain = type(loader)
    undo = time_loader(loader, took.append)

    assert [list(loader), list(loader)] == [[1, 2, 3], [1, 2, 3]]
    assert len(took) == 8  # the iteration's start, and each next() that gave one
    assert min(took) >= 0
    assert isinstance(loader, plain)
    assert type(loader).__name__ == plain.__name__
    undo()
    assert type(loader) is plain
    assert list(loader) == [1, 2, 3]
    assert len(took) == 8


def test_a_data_loader_with_workers_keeps_its_iterator_and_its_length():
    loader, took = DataLoader(list(range(8)), 2, num_workers=1, persistent_workers=True), []
    undo = time_loader(loader, took.append)
    for _ in range(2):
        iterator = iter(loader)
        assert len(iterator) == len(loader) == 4
        assert iterator._num_workers == 1
        assert [batch.tolist() for batch in iterator] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    undo()
    assert len(took) == 10


def test_copies_and_pickles_are_not_timed():
    loader, took = Plain(), []
    time_loader(loader, took.append)
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(other) is Plain
        assert list(other) == [1, 2, 3]
    assert took == []


@pytest.mark.parametrize(
    "loader", [[1, 2], iter([1]), 5, (item for item in [1])], ids=["list", "iterator", "int", "gen"]
)
def test_what_cannot_be_timed_is_named(loader):
    with pytest.raises(UsageError, match=rf"attach\(dataloader=\.\.\.\): a {type(loader).__name__} cannot be timed"):
        time_loader(loader, print)


def test_undo_after_somebody_else_changed_the_class_leaves_it():
    class Other(Plain):
        pass

    loader = Plain()
    undo = time_loader(loader, print)
    loader.__class__ = Other
    undo()
    assert type(loader) is Other
