"""The control plane: gRPC on a unix socket, its server in the aggregator and its client. The only owner of grpc.

Serves ddplog.v1.Control (proto/ddplog/v1/control.proto) and the standard health service, whose overall status is
SERVING until stop(). The socket lies in a 0700 folder of this user, checked at start: whoever can reach it is this
user, or root. Above that, each method has a role, a server grants roles, and a method without one is denied.
No reflection, no expression from the wire, no TCP.

The server never touches the aggregator's state: it calls two functions it was given, from its own threads.
Never imported by a training process: gRPC does not survive fork.
"""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn, final
from urllib.parse import quote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ddplog.errors import ConfigError, ControlUnavailableError, DdplogError, LocalProtocolError, RemoteProtocolError
from ddplog.journal.spool import make_private
from ddplog.v1 import control_pb2, control_pb2_grpc
from ddplog.v1.control_pb2 import (
    FinishReply,
    FinishRequest,
    StacksReply,
    StacksRequest,
    StatusReply,
    StatusRequest,
    WatchRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path holds 108 bytes, the terminating zero included. Source: unix(7)."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_RPCS: Final = 64
MAX_EXITS: Final = 1 << 16
MAX_DETAIL: Final = 64 * 1024
MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 60.0
FINISH_STATUSES: Final = ("finished", "failed", "killed", "preempted")

MAX_STACKS_WAIT_S: Final = 30.0
READ: Final = "read"
INSPECT: Final = "inspect"
"""To have the ranks say where they are, which sends them a signal."""
STOP: Final = "stop"
ROLES: Final[Mapping[str, str]] = {
    "/ddplog.v1.Control/Status": READ,
    "/ddplog.v1.Control/Watch": READ,
    "/ddplog.v1.Control/Finish": STOP,
    "/ddplog.v1.Control/Stacks": INSPECT,
    "/grpc.health.v1.Health/Check": READ,
    "/grpc.health.v1.Health/List": READ,
    "/grpc.health.v1.Health/Watch": READ,
}
"""Method -> the role it takes. A method that is not here is denied to everybody."""

SERVICES: Final = (
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
"""Descriptors of what the server serves."""

_MAX_WATCHES: Final = 12
_NUM_THREADS: Final = 16
"""A Watch holds a thread while it lasts, and Stacks one at most. Three are left for Status and Finish, which take
microseconds."""
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)


@final
class ControlServer:
    """Serves from the moment it is made until stop().

    Args:
        socket_path: Where; a socket that an earlier life left there is replaced. Its folder is made, 0700, if missing.
        status: Returns a snapshot that nobody changes afterwards. Called from any thread, several at a time.
        finish: Stores the launcher's word and returns once it is stored. Called from any thread; a DdplogError it
            raises is the client's fault and becomes INVALID_ARGUMENT.
        stacks: Collects stacks, and returns them after `wait_s` at the latest. Called from any thread.
        roles: What clients may do.

    Raises:
        ConfigError: If the path is too long, the folder is not ours alone, or gRPC cannot listen there.
    """

    def __init__(
        self,
        socket_path: Path,
        status: Callable[[], StatusReply],
        finish: Callable[[FinishRequest], FinishReply],
        *,
        stacks: Callable[[StacksRequest], StacksReply] | None = None,
        roles: Collection[str] = (READ, INSPECT, STOP),
    ) -> None:
        self.socket_path = socket_path
        target = _target(socket_path)
        make_private(socket_path.parent, "spool")
        self._servicer = _Servicer(status, finish, stacks)
        self._health = health.HealthServicer()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ddplog-control")
        self._server = grpc.server(
            self._threads,
            interceptors=(_Gate(frozenset(roles)),),
            options=(*_OPTIONS, ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=MAX_RPCS,
        )
        control_pb2_grpc.add_ControlServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self._server.add_insecure_port(target)
        except RuntimeError as exc:
            self._threads.shutdown(wait=False)
            raise ConfigError("spool", str(socket_path), f"gRPC cannot listen there: {exc}") from exc
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def __repr__(self) -> str:
        return f"ControlServer({str(self.socket_path)!r}, {self._servicer!r})"

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(0.0)

    def stop(self, grace_s: float) -> None:
        """Stop serving: watchers get the last snapshot and their streams end.

        Args:
            grace_s: How long calls in progress may take, seconds; then they are cancelled. Blocks no longer.
        """
        self._health.enter_graceful_shutdown()
        self._servicer.stop()
        self._server.stop(grace_s).wait()
        self._threads.shutdown(wait=False)
        self.socket_path.unlink(missing_ok=True)


class _Servicer(control_pb2_grpc.ControlServicer):
    def __init__(
        self,
        status: Callable[[], StatusReply],
        finish: Callable[[FinishRequest], FinishReply],
        stacks: Callable[[StacksRequest], StacksReply] | None,
    ) -> None:
        self._status = status
        self._finish = finish
        self._stacks = stacks
        self._lock = threading.Lock()
        self._watches: set[threading.Event] = set()
        self._is_collecting = threading.Lock()
        self._stopping = False

    def __repr__(self) -> str:
        return f"watches={len(self._watches)}, stopping={self._stopping}"

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            for ended in self._watches:
                ended.set()

    def Status(self, request: StatusRequest, context: Any) -> StatusReply:  # noqa: ARG002, N802 - gRPC's names
        return self._status()

    def Watch(self, request: WatchRequest, context: Any) -> Iterator[StatusReply]:  # noqa: N802
        interval_s = clamp_interval(request.interval_s)
        with self._watching(context) as ended:
            while context.is_active():
                is_last = self._stopping  # read before the snapshot, so that the last one is taken after stop()
                reply = self._status()
                yield reply
                if is_last or reply.status != "running":
                    return
                ended.wait(interval_s)

    def Finish(self, request: FinishRequest, context: Any) -> FinishReply:  # noqa: N802
        if request.status not in FINISH_STATUSES:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"status must be one of {', '.join(FINISH_STATUSES)}")
        if len(request.exits) > MAX_EXITS or len(request.detail) > MAX_DETAIL:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"{len(request.exits)} exits, or too long a detail")
        try:
            return self._finish(request)
        except DdplogError as exc:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(exc))

    def Stacks(self, request: StacksRequest, context: Any) -> StacksReply:  # noqa: N802
        if self._stacks is None:
            _abort(context, grpc.StatusCode.UNIMPLEMENTED, "no stacks here")
        if len(request.ranks) > MAX_EXITS or not 0 <= request.wait_s <= MAX_STACKS_WAIT_S:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"wait_s: 0 to {MAX_STACKS_WAIT_S:g}; or too many ranks")
        if not self._is_collecting.acquire(blocking=False):  # each waits in a thread that Status needs
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "stacks are being collected for somebody else")
        try:
            return self._stacks(request)
        finally:
            self._is_collecting.release()

    @contextmanager
    def _watching(self, context: Any) -> Iterator[threading.Event]:
        """Register a Watch: the event is set when the client leaves or the server stops."""
        ended = threading.Event()
        with self._lock:
            is_full = len(self._watches) >= _MAX_WATCHES
            if not is_full:
                self._watches.add(ended)
        if is_full:
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_WATCHES} clients are watching already")
        context.add_callback(ended.set)
        try:
            yield ended
        finally:
            with self._lock:
                self._watches.discard(ended)


