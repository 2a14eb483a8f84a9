"""Owns an append-only file whose durable length is the sink's position. Knows nothing of what is in it.

Exactly once rests on this: a batch is fsynced before its length is stored with the cursor, and on the next start
the file is cut back to the stored length, so what was written and not stored is written again and never doubled.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from ddplog.errors import PermanentSinkError, RetryableSinkError

_PERMANENT: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
     errno.ENAMETOOLONG, errno.EINVAL}
)  # fmt: skip
"""Only for opening: time does not heal these. A full disk or a lost server is healed."""


class OwnedFile:
    """An open file of which every byte below `num_bytes` is durable.

    Args:
        path: Made, with its folders, if it is not there.
        num_bytes: The stored length; the rest is cut off.

    Raises:
        RetryableSinkError: If the disk is full or does not answer.
        PermanentSinkError: If the path cannot be used, or the file is shorter than what was stored.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._descriptor = -1
        self._is_torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size > num_bytes:
                os.ftruncate(self._descriptor, num_bytes)
            os.fsync(self._descriptor)
            _sync_directory(path.parent)
        except OSError as exc:
            self.close()
            kind = PermanentSinkError if exc.errno in _PERMANENT else RetryableSinkError
            raise kind(f"{path}: {exc.strerror}") from exc
        if size < num_bytes:
            self.close()
            raise PermanentSinkError(
                f"{path} has {size} bytes, but {num_bytes} were delivered: it was cut or replaced. "
                "Remove the sink's cursor.json to write it again from the start"
            )

    def __repr__(self) -> str:
        return f"OwnedFile({str(self.path)!r}, num_bytes={self.num_bytes})"

    def append(self, data: bytes) -> int:
        """Append and make durable.

        Returns:
            The new length.

        Raises:
            RetryableSinkError: If it could not; the file is then as it was.
        """
        try:
            if self._is_torn:
                self._cut()
            self._is_torn = True
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError as exc:
            # After a failed fsync the kernel may have dropped the pages: cut, and write again in full. If even the
            # cut fails, the next append begins with it.
            with suppress(OSError):
                self._cut()
            raise RetryableSinkError(f"{self.path}: {exc.strerror}") from exc
        self._is_torn = False
        self.num_bytes += len(data)
        return self.num_bytes

    def close(self) -> None:
        """Close the file; twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self.num_bytes)
        self._is_torn = False


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
