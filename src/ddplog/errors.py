"""Owns the exceptions users may catch.

DdplogError
+-- ConfigError            the user can fix it: names the setting, the value, what is allowed
+-- UsageError             a call that cannot be recorded (raised under strict=True, else counted)
+-- RunNotFoundError       no such run, or not a run folder
+-- RemoteProtocolError    a peer broke the protocol: counted, the message dropped
+-- LocalProtocolError     we did: a bug in ddplog
+-- ControlUnavailableError  no aggregator answers on its control socket
+-- SinkError
    +-- RetryableSinkError     try again later (429, 5xx, connection refused)
    +-- PermanentSinkError     the same input will always fail
"""

from __future__ import annotations

from typing import Any


class DdplogError(Exception):
    """Base of every exception that ddplog raises on purpose."""


class ConfigError(DdplogError, ValueError):
    """A setting has a value that cannot work.

    Args:
        setting: The setting's name as the user wrote it.
        value: What it was.
        allowed: What it may be, or what to do.
    """

    def __init__(self, setting: str, value: Any, allowed: str) -> None:
        super().__init__(f"{setting}={value!r}: {allowed}")
        self.setting = setting
        self.value = value
        self.allowed = allowed


class UsageError(DdplogError, ValueError):
    """A logging call that cannot be recorded as it stands."""


class RunNotFoundError(DdplogError, FileNotFoundError):
    """There is no run at that path."""


class RemoteProtocolError(DdplogError):
    """The peer broke the protocol."""


class LocalProtocolError(DdplogError):
    """ddplog broke the protocol: a bug."""


class ControlUnavailableError(DdplogError):
    """No aggregator answers on the run's control socket, or not in time."""


class SinkError(DdplogError):
    """A tracker did not take a batch."""


class RetryableSinkError(SinkError):
    """The tracker may take the same batch later.

    Args:
        message: What the tracker answered.
        retry_after_s: The tracker's own wish, seconds, if it gave one.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PermanentSinkError(SinkError):
    """The tracker will never take this batch."""
