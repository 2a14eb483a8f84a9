"""Reads what faulthandler writes of a process's threads, and says where each of them is. Pure.

    Thread 0x00007f1 (most recent call first):
      File "/usr/lib/python3.11/threading.py", line 324 in wait
    <blank line>
    Current thread 0x00007f2 (most recent call first):
      File "train.py", line 17 in step

The main thread stands last: the interpreter lists its threads from the newest to the oldest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

MAX_TEXT: Final = 64 * 1024
"""Characters of one rank's stacks that are kept; the end, where the main thread is."""
_CUT: Final = "... (the first threads are cut)\n"
_THREAD: Final = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*:$")
_FRAME: Final = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')
_LIBRARY: Final = ("site-packages/", "dist-packages/", "/lib/python", "<frozen")


class Frame(NamedTuple):
    """One line of a stack."""

    file: str
    line: int
    """0: not known."""
    function: str

    @property
    def is_users(self) -> bool:
        """Whether it is neither the standard library's nor an installed package's."""
        return not any(mark in self.file for mark in _LIBRARY)

    def __str__(self) -> str:
        return f"{self.function} ({self.file.rpartition('/')[2]}:{self.line})"


class Thread(NamedTuple):
    """A thread's frames, the innermost first."""

    ident: str
    frames: tuple[Frame, ...]

    @property
    def users_frame(self) -> Frame | None:
        """The innermost frame of the user's own code; of any code if there is none."""
        return next((frame for frame in self.frames if frame.is_users), self.frames[0] if self.frames else None)


def parse(text: str) -> list[Thread]:
    """Return the threads in the order of the text; lines of any other form are passed over."""
    found: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        thread, frame = _THREAD.match(line), _FRAME.match(line)
        if thread is not None:
            found.append((thread[1], []))
        elif frame is not None and found:
            number = int(frame[2]) if frame[2].isdigit() else 0
            found[-1][1].append(Frame(frame[1], number, frame[3]))
    return [Thread(ident, tuple(frames)) for ident, frames in found]


def place(text: str) -> str:
    """Say where the main thread is, `train (train.py:17)`."""
    threads = parse(text)
    frame = threads[-1].users_frame if threads else None
    return str(frame) if frame is not None else "no Python code"


def cut(text: str) -> str:
    """Return what is kept of a text: what can be shown, and its end if it is too long."""
    kept = "".join(c if c.isprintable() or c == "\n" else "?" for c in text[-MAX_TEXT:])
    if len(text) <= MAX_TEXT:
        return kept
    return _CUT + kept[len(_CUT) :].partition("\n")[2]


def alike(stacks: Iterable[tuple[int, str]]) -> list[tuple[list[int], str]]:
    """Group ranks whose threads are at the same places: (ranks, the text of the first), the smallest group first.

    One rank that is elsewhere than the others is usually the one they wait for.
    """
    groups: dict[Sequence[tuple[Frame, ...]], tuple[list[int], str]] = {}
    for rank, text in stacks:
        groups.setdefault(tuple(thread.frames for thread in parse(text)), ([], text))[0].append(rank)
    return sorted(groups.values(), key=lambda group: (len(group[0]), group[0]))
