"""Owns looking at how far a rank has come, from outside and without reading what it logs: only the frames' lengths and
steps in the newest segment. For the sampler, which notes at which step a sample was taken.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ddplog.core.records import KIND_SCALARS, NO_STEP, PREFIX, PREFIX_BYTES
from ddplog.journal import segment as layout


class Pace:
    """The steps of one living rank.

    Args:
        folder: Its journal's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._mapping: mmap.mmap | None = None
        self._offset = 0
        self._step = NO_STEP

    def look(self) -> int | None:
        """Return the largest step it has logged at, as far as this has seen; None if it has shown none."""
        try:
            newest = max(layout.segment_numbers(str(self._folder)), default=0)
            if newest != self._number:
                self._open(newest)
        except OSError:  # trimmed, or too many open files: the next time
            return self._shown
        self._walk()
        return self._shown

    @property
    def _shown(self) -> int | None:
        return None if self._step == NO_STEP else self._step

    def _open(self, number: int) -> None:
        descriptor = os.open(self._folder / layout.segment_name(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self.close()
        self._mapping, self._number, self._offset = mapping, number, layout.SEGMENT_HEADER_BYTES

    def _walk(self) -> None:
        segment = self._mapping
        while segment is not None and self._offset + PREFIX_BYTES <= len(segment):
            length, _, _, head, _, step, _, _ = PREFIX.unpack_from(segment, self._offset)
            if length < PREFIX_BYTES or length & 7:
                return
            if head & 0xFF == KIND_SCALARS:
                self._step = max(self._step, step)
            self._offset += length

    def close(self) -> None:
        """Close the segment; twice is allowed."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def __repr__(self) -> str:
        return f"<Pace {self._folder.name} step={self._shown} segment={self._number}>"
