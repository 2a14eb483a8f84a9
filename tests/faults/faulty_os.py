"""Makes the n-th call to the operating system that concerns a folder fail, once or for a while.

Every call of ours goes through a name in `os`, `io` or `mmap`; these are replaced while the faults are armed. A call
counts if its path, or its descriptor's, is below the folder; what files of Python buffer counts when they are written.
SQLite's calls are its own, in C: connect() counts its statements instead.
"""

import contextlib
import errno
import io
import mmap
import os
import sqlite3
from collections import Counter

BY_PATH = ("open", "rename", "replace", "unlink", "mkdir", "listdir", "scandir", "truncate")
BY_DESCRIPTOR = ("posix_fallocate", "fsync", "fdatasync", "ftruncate", "write", "pwrite", "pwritev", "pread")
SQL = ("BEGIN", "COMMIT", "ROLLBACK", "INSERT", "UPDATE", "DELETE", "PRAGMA", "SELECT")
SQL_WORDS = {errno.ENOSPC: "database or disk is full", errno.EDQUOT: "disk I/O error", errno.EIO: "disk I/O error"}


class Faults:
    """What fails.

    Args:
        folder: Only what is below it.
        first: The number of the first call that fails, from 1; None: none does.
        last: The number of the last one.
        code: The errno.
    """

    def __init__(self, folder, first=None, last=None, code=errno.EIO):
        self.folder = str(folder)
        self.first, self.last, self.code = first, last if last is not None else first, code
        self.num_calls = 0
        self.seen = Counter()
        self.failed = []
        """(name, path) of the calls that did."""
        self.is_armed = False

    @contextlib.contextmanager
    def installed(self):
        """Put the stand-ins in place; nothing counts before armed()."""
        with contextlib.ExitStack() as stack:
            for module, name, stand_in in self._stand_ins():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, stand_in)
            yield self

    @contextlib.contextmanager
    def armed(self):
        """Count, and fail, what is called meanwhile."""
        self.is_armed = True
        try:
            yield
        finally:
            self.is_armed = False

    def _stand_ins(self):
        for name in BY_PATH:
            yield os, name, self._by_path(name, getattr(os, name))
        for name in BY_DESCRIPTOR:
            yield os, name, self._by_descriptor(name, getattr(os, name))
        yield mmap, "mmap", self._by_descriptor("mmap", mmap.mmap)
        yield io, "open", self._by_path("open", io.open)
        yield os, "fdopen", self._files(os.fdopen)
        yield sqlite3, "connect", self._connect(sqlite3.connect)

    def _by_path(self, name, real):
        def call(*args, **kwargs):
            path = args[0] if args else "."
            self.reach(name, os.fspath(path) if not isinstance(path, int) else _path(path))
            found = real(*args, **kwargs)
            if name == "open" and isinstance(found, io.IOBase):
                return _File(found, self) if found.writable() else found
            return found

        return call

    def _by_descriptor(self, name, real):
        def call(descriptor, *args, **kwargs):
            self.reach(name, _path(descriptor))
            return real(descriptor, *args, **kwargs)

        return call

    def _files(self, real):
        def fdopen(descriptor, *args, **kwargs):
            return _File(real(descriptor, *args, **kwargs), self)

        return fdopen

    def _connect(self, real):
        faults = self

        class Connection(sqlite3.Connection):
            def execute(self, sql, *args):
                word = sql.split(None, 1)[0]
                if word in SQL:
                    faults.reach_sql(word)
                return super().execute(sql, *args)

            def executemany(self, sql, *args):
                faults.reach_sql("INSERT")
                return super().executemany(sql, *args)

        def connect(path, *args, **kwargs):
            return real(path, *args, **kwargs, factory=Connection)

        return connect

    def reach_sql(self, word):
        """A statement is about to be made."""
        try:
            self.reach(f"SQL {word}", self.folder)
        except OSError:
            raise sqlite3.OperationalError(SQL_WORDS[self.code]) from None

    def reach(self, name, path):
        """A call is about to be made: raise if it is to fail."""
        if not self.is_armed or not str(path).startswith(self.folder):
            return
        self.num_calls += 1
        self.seen[name] += 1
        if self.first is not None and self.first <= self.num_calls <= self.last:
            self.failed.append((name, str(path)))
            raise OSError(self.code, os.strerror(self.code), str(path))


class _File:
    """A file whose writes may fail, half done, when they are made."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def write(self, data):
        try:
            self._faults.reach("file.write", _path(self._file.fileno()))
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def _path(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except (OSError, ValueError):
        return ""
