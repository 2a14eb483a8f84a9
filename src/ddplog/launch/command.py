"""Runs any command as the job: same streams, same process group, signals passed on, its exit code ours.

Not here: what the end means (`outcome`), and what is done about it (`finale`).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

from ddplog.launch.outcome import Outcome, command_ended, launcher_failed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGINT)


@dataclass(slots=True)
class _Relay:
    """Passes signals on to the child. Called from signal handlers: takes no lock and allocates little."""

    child: subprocess.Popen[bytes] | None = None
    received: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        self.received.append(number)
        if number in (signal.SIGINT, signal.SIGQUIT) and _is_foreground():
            return  # The terminal has sent it to the whole process group, the child included.
        if self.child is None:
            self.waiting.append(number)
        else:
            self.child.send_signal(number)

    def adopt(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        while self.waiting:
            child.send_signal(self.waiting.pop(0))


def run_command(command: Sequence[str], environ: Mapping[str, str]) -> tuple[Outcome, str | None]:
    """Run a command until it ends. Blocks; main thread only.

    Args:
        command: The program and its arguments.
        environ: The child's whole environment.

    Returns:
        How it ended, and why it could not be started, if it could not (exit code 127 or 126, as in a shell).
    """
    relay = _Relay()
    with _handlers(relay):
        try:
            child = subprocess.Popen(list(command), env=dict(environ))
        except OSError as exc:
            exit_code, reason = _why_not_started(command[0], exc)
            return launcher_failed(reason, exit_code), reason
        relay.adopt(child)
        exit_code = child.wait()
        return command_ended(exit_code, relay.received, environ), None


def die_of(number: int) -> NoReturn:
    """End this process by a signal, so that our parent sees what it would have seen without us."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # The child has left the core that matters.
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # Reached where the signal's default is to do nothing, and as PID 1.


def _why_not_started(program: str, exc: OSError) -> tuple[int, str]:
    if isinstance(exc, FileNotFoundError):
        return 127, f"{program}: command not found"
    if isinstance(exc, PermissionError):
        return 126, f"{program}: not executable"
    return 126, f"{program}: cannot be started: {exc.strerror or exc}"


@contextmanager
def _handlers(relay: _Relay) -> Iterator[None]:
    """Relay signals; those that are ignored (nohup ignores SIGHUP) stay ignored, and the child inherits that."""
    before = {number: signal.getsignal(number) for number in FORWARDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, relay.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _is_foreground() -> bool:
    """Return whether our process group is the one the terminal sends Ctrl-C to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
