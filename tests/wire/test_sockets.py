"""Real sockets on loopback: who gets in, who does not, and what a connection survives.

No test sleeps: each polls until what it waits for has happened, and pytest's time-out is the bound.
"""

import os
import socket
import time
from contextlib import contextmanager, suppress

import pytest
import zmq

from ddplog.errors import ConfigError, LocalProtocolError
from ddplog.wire import sockets
from ddplog.wire.codec import MAX_MESSAGE_BYTES
from ddplog.wire.keys import aggregator_keys, allow_list, node_keys
from ddplog.wire.sockets import (
    DealerEndpoint,
    Received,
    RouterEndpoint,
    check_library,
    self_attack,
    versions,
)

SECRET = bytes(range(32))
SERVER = aggregator_keys(SECRET)


def make_router(nodes=("a", "b"), port=0, **changes):
    return RouterEndpoint(host="127.0.0.1", port=port, keys=SERVER, nodes=allow_list(SECRET, nodes), **changes)


def make_dealer(node_id, router=None, *, secret=SECRET, server_key=SERVER.public, **changes):
    dealer = DealerEndpoint(keys=node_keys(secret, node_id), server_key=server_key, **changes)
    if router is not None:
        dealer.connect(router.endpoint)
    return dealer


@pytest.fixture
def router():
    with make_router() as router:
        yield router


def receive(router, count=1):
    received = []
    while len(received) < count:
        received += router.poll(100)
    return received


def push(dealer, router, data):
    """Send as soon as there is a connection; the router answers the handshake meanwhile."""
    received = []
    while not dealer.send(data):
        received += router.poll(10)
    return received


def join(dealer, router):
    while not dealer.link().is_up:
        assert router.poll(10) == []


def refuse(dealer, router, count=1):
    while dealer.link().num_refusals < count:
        assert router.poll(10) == []
        assert not dealer.send(b"evil")


# --- in and out -------------------------------------------------------------------------------------------------