class _Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Denies every method whose role is not granted, and every method without a role."""

    def __init__(self, granted: frozenset[str]) -> None:
        self._granted = granted

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        role = ROLES.get(details.method)
        if role is None or role not in self._granted:
            return grpc.unary_unary_rpc_method_handler(_deny)
        return continuation(details)


def _deny(request: bytes, context: Any) -> NoReturn:  # noqa: ARG001 - gRPC's signature
    _abort(context, grpc.StatusCode.PERMISSION_DENIED, "not a method that this socket allows")


def _abort(context: Any, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise AssertionError("abort() raises")


@final
class ControlClient:
    """Asks a run's aggregator. Any thread may use it. Every call raises:

    ControlUnavailableError: Nobody answers there, or not in time.
    RemoteProtocolError: The other side failed, or does not know the method.
    LocalProtocolError: What we asked for cannot be asked for.
    """

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        # A channel of its own, not the process-wide pool of subchannels: that one would remember an aggregator's
        # death for the next client. A restarted aggregator is found within half a second.
        options = (
            *_OPTIONS,
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        )
        self._channel = grpc.insecure_channel(_target(socket_path), options=options)
        self._control = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __repr__(self) -> str:
        return f"ControlClient({str(self.socket_path)!r})"

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self, timeout_s: float = 5.0) -> StatusReply:
        """Return what the run is doing now."""
        with _translated(self.socket_path):
            reply: StatusReply = self._control.Status(StatusRequest(), timeout=timeout_s)
            return reply

    def watch(self, interval_s: float = 1.0) -> Iterator[StatusReply]:
        """Yield what the run is doing, at once and then every `interval_s`, until it has ended.

        Also ends when the aggregator stops; the last reply's status then still says "running". Closing the
        iterator ends the call.
        """
        with _translated(self.socket_path):
            call = self._control.Watch(WatchRequest(interval_s=interval_s))
            try:
                yield from call
            finally:
                call.cancel()

    def finish(self, request: FinishRequest, timeout_s: float = 10.0) -> FinishReply:
        """Tell how the job ended; returns once that is stored."""
        with _translated(self.socket_path):
            reply: FinishReply = self._control.Finish(request, timeout=timeout_s)
            return reply

    def stacks(self, request: StacksRequest) -> StacksReply:
        """Collect the Python stacks of living ranks; takes `wait_s` at most, and as long as the slowest rank."""
        with _translated(self.socket_path):
            reply: StacksReply = self._control.Stacks(request, timeout=request.wait_s + 5.0)
            return reply

    def health(self, timeout_s: float = 5.0) -> bool:
        """Return whether the aggregator says it is serving."""
        with _translated(self.socket_path):
            reply = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        self._channel.close()


def connect(socket_path: Path) -> ControlClient:
    """Return a client of the aggregator at `socket_path`. Does not wait for it.

    Raises:
        ControlUnavailableError: If there is no socket of this user's.
    """
    try:
        info = os.lstat(socket_path)
    except OSError as exc:
        raise ControlUnavailableError(f"{socket_path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(info.st_mode) or os.geteuid() not in (info.st_uid, 0):
        raise ControlUnavailableError(f"{socket_path} is not a socket of this user's")
    return ControlClient(socket_path)


def clamp_interval(interval_s: float) -> float:
    """Return a Watch's interval within its limits, seconds; 0, what an old client sends, and NaN are the shortest."""
    return min(interval_s, MAX_INTERVAL_S) if interval_s >= MIN_INTERVAL_S else MIN_INTERVAL_S


def _target(socket_path: Path) -> str:
    path = os.fspath(socket_path.absolute())
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        allowed = (
            f"a unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, this one {size}; "
            "set spool (DDPLOG_SPOOL) to a shorter folder"
        )
        raise ConfigError("spool", path, allowed)
    return "unix:" + quote(os.fsencode(path))  # gRPC reads it as a URI


_UNAVAILABLE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
)
_OUR_FAULT: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)


@contextmanager
def _translated(socket_path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as exc:  # grpc: "Cannot invoke RPC on closed channel!"
        raise LocalProtocolError(f"{socket_path}: {exc}") from exc
    except grpc.RpcError as exc:
        code, text = exc.code(), f"{socket_path}: {exc.code().name}: {exc.details()}"
        if code in _UNAVAILABLE:
            raise ControlUnavailableError(text) from exc
        if code in _OUR_FAULT:
            raise LocalProtocolError(text) from exc
        raise RemoteProtocolError(text) from exc
