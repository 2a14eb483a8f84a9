"""Owns the data plane's sockets: the aggregator's ROUTER, a node's DEALER, and who may connect.

Every connection is CURVE (ZMTP 3.1, RFC 25 and 26), loopback included. The aggregator's ROUTER asks ZAP (RFC 27)
about each handshake; the answer comes from an allow-list of public keys and is given in the same thread, from the
same poll as the messages, so that no second thread touches a socket. ZAP's User-Id is the node id, and libzmq
attaches it to every message of that connection: a node cannot speak for another.

One message is one part. A peer that sends more loses that message.

Guarantees: nothing from a peer without an allowed key reaches the caller; send and receive never block; a peer that
connects and says nothing holds a descriptor for HANDSHAKE_MS and delays nobody; order within one connection.
Does not guarantee: delivery. A message handed to send() is lost when the connection is; the journal is the truth
and the acknowledgement is the proof. A peer with a valid key can make libzmq buffer one message of endless parts.

Endpoints belong to one thread. Each has a zmq.Context of its own, and is of no use in a forked child.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from ddplog.errors import ConfigError, LocalProtocolError
from ddplog.wire.codec import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from ddplog.wire.keys import KeyPair

MIN_LIBZMQ: Final = (4, 3, 3)
"""Below it: CVE-2019-13132 (overflow in CURVE before authentication) and CVE-2020-15166 (denial of service)."""
ZAP_DOMAIN: Final = b"ddplog"
HANDSHAKE_MS: Final = 3000
HEARTBEAT_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 5000
BACKLOG: Final = 1024
RECONNECT_MS: Final = 100
RECONNECT_MAX_MS: Final = 5000
CONNECT_TIMEOUT_MS: Final = 5000
"""A SYN that nobody answers is tried again after this, not after the kernel's two minutes."""
QUEUE_MESSAGES: Final = 256
"""High-water mark per connection and direction. libzmq counts messages: a node's byte window bounds the memory."""
MAX_MESSAGES: Final = 1024
MAX_POLL_BYTES: Final = 32 * 1024 * 1024

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_PER_POLL: Final = 256
_SELF_ATTACK_S: Final = 1.0


class Received(NamedTuple):
    """One message at the aggregator. A tuple: some are made 100,000 times a second."""

    routing_id: bytes
    node_id: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A DEALER's connection, as its monitor tells it."""

    is_up: bool
    num_joins: int
    """Handshakes that succeeded. One more than before: say Hello again, and send again what is not acknowledged."""
    num_refusals: int
    """Handshakes that failed: the aggregator does not know our key, is another job's, or is no aggregator."""


def check_library() -> None:
    """Check that libzmq can be trusted with a network.

    Raises:
        ConfigError: If it is older than MIN_LIBZMQ or was built without CURVE.
    """
    found = zmq.zmq_version_info()
    if found < MIN_LIBZMQ:
        raise ConfigError("libzmq", zmq.zmq_version(), f"must be {'.'.join(map(str, MIN_LIBZMQ))} or later")
    if not zmq.has("curve"):
        raise ConfigError("libzmq", zmq.zmq_version(), "was built without CURVE; install pyzmq's own wheel")


def versions() -> dict[str, str]:
    """Return what `ddplog doctor` prints about this layer."""
    curve = "yes" if zmq.has("curve") else "no"
    return {"pyzmq": zmq.pyzmq_version(), "libzmq": zmq.zmq_version(), "curve": curve}


