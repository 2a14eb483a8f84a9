"""Collects the Python stacks of this node's ranks: sends the signal they are armed for (worker/stacks.py), and reads
what they write. Never waits: `ask()` sends the signals, `answers()` is called every round and looks at the files.

A signal goes to the process that holds the lock of the rank's journal, as the kernel names it, through a pidfd opened
before that is checked: never to another process that was given its pid, nor to one that would die of the signal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddplog.core.stacks import MAX_TEXT, cut
from ddplog.journal import segment as layout

PATIENCE_NS: Final = 3_000_000_000
"""How long a rank has to write its stacks: one that does not is stopped, or inside an uninterruptible system call."""
QUIET_NS: Final = 100_000_000
"""A text that has not grown for this long is whole: faulthandler writes it in one go, a line at a time."""
_STATES: Final = {
    "D": "it is in an uninterruptible system call",
    "T": "it is stopped",
    "t": "it is stopped by a debugger",
    "Z": "it has ended",
}


class _NoStackError(Exception):
    """Why a rank cannot be asked."""


@dataclass(slots=True)
class _Waiting:
    path: Path
    pid: int
    asked_ns: int
    size: int = 0
    grown_ns: int = 0


class Stacks:
    """The stacks that were asked for and are not there yet. One thread."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, _Waiting] = {}
        self._troubles: list[tuple[bytes, str]] = []

    def ask(self, incarnation: bytes, folder: Path | None, now_ns: int) -> None:
        """Ask a rank for its stacks; a request that is under way already is joined.

        Args:
            incarnation: Whose.
            folder: Its journal's; None: it is not known here.
            now_ns: Monotonic time.
        """
        if incarnation in self._waiting:
            return
        try:
            if folder is None:
                raise _NoStackError("its node does not know it")
            self._waiting[incarnation] = _signal(folder, now_ns)
        except _NoStackError as exc:
            self._troubles.append((incarnation, str(exc)))
        except OSError as exc:
            self._troubles.append((incarnation, f"{exc.strerror}"))

    def answers(self, now_ns: int) -> Iterator[tuple[bytes, str, str]]:
        """Yield (incarnation, text, trouble) of what is there now, or was waited for long enough."""
        troubles, self._troubles = self._troubles, []
        for incarnation, trouble in troubles:
            yield incarnation, "", trouble
        for incarnation, waiting in list(self._waiting.items()):
            with suppress(FileNotFoundError):
                size = waiting.path.stat().st_size
                if size != waiting.size:
                    waiting.size, waiting.grown_ns = size, now_ns
            is_whole = waiting.size and now_ns - waiting.grown_ns >= QUIET_NS
            if not is_whole and now_ns - waiting.asked_ns < PATIENCE_NS:
                continue
            del self._waiting[incarnation]
            text = _take(waiting.path)
            yield incarnation, text, "" if text else f"no answer in {PATIENCE_NS / 1e9:.0f} s: {_state(waiting.pid)}"

    @property
    def num_waiting(self) -> int:
        """Ranks that were asked and have not answered."""
        return len(self._waiting) + len(self._troubles)

    def __repr__(self) -> str:
        return f"<Stacks waiting={self.num_waiting}>"


def _signal(folder: Path, now_ns: int) -> _Waiting:
    path, number = _find(folder)
    pid = _holder(folder / "alive")
    if not pid:
        raise _NoStackError("it has ended")
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise _NoStackError("it has ended") from exc
    try:
        if _holder(folder / "alive") != pid:  # the pidfd may be of another process that was given the pid
            raise _NoStackError("it has ended")
        if not _catches(pid, number):
            raise _NoStackError(f"it does not catch signal {number} any more")
        os.truncate(path, 0)  # what an earlier request got too late
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError as exc:
        raise _NoStackError("it has ended") from exc
    finally:
        os.close(descriptor)
    return _Waiting(path, pid, now_ns)


def _find(folder: Path) -> tuple[Path, int]:
    found: Sequence[Path] = sorted(folder.glob("stacks.*"))
    if not found or not found[0].suffix[1:].isdigit():
        raise _NoStackError("it is not armed: the setting stack_signal is 0 there, or the signal was taken")
    return found[0], int(found[0].suffix[1:])


def _holder(path: Path) -> int:
    """Return the pid of the process that holds a POSIX lock on the file; 0 if there is none, or none we can see."""
    with path.open("r+b") as file:
        return max(0, layout.holder(file.fileno()))


def _catches(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _take(path: Path) -> str:
    """Return what was written, and empty the file: it holds one answer at a time."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * MAX_TEXT))
            data = file.read()
            file.truncate(0)
    except OSError:
        return ""
    return cut(data.decode("utf-8", "replace"))


def _state(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "it has ended"
    letter = text[text.rindex(")") + 2]
    return _STATES.get(letter, f"its process is in state {letter}, and may block the signal")
