"""Lets the agent see where a rank is, even one whose main thread never comes back from C.

`arm()` registers the standard library's faulthandler on a signal: its handler is C, takes no lock and not the GIL,
allocates nothing, and appends the stacks of all threads to `stacks.<signal>` in the journal's folder. The rank gets one
descriptor and no thread; system calls that the signal interrupts go on (SA_RESTART).

The signal is one nobody uses (the setting `stack_signal`; 0: off). If it is taken already, by a handler of the user's or
of a library's, Python's or C's, or ignored, nothing is armed: it is never replaced. One that is installed later replaces
ours. Whether the signal is caught, the agent looks at before it sends it: by default, it would end the process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

_NUM_SIGNALS: Final = 64


class _Armed(NamedTuple):
    """What a signal makes this process do."""

    pid: int
    """A forked child has the handler, too, and its parent's file."""
    path: Path


_armed: dict[int, _Armed] = {}


def arm(folder: Path, signum: int) -> bool:
    """Make `signum` append this process's Python stacks to a file in the journal's folder.

    Args:
        folder: Of the journal.
        signum: 1 to 64; 0: do nothing.

    Returns:
        Whether it does. Raises nothing: a rank without it is only less easy to look into.
    """
    if not 0 < signum <= _NUM_SIGNALS:
        return False
    path = folder / f"stacks.{signum}"
    known = _armed.get(signum)
    try:
        if known is not None and known.pid == os.getpid():  # another run of this process: one file, two names
            os.link(known.path, path)
            return True
        if is_taken(os.getpid(), signum):
            return False
        import faulthandler

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        _armed[signum] = _Armed(os.getpid(), path)
        faulthandler.register(signum, descriptor, all_threads=True, chain=False)  # open as long as the process lives
    except (OSError, RuntimeError, ValueError, AttributeError):
        return False
    return True


def is_taken(pid: int, signum: int) -> bool:
    """Tell whether a process catches or ignores a signal; the kernel knows of C handlers too."""
    bit = 1 << (signum - 1)
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigCgt:", "SigIgn:")) and int(line.split()[1], 16) & bit:
            return True
    return False
