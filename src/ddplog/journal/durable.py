"""Makes a journal's files durable, and knows which of them are. For the agent, and for flush().

Guarantees: when sync() returns True, a power cut leaves every record that had been written before it was called, the
folder's and the segments' names included, on a disk that honours flushes.

A failed fdatasync leaves pages that are neither on the disk nor dirty: asked again, it would succeed and mean nothing.
So a segment whose sync has failed is never synced again; once nothing is appended to it any more, its content, which
memory still has, is written to a new file that takes its place. For a live segment the rank is asked to leave it.
Agent and rank tell each other, and the agent's successor, in the head page: who asks second is told of no failure. A
head page that failed is made dirty again first, a folder gets a new entry.

Source: Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from pathlib import Path
from typing import Final

from ddplog.journal import segment as layout

_logger = logging.getLogger("ddplog.journal")

_COPY_BYTES: Final = 1024 * 1024


class Durability:
    """What of one journal is on the disk.

    Args:
        folder: The journal's.
        head: Its head page, mapped.
        is_agent: Whether this is the agent's, which asks the rank to leave a segment, or the rank's own.
    """

    def __init__(self, folder: Path, head: mmap.mmap, *, is_agent: bool) -> None:
        self._folder = folder
        self._head = head
        self._is_agent = is_agent
        words = layout.AGENT_SUSPECT_OFFSET, layout.RANK_SUSPECT_OFFSET
        self._word, self._other_word = words if is_agent else words[::-1]
        # Kept open while a segment is appended to: the kernel tells a failed write-back to every descriptor that was
        # open then, and to later ones only if nobody had been told.
        self._descriptors: dict[int, int] = {}
        self._suspects = set(self._told(self._word))
        """To be written anew: what was found here, or by the agent before this one."""
        self._done = 0
        """Every segment up to this number is final and durable."""
        self._newest = 0
        self._is_placed = False
        """Whether the folder itself will be found again."""
        self._is_named = False
        """Whether its files will."""
        self._is_trouble_known = False

    def sync(self, *, is_over: bool, with_head: bool) -> bool:
        """Make durable what has been written so far.

        Args:
            is_over: Whether nothing is written any more; the newest segment is final, too.
            with_head: Whether the head page has changed in a way that must last.

        Returns:
            Whether it is; if not, the next call goes on.
        """
        try:
            is_durable = self._sync(is_over=is_over, with_head=with_head)
        except OSError as exc:
            is_durable = False
            if not self._is_trouble_known:
                _logger.error("cannot make the journal %s durable: %s", self._folder, exc)
        if is_durable and self._is_trouble_known:
            _logger.warning("the journal %s is durable again", self._folder)
        self._is_trouble_known = not is_durable
        return is_durable

    def _sync(self, *, is_over: bool, with_head: bool) -> bool:
        numbers = self._numbers()
        for number in self._descriptors.keys() - set(numbers):  # trimmed: acknowledged and deleted
            self._close(number)
        is_durable = True
        for number in numbers:
            is_final = is_over or number < numbers[-1]
            is_durable &= self._sync_segment(number, is_final=is_final)
            if is_durable and is_final:
                self._done = number
                self._close(number)
        self._suspects.intersection_update(numbers)
        self._tell_suspects()
        if self._is_agent:
            self._tell(layout.SEAL_OFFSET, numbers[-1] if numbers and self._is_suspect(numbers[-1]) else 0)
        if numbers and numbers[-1] > self._newest:
            self._newest, self._is_named = numbers[-1], False
        if with_head or not self._is_placed:
            self._sync_head()
        if not self._is_placed:
            _sync_folder(self._folder.parent)
            self._is_placed = True
        if not self._is_named:
            _sync_folder(self._folder)
            self._is_named = True
        return is_durable

    def _numbers(self) -> list[int]:
        return [number for number in layout.segment_numbers(str(self._folder)) if number > self._done]

    def _sync_segment(self, number: int, *, is_final: bool) -> bool:
        path = self._folder / layout.segment_name(number)
        if number not in self._descriptors:
            try:
                self._descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return True  # trimmed a moment ago
        if not self._is_suspect(number):
            try:
                os.fdatasync(self._descriptors[number])
            except OSError as exc:
                self._suspects.add(number)
                self._tell_suspects()
                _logger.error("%s could not be made durable (%s): it will be written anew", path, exc)
            else:
                return True
        if not is_final:
            return False
        try:
            _rewrite(path, self._descriptors[number])
        except OSError as exc:
            if not self._is_trouble_known:
                _logger.error("%s could not be written anew: %s", path, exc)
            return False
        self._suspects.discard(number)
        self._is_named = False  # another file has its name
        self._close(number)
        return True

    def _is_suspect(self, number: int) -> bool:
        return number in self._suspects or number in self._told(self._other_word)

    def _told(self, offset: int) -> range:
        (word,) = layout.U64.unpack_from(self._head, offset)
        return range(word & 0xFFFFFFFF, (word >> 32) + 1) if word else range(0)

    def _tell_suspects(self) -> None:
        self._tell(self._word, max(self._suspects) << 32 | min(self._suspects) if self._suspects else 0)

    def _tell(self, offset: int, value: int) -> None:
        word = layout.U64.pack(value)
        if self._head[offset : offset + len(word)] != word:
            layout.put(self._head, offset, word)

    def _sync_head(self) -> None:
        (count,) = layout.U64.unpack_from(self._head, layout.TOUCH_OFFSET)
        layout.put(self._head, layout.TOUCH_OFFSET, layout.U64.pack(count + 1 & (1 << 63) - 1))
        descriptor = os.open(self._folder / "head", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _close(self, number: int) -> None:
        descriptor = self._descriptors.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close the files."""
        for number in list(self._descriptors):
            self._close(number)

    def __repr__(self) -> str:
        return f"<Durability {self._folder.name} done={self._done} suspects={sorted(self._suspects)}>"


def _rewrite(path: Path, descriptor: int) -> None:
    """Put a durable copy of a file that nothing is appended to in its place; its readers keep what they have mapped."""
    copy = path.with_suffix(".copy")
    copy.unlink(missing_ok=True)
    out = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        offset = 0
        while data := os.pread(descriptor, _COPY_BYTES, offset):
            offset += os.pwrite(out, data, offset)
        os.fdatasync(out)
    finally:
        os.close(out)
    copy.rename(path)


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; one that failed before is changed first, so that there is something to write."""
    mark = folder / ".sync"
    mark.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.fsync(descriptor)
        except OSError as exc:
            if exc.errno == errno.EINVAL:  # a file system whose folders cannot be synced
                return
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            raise
    finally:
        os.close(descriptor)