def test_a_message_arrives_with_the_nodes_name_and_the_answer_comes_back(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        ((routing_id, node_id, data),) = receive(router)
        assert (node_id, data) == ("a", b"hello")
        assert router.send(routing_id, b"welcome")
        assert dealer.poll(60_000)
        assert dealer.recv_all() == [b"welcome"]
        assert dealer.recv_all() == []


def test_two_nodes_are_told_apart(router):
    with make_dealer("a", router) as one, make_dealer("b", router) as other:
        push(one, router, b"1")
        (from_one,) = receive(router)
        push(other, router, b"2")
        (from_other,) = receive(router)
        assert (from_one.node_id, from_other.node_id) == ("a", "b")
        router.send(from_other.routing_id, b"for b")
        assert other.poll(60_000)
        assert other.recv_all() == [b"for b"]
        assert not one.poll(0)


def test_poll_is_bounded_in_messages_and_bytes(router):
    with make_dealer("a", router) as dealer:
        join(dealer, router)
        for _ in range(100):
            assert dealer.send(bytes(1000))
        total = []
        while len(total) < 100:
            received = router.poll(100, max_messages=7)
            assert len(received) <= 7
            total += received
        for _ in range(100):
            assert dealer.send(bytes(1000))
        total = []
        while len(total) < 100:
            received = router.poll(100, max_bytes=5000)
            assert sum(len(item.data) for item in received) <= 5000 + 1000
            total += received
    assert router.num_received == 200


def test_poll_returns_after_its_time_when_nothing_happens(router):
    assert router.poll(0) == []
    assert router.poll(1) == []


def test_order_is_kept_within_a_connection(router):
    with make_dealer("a", router) as dealer:
        join(dealer, router)
        sent, received = 0, []
        while len(received) < 2000:
            while sent < 2000 and dealer.send(str(sent).encode()):
                sent += 1
            received += router.poll(10)
    assert [int(item.data) for item in received] == list(range(2000))


def test_a_message_of_several_parts_is_dropped_and_counted(router):
    with make_dealer("a", router) as dealer:
        join(dealer, router)
        dealer._socket.send_multipart([b"1", b"2", b"3"])
        push(dealer, router, b"whole")
        assert [item.data for item in receive(router)] == [b"whole"]
    assert router.num_malformed == 1


def test_a_dealer_drops_a_message_of_several_parts(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
        router._socket.send_multipart([item.routing_id, b"1", b"2"])
        router.send(item.routing_id, b"whole")
        received = []
        while not received:
            dealer.poll(100)
            received = dealer.recv_all()
        assert received == [b"whole"]
        assert dealer.num_malformed == 1


def test_send_to_a_peer_that_is_gone_says_so(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
    while router.send(item.routing_id, b"x"):
        router.poll(1)
    assert not router.send(b"never seen", b"x")


def test_send_to_a_peer_that_does_not_read_says_so_and_waits_for_nobody(router):
    """Reliability case 28: an answer that does not fit is dropped aloud (ROUTER_MANDATORY), never in silence."""
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
        count = 0
        while router.send(item.routing_id, bytes(100_000)):
            count += 1
        assert count < 10_000, "the queue must have an end"
        with make_dealer("b", router) as other:
            push(other, router, b"hello")
            assert receive(router)[0].node_id == "b", "the others are served meanwhile"


def test_send_without_a_connection_says_so():
    """Reliability case 28. IMMEDIATE: else a message would count as taken while nobody is there."""
    with make_dealer("a") as dealer:
        assert not dealer.send(b"x")
        with make_router() as router:
            endpoint = router.endpoint
        dealer.connect(endpoint)
        assert not dealer.send(b"x")
        assert dealer.recv_all() == []
        assert not dealer.poll(0)


def test_the_dealers_queue_has_an_end(router):
    with make_dealer("a", router, queue_messages=4) as dealer:
        join(dealer, router)
        count = 0
        while dealer.send(bytes(1 << 20)):
            count += 1
        assert count < 300, "a router that does not read must stop the sender"


def test_the_descriptor_wakes_an_event_loop(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
        assert dealer.recv_all() == []
        poller = zmq.Poller()
        poller.register(dealer.fd, zmq.POLLIN)
        router.send(item.routing_id, b"x")
        received = []
        while not received:
            assert poller.poll(60_000)
            received = dealer.recv_all()
        assert received == [b"x"]


# --- strangers --------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused(router):
    with make_dealer("stranger", router) as dealer:
        refuse(dealer, router)
        assert dealer.link().num_joins == 0
    assert router.num_refused == 1


def test_a_key_of_another_jobs_secret_is_refused(router):
    with make_dealer("a", router, secret=bytes(32)) as dealer:
        refuse(dealer, router)
    assert router.num_refused == 1


def test_a_client_of_another_aggregator_never_joins(router):
    """It encrypts to another key: the handshake fails on both sides, before ZAP is asked."""
    with make_dealer("a", router, server_key=aggregator_keys(bytes(32)).public) as dealer:
        refuse(dealer, router)
    assert router.num_refused == 0
    assert router.num_received == 0


def test_a_refused_node_joins_once_it_is_known():
    """libzmq gives up after one refusal; the allow-list may learn of a node after it first dialled."""
    nodes = allow_list(SECRET, ["a"])
    router = RouterEndpoint(host="127.0.0.1", port=0, keys=SERVER, nodes=nodes)
    with router, make_dealer("late", router, redial_s=0.2) as dealer:
        refuse(dealer, router, count=2)
        nodes.update(allow_list(SECRET, ["late"]))
        join(dealer, router)
        push(dealer, router, b"hello")
        assert receive(router)[0].node_id == "late"


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_a_plaintext_client_is_refused(router, mechanism):
    context = zmq.Context()
    try:
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        if mechanism == "PLAIN":
            stranger.plain_username, stranger.plain_password = b"a", b"a"
        monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        stranger.connect(router.endpoint)
        stranger.send(b"evil")
        while not monitor.poll(0):
            assert router.poll(10) == []
        assert sockets._events(monitor)[0] == zmq.EVENT_DISCONNECTED
        assert not stranger.poll(0)
    finally:
        context.destroy(linger=0)


def raw_dealer(context, node_id, routing_id):
    """A client with a valid key that does what ours never does: choose its own routing id."""
    keys = node_keys(SECRET, node_id)
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = keys.public, keys.secret, SERVER.public
    dealer.routing_id = routing_id
    return dealer


def wait_until_forgotten(router, routing_id):
    """send() also says False of a connection that is about to end, and libzmq ignores a peer whose id is still taken."""
    while True:
        try:
            router._socket.send_multipart([routing_id, b""], zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return
        router.poll(1)


def test_a_node_cannot_speak_for_another(router):
    """It takes the other's routing id once that has gone, and names the other in its message: the key decides."""
    context = zmq.Context()
    try:
        honest = raw_dealer(context, "a", b"chosen")
        honest.connect(router.endpoint)
        honest.send(b"I am a")
        (first,) = receive(router)
        assert first == Received(b"chosen", "a", b"I am a")
        honest.close()
        wait_until_forgotten(router, b"chosen")
        spoof = raw_dealer(context, "b", b"chosen")
        spoof.connect(router.endpoint)
        spoof.send(b"I am a")
        assert receive(router) == [Received(b"chosen", "b", b"I am a")]
    finally:
        context.destroy(linger=0)


def test_a_huge_message_is_never_received_and_ends_the_connection(router):
    with make_dealer("a", router) as dealer, make_dealer("b", router) as other:
        join(dealer, router)
        assert dealer.send(bytes(MAX_MESSAGE_BYTES + 1))
        while dealer.link().num_joins < 2:
            assert router.poll(10) == []
        push(dealer, router, b"small")
        assert [item.data for item in receive(router)] == [b"small"]
        push(other, router, bytes(MAX_MESSAGE_BYTES - 1024))
        assert len(receive(router)[0].data) == MAX_MESSAGE_BYTES - 1024


def test_a_huge_answer_is_never_received(router):
    """libzmq gives such a connection up for good; the dealer dials anew."""
    with make_dealer("a", router, redial_s=0.2) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
        router.send(item.routing_id, bytes(MAX_MESSAGE_BYTES + 1))
        while dealer.link().num_joins < 2:
            assert dealer.recv_all() == []
            router.poll(10)


def silent_clients(router, count):
    host, port = router.endpoint.removeprefix("tcp://").split(":")
    return [socket.create_connection((host, int(port))) for _ in range(count)]


def test_silent_connections_delay_nobody_and_are_closed(router, monkeypatch):
    """Slow-loris: a client that connects and says nothing loses its descriptor after HANDSHAKE_MS."""
    silent = silent_clients(router, 100)
    try:
        with make_dealer("a", router) as dealer:
            push(dealer, router, b"hello")
            assert receive(router)[0].data == b"hello"
        for client in silent:
            client.settimeout(60)
            while client.recv(64):  # the greeting, then the end
                pass
    finally:
        for client in silent:
            client.close()


def test_garbage_on_the_port_harms_nobody(router):
    clients = silent_clients(router, 4)
    try:
        for client, data in zip(
            clients, (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, bytes(4096), os.urandom(65536)), strict=True
        ):
            with suppress(BrokenPipeError, ConnectionResetError):  # hung up on us half way through
                client.sendall(data)
        with make_dealer("a", router) as dealer:
            push(dealer, router, b"hello")
            assert receive(router)[0].data == b"hello"
    finally:
        for client in clients:
            client.close()


def test_a_domain_or_mechanism_that_is_not_ours_is_refused(router):
    key = zmq.utils.z85.decode(node_keys(SECRET, "a").public)
    request = [b"1.0", b"1", b"ddplog", b"127.0.0.1", b"", b"CURVE", key]
    assert router._judge(request) == "a"
    for position, value in ((0, b"2.0"), (2, b""), (5, b"NULL"), (6, bytes(32))):
        changed = list(request)
        changed[position] = value
        assert router._judge(changed) is None
    assert router._judge(request[:6]) is None
    assert router._judge([*request, b""]) is None


# --- self-attack ------------------------------------------------------------------------------------------------


def test_the_self_attack_is_refused_three_times(router):
    start = time.monotonic()
    assert self_attack(router, timeout_s=60.0) == {"NULL", "PLAIN", "CURVE"}
    assert time.monotonic() - start < 30
    assert router.num_received == 0
    assert router.num_refused == 1


@contextmanager
def plain_router():
    """A ROUTER with neither CURVE nor ZAP."""
    context = zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as plain:
            plain.bind("tcp://127.0.0.1:*")
            yield plain
    finally:
        context.destroy(linger=0)


class Open(dict):
    """An allow-list that allows everybody: the mistake that the self-attack is there to find."""

    def get(self, key, default=None):
        return "anybody"


def test_the_self_attack_finds_an_open_allow_list():
    router = RouterEndpoint(host="127.0.0.1", port=0, keys=SERVER, nodes=Open())
    with router, pytest.raises(LocalProtocolError):
        self_attack(router, timeout_s=60.0)


def test_the_self_attack_finds_an_endpoint_without_security(router):
    with plain_router() as plain:
        router.endpoint = plain.last_endpoint.decode()
        with pytest.raises(LocalProtocolError):
            self_attack(router, timeout_s=60.0)


def test_the_self_attack_finds_a_message_that_was_taken(monkeypatch):
    """Whatever the handshake's events say."""
    monkeypatch.setattr(sockets, "_events", lambda monitor: [])
    router = RouterEndpoint(host="127.0.0.1", port=0, keys=SERVER, nodes=Open())
    with router, pytest.raises(LocalProtocolError):
        self_attack(router, timeout_s=60.0)


def test_the_self_attack_finds_an_endpoint_that_answers(router, monkeypatch):
    """Whatever the handshake's events say."""
    monkeypatch.setattr(sockets, "_events", lambda monitor: [])
    with plain_router() as plain:

        def answer(timeout_ms):
            if plain.poll(timeout_ms):
                routing_id, _ = plain.recv_multipart()
                plain.send_multipart([routing_id, b"welcome"])
            return []

        router.endpoint = plain.last_endpoint.decode()
        monkeypatch.setattr(router, "poll", answer)
        with pytest.raises(LocalProtocolError):
            self_attack(router, timeout_s=60.0)


def test_the_self_attack_ends_by_itself_where_nothing_is_heard(router, monkeypatch):
    monkeypatch.setattr(sockets, "_events", lambda monitor: [])
    assert self_attack(router, timeout_s=0.05) == frozenset()


def test_the_self_attack_keeps_what_known_nodes_send_meanwhile(router, monkeypatch):
    with make_dealer("a", router) as dealer:
        join(dealer, router)
        for index in range(3):
            assert dealer.send(str(index).encode())
        monkeypatch.setattr(sockets, "_events", lambda monitor: [])
        while len(router._held) < 3:
            self_attack(router, timeout_s=0.05)
        assert [item.data for item in router.poll(0, max_messages=2)] == [b"0", b"1"]
        assert [item.data for item in router.poll(0)] == [b"2"]
    assert router.num_received == 3


# --- life -------------------------------------------------------------------------------------------------------


def test_a_dealer_outlives_the_routers_restart():
    router = make_router()
    port = int(router.endpoint.rpartition(":")[2])
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"before")
        receive(router)
        router.close()
        while dealer.link().is_up:
            pass
        while dealer.send(b"lost"):  # libzmq looks once in a while whether the connection is still there
            pass
        with make_router(port=port) as router:
            push(dealer, router, b"after")
            assert [item.data for item in receive(router)] == [b"after"], "what was lost must not come out of order"
            assert dealer.link().num_joins == 2, "the join tells the agent to say Hello again"


def test_a_dealer_moves_to_another_endpoint():
    with make_router() as first, make_router() as second, make_dealer("a", first) as dealer:
        push(dealer, first, b"1")
        receive(first)
        dealer.connect(second.endpoint)
        dealer.connect(second.endpoint)
        while dealer.link().num_joins < 2:
            second.poll(10)
        push(dealer, second, b"2")
        assert [item.data for item in receive(second)] == [b"2"]
        assert first.poll(0) == []


def in_child(function):
    """Run `function` in a forked child; return whether it raised LocalProtocolError."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
        except LocalProtocolError:
            code = 42
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


@pytest.mark.system
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_cannot_use_its_parents_sockets(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        (item,) = receive(router)
        for use in (
            lambda: dealer.send(b"x"),
            dealer.recv_all,
            lambda: dealer.poll(0),
            lambda: dealer.fd,
            dealer.link,
            lambda: dealer.connect("tcp://127.0.0.1:1"),
            lambda: router.poll(0),
            lambda: router.send(item.routing_id, b"x"),
        ):
            assert in_child(use)
        for close in (dealer.close, router.close):
            assert not in_child(close)
        assert router.send(item.routing_id, b"still here")
        assert dealer.poll(60_000)


def test_close_may_be_repeated_and_drops_what_was_not_sent(router):
    dealer = make_dealer("a", router)
    join(dealer, router)
    for _ in range(20):
        dealer.send(bytes(1 << 20))
    dealer.close()
    dealer.close()
    router.close()
    router.close()
    assert "closed=True" in repr(dealer)
    assert "closed=True" in repr(router)


# --- settings ---------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named():
    with make_router() as router:
        port = int(router.endpoint.rpartition(":")[2])
        with pytest.raises(ConfigError) as caught:
            make_router(port=port)
    assert (caught.value.setting, caught.value.value) == ("port", port)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "0", "::", "0x0"])
def test_a_wildcard_is_refused_unless_asked_for(host):
    with pytest.raises(ConfigError) as caught:
        RouterEndpoint(host=host, port=0, keys=SERVER, nodes={})
    assert caught.value.setting == "host"


def test_a_wildcard_that_was_asked_for_is_guarded_as_well():
    nodes = allow_list(SECRET, ["a"])
    with RouterEndpoint(host="*", port=0, keys=SERVER, nodes=nodes, allow_wildcard=True) as router:
        assert self_attack(router, timeout_s=60.0) == {"NULL", "PLAIN", "CURVE"}


@pytest.mark.parametrize("host", ["", "no.such.host.invalid", "192.0.2.1", "not a host"])
def test_a_host_that_is_not_here_is_refused(host):
    with pytest.raises(ConfigError) as caught:
        RouterEndpoint(host=host, port=0, keys=SERVER, nodes={})
    assert caught.value.setting == "host"


def test_another_failure_to_listen_names_the_port(monkeypatch):
    class Denied:
        ipv6 = False

        def bind(self, endpoint):
            raise zmq.ZMQError(zmq.EACCES if hasattr(zmq, "EACCES") else 13)

    with pytest.raises(ConfigError) as caught:
        sockets._bind(Denied(), "127.0.0.1", "127.0.0.1", 80)
    assert (caught.value.setting, caught.value.value) == ("port", 80)


def test_a_name_of_this_host_works():
    router = RouterEndpoint(host="localhost", port=0, keys=SERVER, nodes=allow_list(SECRET, ["a"]))
    with router, make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        assert receive(router)[0].node_id == "a"


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this host has no IPv6")
def test_ipv6_works():
    with RouterEndpoint(host="::1", port=0, keys=SERVER, nodes=allow_list(SECRET, ["a"])) as router:
        assert router.endpoint.startswith("tcp://[::1]:")
        with make_dealer("a", router) as dealer:
            push(dealer, router, b"hello")
            assert receive(router)[0].node_id == "a"


@pytest.mark.parametrize(
    "endpoint",
    ["", "tcp://", "127.0.0.1:5", "ipc:///tmp/x", "tcp://h:0", "tcp://h:65536", "tcp://h:x", "inproc://a", "tcp://:1"],
)
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with make_dealer("a") as dealer, pytest.raises(ConfigError):
        dealer.connect(endpoint)


def test_the_library_is_checked(monkeypatch):
    check_library()
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 2))
    with pytest.raises(ConfigError):
        check_library()
    monkeypatch.undo()
    monkeypatch.setattr(zmq, "has", lambda name: False)
    with pytest.raises(ConfigError):
        check_library()
    assert versions()["curve"] == "no"


def test_versions_name_both_libraries():
    assert versions() == {"pyzmq": zmq.pyzmq_version(), "libzmq": zmq.zmq_version(), "curve": "yes"}


def test_the_repr_shows_the_state_and_no_secret(router):
    with make_dealer("a", router) as dealer:
        push(dealer, router, b"hello")
        receive(router)
        assert "is_up=True" in repr(dealer) or dealer.link().is_up
        shown = repr(router) + repr(dealer)
    assert "received=1" in shown
    assert "nodes=2" in shown
    assert SERVER.secret.decode() not in shown
    assert node_keys(SECRET, "a").secret.decode() not in shown
