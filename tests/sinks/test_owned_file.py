"""An owned file holds exactly the bytes whose length was returned."""

import os

import pytest

from ddplog.errors import PermanentSinkError, RetryableSinkError
from ddplog.sinks import owned_file
from ddplog.sinks.owned_file import OwnedFile


def test_a_write_in_pieces_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(owned_file.os, "write", lambda fd, data: write(fd, data[:3]))
    file = OwnedFile(tmp_path / "a" / "f", 0)
    assert file.append(b"0123456789") == 10
    file.close()
    assert file.path.read_bytes() == b"0123456789"


def test_a_failed_append_leaves_nothing_behind(tmp_path, monkeypatch):
    """On a full disk half a batch may have been written."""
    file = OwnedFile(tmp_path / "f", 0)
    file.append(b"kept")
    write, calls = os.write, []

    def full(descriptor, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:2])

    with monkeypatch.context() as patch:
        patch.setattr(owned_file.os, "write", full)
        with pytest.raises(RetryableSinkError):
            file.append(b"lost")
    assert file.path.read_bytes() == b"kept"
    assert file.append(b"more") == 8
    file.close()
    assert file.path.read_bytes() == b"keptmore"


def test_an_append_that_could_not_be_cut_is_cut_by_the_next(tmp_path, monkeypatch):
    file = OwnedFile(tmp_path / "f", 0)

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(owned_file.os, "fsync", broken)
        patch.setattr(owned_file.os, "ftruncate", broken)
        with pytest.raises(RetryableSinkError):
            file.append(b"lost")
    assert file.path.read_bytes() == b"lost"
    file.append(b"new")
    file.close()
    assert file.path.read_bytes() == b"new"


def test_a_file_shorter_than_delivered_is_refused(tmp_path):
    """It was cut or replaced by somebody: going on would leave a hole that nobody sees."""
    (tmp_path / "f").write_bytes(b"abc")
    with pytest.raises(PermanentSinkError):
        OwnedFile(tmp_path / "f", 4)


def test_what_time_does_not_heal_is_permanent(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "f", tmp_path):
        with pytest.raises(PermanentSinkError):
            OwnedFile(path, 0)
