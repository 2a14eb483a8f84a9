"""Decides how a writer's end reads: from what it said itself, and from the exit status that others learn of it.

The node's agent learns it from the kernel where that tells (agent/exit_status.py), `ddplog run` from its children. Either
may come before the writer's last records, after them, or never.
"""

from __future__ import annotations

from typing import Final

from ddplog.core.effects import ENDED, UNKNOWN_DEATH, Writer

_SIGNALS: Final = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL",
    10: "SIGUSR1", 11: "SIGSEGV", 12: "SIGUSR2", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM", 24: "SIGXCPU",
}  # fmt: skip
"""Linux's numbers, on every architecture that has Python wheels."""


def split_status(status: int) -> tuple[int | None, int | None]:
    """Return (exit code, signal) of a wait(2) status; one of them is None."""
    signal = status & 0x7F
    return (None, signal) if signal else (status >> 8 & 0xFF, None)


def describe_exit(exit_code: int | None, signal: int | None) -> str:
    """Return `exit code 7`, `signal 9 (SIGKILL)`, or that it is not known."""
    if signal:
        return f"signal {signal} ({_SIGNALS[signal]})" if signal in _SIGNALS else f"signal {signal}"
    return UNKNOWN_DEATH if exit_code is None else f"exit code {exit_code}" if exit_code else ""


def final_state(writer: Writer) -> str:
    """Return the state of a writer that has ended. An exit status outranks the word `finished`, which a rank says at its
    exit without knowing its code, and no other: that says more.
    """
    said = writer.finish_status if writer.finish_status in ENDED else ""
    if writer.exit_code == 0:
        return said or "finished"
    if said == "finished" and writer.signal:
        return "killed"
    if said == "finished" and writer.exit_code is not None:
        return "failed"
    return said or "died"