@final
class RouterEndpoint:
    """The aggregator's ROUTER, bound and guarded.

    Args:
        host: Address to listen on: an IP address or a name of this host.
        port: 0: any free one.
        keys: The aggregator's.
        nodes: Public key (Z85) -> node id of every node that may connect. Read at each handshake, so it may grow.
        allow_wildcard: Let `host` be every interface of this host.

    Raises:
        ConfigError: If libzmq is unfit, or it cannot listen there.
    """

    def __init__(
        self, *, host: str, port: int, keys: KeyPair, nodes: Mapping[bytes, str], allow_wildcard: bool = False
    ) -> None:
        check_library()
        address = _resolve(host, allow_wildcard=allow_wildcard)
        self._pid = os.getpid()
        self._nodes = nodes
        self._held: deque[Received] = deque()
        self.server_key = keys.public
        self.num_received = 0
        self.num_malformed = 0
        self.num_refused = 0
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        try:
            self._zap = self._context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(_ZAP_ENDPOINT)  # before the ROUTER: with no handler there, libzmq would refuse everybody
            self._socket = self._context.socket(zmq.ROUTER)
            _set_common(self._socket, keys)
            self._socket.curve_server = True
            self._socket.zap_domain = ZAP_DOMAIN
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self._socket.router_mandatory = True
            self._socket.backlog = BACKLOG
            self.endpoint = _bind(self._socket, address, host, port)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._poller.register(self._zap, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)

    def __repr__(self) -> str:
        return (
            f"RouterEndpoint({self.endpoint!r}, nodes={len(self._nodes)}, received={self.num_received}, "
            f"refused={self.num_refused}, malformed={self.num_malformed}, closed={self._context.closed})"
        )

    def __enter__(self) -> RouterEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def poll(
        self, timeout_ms: int, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_POLL_BYTES
    ) -> list[Received]:
        """Answer the handshakes that wait, then receive.

        Args:
            timeout_ms: How long to wait for the first thing to happen, milliseconds.
            max_messages: Receive no more than this many.
            max_bytes: Receive no more once they have this many bytes together; the last may exceed it.

        Returns:
            (routing_id, node_id, data) of each message, libzmq's fair turn among the connections; empty after a
            time-out, or when only a handshake was answered. `node_id` is proven by the key.
        """
        _check_pid(self._pid)
        ready = dict(self._poller.poll(0 if self._held else timeout_ms))
        if self._zap in ready:
            self._answer_handshakes()
        received: list[Received] = []
        num_bytes = 0
        while self._held and len(received) < max_messages and num_bytes < max_bytes:
            received.append(self._held.popleft())
            num_bytes += len(received[-1].data)
        if self._socket in ready:
            while len(received) < max_messages and num_bytes < max_bytes:
                try:
                    routing_id = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                item = self._receive(routing_id)
                if item is not None:
                    received.append(item)
                    num_bytes += len(item.data)
        self.num_received += len(received)
        return received

    def send(self, routing_id: bytes, data: bytes) -> bool:
        """Send to one connection without waiting.

        Returns:
            False if that peer has gone or its queue is full; the message is then dropped.
        """
        _check_pid(self._pid)
        try:
            self._socket.send_multipart((routing_id, data), zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            if exc.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def hold(self, items: list[Received]) -> None:
        """Put messages back; the next poll() returns them first."""
        self.num_received -= len(items)
        self._held.extend(items)

    def close(self) -> None:
        """Close the sockets, dropping what was not sent. Does nothing in a forked child."""
        if os.getpid() == self._pid:
            self._context.destroy(linger=0)

    def _receive(self, routing_id: bytes) -> Received | None:
        # A Frame, not bytes: only it carries the connection's metadata. 1.5 us a message, where recv_multipart
        # takes 2.5 (2 cores of a cloud VM). The routing id alone would not do: a peer may choose its own.
        frame: Any = self._socket.recv(zmq.NOBLOCK, copy=False)
        if frame.more:
            self.num_malformed += 1
            while self._socket.recv(zmq.NOBLOCK, copy=False).more:
                pass
            return None
        return Received(routing_id, frame.get("User-Id"), frame.bytes)

    def _answer_handshakes(self) -> None:
        """Answer ZAP requests: (version, request id, domain, address, identity, mechanism, credentials...)."""
        for _ in range(_ZAP_PER_POLL):
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            node_id = self._judge(request)
            self.num_refused += node_id is None
            code, text = (b"400", b"unknown key") if node_id is None else (b"200", b"OK")
            user_id = (node_id or "").encode()
            self._zap.send_multipart((b"1.0", request[1], code, text, user_id, b""), zmq.NOBLOCK)

    def _judge(self, request: list[bytes]) -> str | None:
        if len(request) != 7 or request[0] != b"1.0" or request[2] != ZAP_DOMAIN or request[5] != b"CURVE":
            return None
        return self._nodes.get(z85.encode(request[6]))


@final
class DealerEndpoint:
    """A node's DEALER, which connects by itself again and again.

    Args:
        keys: The node's.
        server_key: The aggregator's public key (Z85).
        queue_messages: How many messages wait for the connection at most; then send() says False.
        redial_s: After how long without a connection link() dials anew, seconds. libzmq reconnects by itself after
            a lost connection, but gives up for good after one refusal or a message that is too large.

    Raises:
        ConfigError: If libzmq is unfit.
    """

    def __init__(
        self, *, keys: KeyPair, server_key: bytes, queue_messages: int = QUEUE_MESSAGES, redial_s: float = 5.0
    ) -> None:
        check_library()
        self._pid = os.getpid()
        self.endpoint: str | None = None
        self.num_malformed = 0
        self._link = Link(is_up=False, num_joins=0, num_refusals=0)
        self._redial_s = redial_s
        self._redial_at = 0.0  # monotonic, seconds
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            _set_common(self._socket, keys)
            self._socket.curve_serverkey = server_key
            self._socket.sndhwm = queue_messages
            self._socket.immediate = True  # else a message for a peer that never comes would count as taken
            self._socket.reconnect_ivl = RECONNECT_MS
            self._socket.reconnect_ivl_max = RECONNECT_MAX_MS
            self._socket.connect_timeout = CONNECT_TIMEOUT_MS
            self._monitor = self._socket.get_monitor_socket(_LINK_EVENTS)
            self._monitor.linger = 0
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def __repr__(self) -> str:
        return f"DealerEndpoint({self.endpoint!r}, {self._link}, closed={self._context.closed})"

    def __enter__(self) -> DealerEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """A descriptor for an event loop. Edge-triggered: when it is readable, call recv_all() until it is empty,
        and call it once after every send() as well."""
        _check_pid(self._pid)
        return int(self._socket.fd)

    def connect(self, endpoint: str) -> None:
        """Connect, or move to another endpoint; what was queued for the former one is dropped.

        Returns at once: the connection is made, and made again, in the background.

        Raises:
            ConfigError: If it is not tcp://host:port.
        """
        _check_pid(self._pid)
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        if not endpoint.startswith("tcp://") or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise ConfigError("endpoint", endpoint, "must be tcp://host:port")
        if self.endpoint == endpoint:
            return
        self._disconnect()
        self._socket.ipv6 = host.startswith("[")
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as exc:
            raise ConfigError("endpoint", endpoint, f"must be tcp://host:port: {exc.strerror}") from exc
        self.endpoint = endpoint
        self._redial_at = time.monotonic() + self._redial_s

    def send(self, data: bytes) -> bool:
        """Queue a message without waiting.

        Returns:
            False if there is no connection or its queue is full: try again later. True is no promise, least of all
            in the millisecond after a connection was lost, before libzmq has told this thread.
        """
        _check_pid(self._pid)
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def poll(self, timeout_ms: int) -> bool:
        """Wait until a message can be received.

        Args:
            timeout_ms: How long at most, milliseconds.
        """
        _check_pid(self._pid)
        return bool(self._socket.poll(timeout_ms, zmq.POLLIN))

    def recv_all(self, max_messages: int = MAX_MESSAGES) -> list[bytes]:
        """Receive what is there, without waiting."""
        _check_pid(self._pid)
        received: list[bytes] = []
        for _ in range(max_messages):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 1:
                received.append(parts[0])
            else:
                self.num_malformed += 1
        return received

    def link(self) -> Link:
        """Return the state of the connection, up to date, and dial again if it is time to. Does not wait.

        To be called about once a second.
        """
        _check_pid(self._pid)
        up, joins, refusals = self._link.is_up, self._link.num_joins, self._link.num_refusals
        for event in _events(self._monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                up, joins = True, joins + 1
            elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                up = False
            else:
                refusals += 1
        if up:
            self._redial_at = time.monotonic() + self._redial_s
        elif self.endpoint is not None and time.monotonic() >= self._redial_at:
            endpoint = self.endpoint
            self._disconnect()
            self.connect(endpoint)
        self._link = Link(is_up=up, num_joins=joins, num_refusals=refusals)
        return self._link

    def _disconnect(self) -> None:
        if self.endpoint is not None:
            with suppress(zmq.ZMQError):  # ENOENT: libzmq has given this endpoint up
                self._socket.disconnect(self.endpoint)
        self.endpoint = None

    def close(self) -> None:
        """Close the socket, dropping what was not sent. Does nothing in a forked child."""
        if os.getpid() == self._pid and not self._context.closed:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)


def self_attack(router: RouterEndpoint, timeout_s: float = _SELF_ATTACK_S) -> frozenset[str]:
    """Dial our own endpoint as strangers would: without security, with a password, with an unknown key.

    Polls `router` meanwhile; what known nodes send is held for the next poll().

    Args:
        router: The endpoint under test, in this thread.
        timeout_s: How long to wait for the refusals, seconds.

    Returns:
        The strangers whose handshake was seen to fail, of NULL, PLAIN and CURVE. All three within milliseconds,
        unless the host is too slow; silence until the time-out is a refusal too.

    Raises:
        LocalProtocolError: If a handshake succeeded, a message was taken or an answer came: do not go on.
    """
    token = secrets.token_bytes(32)
    context = zmq.Context()
    refused: set[str] = set()
    kept: list[Received] = []
    try:
        attacks = {name: _attacker(context, name, router) for name in ("NULL", "PLAIN", "CURVE")}
        end = time.monotonic() + timeout_s
        while len(refused) < len(attacks) and time.monotonic() < end:
            for item in router.poll(10):
                if item.data == token:
                    raise LocalProtocolError(f"{router.endpoint} took a message from a stranger as {item.node_id!r}")
                kept.append(item)
            for name, (stranger, monitor) in attacks.items():
                if _attack(stranger, monitor, token):
                    refused.add(name)
    finally:
        router.hold(kept)
        context.destroy(linger=0)
    return frozenset(refused)


def _attacker(context: zmq.Context[Any], name: str, router: RouterEndpoint) -> tuple[Any, Any]:
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.ipv6 = "[" in router.endpoint
    if name == "PLAIN":
        stranger.plain_username = b"ddplog"
        stranger.plain_password = b"ddplog"
    elif name == "CURVE":
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.curve_serverkey = router.server_key
    monitor = stranger.get_monitor_socket(_LINK_EVENTS)
    stranger.connect(router.endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"))
    return stranger, monitor


def _attack(stranger: Any, monitor: Any, token: bytes) -> bool:
    """Push a message, look for an answer, and return whether the handshake is known to have failed."""
    with suppress(zmq.Again):  # its queue is full, which is no answer
        stranger.send(token, zmq.NOBLOCK)
    if stranger.poll(0, zmq.POLLIN):
        raise LocalProtocolError("a stranger got an answer")
    events = _events(monitor)
    if zmq.EVENT_HANDSHAKE_SUCCEEDED in events:
        raise LocalProtocolError("a stranger's handshake succeeded")
    return any(event != zmq.EVENT_CLOSED for event in events)  # CLOSED: no connection, so nothing was tried


_LINK_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


def _events(monitor: Any) -> list[int]:
    events = []
    while monitor.poll(0, zmq.POLLIN):
        events.append(int(recv_monitor_message(monitor, zmq.NOBLOCK)["event"]))
    return events


def _set_common(sock: Any, keys: KeyPair) -> None:
    sock.linger = 0
    sock.curve_publickey = keys.public
    sock.curve_secretkey = keys.secret
    sock.maxmsgsize = MAX_MESSAGE_BYTES
    sock.sndhwm = QUEUE_MESSAGES
    sock.rcvhwm = QUEUE_MESSAGES
    sock.handshake_ivl = HANDSHAKE_MS
    sock.tcp_keepalive = 1
    sock.heartbeat_ivl = HEARTBEAT_MS
    sock.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    sock.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS


def _resolve(host: str, *, allow_wildcard: bool) -> str:
    """Return the address to bind: libzmq takes numbers and interface names only, and "0" is a wildcard too."""
    try:
        found = socket.getaddrinfo("0.0.0.0" if host == "*" else host or "*", None)  # noqa: S104 - refused below
        address = str(min(found)[4][0])  # IPv4 where there are both: min() by family
        is_wildcard = ipaddress.ip_address(address.partition("%")[0]).is_unspecified
    except OSError as exc:
        raise ConfigError("host", host, f"must be an address or a name of this host: {exc.strerror}") from exc
    if is_wildcard and not allow_wildcard:
        raise ConfigError("host", host, "would listen on every interface; name the one that the nodes reach")
    return f"[{address}]" if ":" in address else address


def _bind(sock: Any, address: str, host: str, port: int) -> str:
    sock.ipv6 = address.startswith("[")
    try:
        sock.bind(f"tcp://{address}:{port or '*'}")
    except zmq.ZMQError as exc:
        if exc.errno == zmq.EADDRINUSE:
            raise ConfigError("port", port, f"is in use on {host}; take another, or 0 for any free one") from exc
        if exc.errno in (zmq.EADDRNOTAVAIL, errno.ENODEV):
            raise ConfigError("host", host, "is no address of this host") from exc
        raise ConfigError("port", port, f"cannot listen there on {host}: {exc.strerror}") from exc
    return bytes(sock.last_endpoint).rstrip(b"\0").decode()


def _check_pid(pid: int) -> None:
    if os.getpid() != pid:
        raise LocalProtocolError(f"a socket of process {pid} used in {os.getpid()}, its forked child")
