"""The control plane over a real unix socket."""

import os
import socket
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ddplog.aggregator.control import (
    FINISH_STATUSES,
    INSPECT,
    MAX_SOCKET_PATH_BYTES,
    READ,
    ROLES,
    SERVICES,
    STOP,
    ControlClient,
    ControlServer,
    clamp_interval,
    connect,
)
from ddplog.errors import (
    ConfigError,
    ControlUnavailableError,
    LocalProtocolError,
    RemoteProtocolError,
    UsageError,
)
from ddplog.v1.control_pb2 import (
    FinishReply,
    FinishRequest,
    RankExit,
    RankStack,
    RankStatus,
    StacksReply,
    StacksRequest,
    StatusReply,
)


class Run:
    """What the aggregator gives the server: a snapshot and somewhere to put the end."""

    def __init__(self):
        self.snapshot = StatusReply(run_id="r1", status="running", world_size=2)
        self.requests = []
        self.num_snapshots = 0
        self.asked = threading.Semaphore(0)

    def status(self):
        self.num_snapshots += 1
        self.asked.release()
        return self.snapshot

    def finish(self, request):
        self.requests.append(request)
        if request.detail == "refuse":
            raise UsageError("refused")
        if request.detail == "break":
            raise KeyError("broken")
        self.snapshot = StatusReply(run_id="r1", status=request.status)
        return FinishReply(status=request.status)


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def server(run, folder):
    with ControlServer(folder / "c.sock", run.status, run.finish) as server:
        yield server


@pytest.fixture
def client(server):
    with connect(server.socket_path) as client:
        yield client


def channel_to(server):
    return grpc.insecure_channel(f"unix:{server.socket_path}")


def test_status_returns_the_snapshot(client, run):
    run.snapshot = StatusReply(run_id="r2", status="running", ranks=[RankStatus(rank=1, state="running")])
    assert client.status() == run.snapshot


def test_finish_hands_the_request_over_and_returns_the_answer(client, run):
    request = FinishRequest(status="failed", detail="rank 1", exits=[RankExit(rank=1, signal=9)])
    assert client.finish(request).status == "failed"
    assert run.requests == [request]


@pytest.mark.parametrize("status", ["", "running", "FINISHED", "unknown"])
def test_finish_refuses_a_status_that_is_no_end(client, run, status):
    with pytest.raises(LocalProtocolError):
        client.finish(FinishRequest(status=status))
    assert run.requests == []


@pytest.mark.parametrize("status", FINISH_STATUSES)
def test_finish_takes_every_end(client, status):
    assert client.finish(FinishRequest(status=status)).status == status


def test_what_the_aggregator_refuses_is_the_callers_fault(client):
    with pytest.raises(LocalProtocolError):
        client.finish(FinishRequest(status="failed", detail="refuse"))


def test_what_breaks_in_the_aggregator_is_the_other_sides_fault_and_harms_no_later_call(client):
    with pytest.raises(RemoteProtocolError):
        client.finish(FinishRequest(status="failed", detail="break"))
    assert client.status().run_id == "r1"


def test_finish_refuses_more_than_it_can_use(client, run):
    with pytest.raises(LocalProtocolError):
        client.finish(FinishRequest(status="failed", detail="x" * (1 << 17)))
    assert run.requests == []


def test_a_message_over_four_mib_is_refused(client, run):
    with pytest.raises((ControlUnavailableError, RemoteProtocolError)):
        client.finish(FinishRequest(status="failed", exits=[RankExit(message="x" * (5 << 20))]))
    assert run.requests == []


def test_stacks_hands_the_request_over_and_returns_the_answer(run, folder):
    reply = StacksReply(stacks=[RankStack(rank=3, text="Thread")])
    asked = []
    path = folder / "c.sock"
    with (
        ControlServer(path, run.status, run.finish, stacks=lambda r: asked.append(r) or reply),
        connect(path) as client,
    ):
        assert client.stacks(StacksRequest(ranks=[3], wait_s=1.0)) == reply
        for wait_s in (-1.0, 31.0):
            with pytest.raises(LocalProtocolError):
                client.stacks(StacksRequest(wait_s=wait_s))
    assert [list(request.ranks) for request in asked] == [[3]]


def test_stacks_are_collected_for_one_client_at_a_time(run, folder):
    """Each waits in a thread of the server, and a rank should not write its stacks for everybody at once."""
    inside, release = threading.Event(), threading.Event()

    def collect(request):
        inside.set()
        release.wait()
        return StacksReply()

    path = folder / "c.sock"
    with ControlServer(path, run.status, run.finish, stacks=collect), connect(path) as client:
        first = threading.Thread(target=client.stacks, args=(StacksRequest(wait_s=5.0),))
        first.start()
        inside.wait()
        with pytest.raises(ControlUnavailableError):
            client.stacks(StacksRequest(wait_s=5.0))
        assert client.status().run_id == "r1"
        release.set()
        first.join()
        assert client.stacks(StacksRequest(wait_s=5.0)) == StacksReply()


def test_a_server_without_stacks_says_so(client):
    with pytest.raises(RemoteProtocolError):
        client.stacks(StacksRequest())


def test_watch_sends_one_reply_at_once_and_ends_with_the_run(client, run):
    stream = client.watch(interval_s=60.0)
    assert next(stream).status == "running"
    stream.close()
    run.snapshot = StatusReply(status="finished")
    assert [reply.status for reply in client.watch(interval_s=60.0)] == ["finished"]


def test_watch_repeats_until_the_status_is_no_longer_running(client, run):
    replies = []
    for reply in client.watch(interval_s=0.0):
        replies.append(reply.status)
        if len(replies) == 2:
            run.snapshot = StatusReply(status="failed")
    assert replies[:2] == ["running", "running"]
    assert replies[-1] == "failed"


def test_stop_ends_a_watch_at_once_with_the_last_snapshot(client, server, run):
    stream = client.watch(interval_s=60.0)
    assert next(stream).num_points == 0
    run.snapshot = StatusReply(status="running", num_points=7)
    stopper = threading.Thread(target=server.stop, args=(30.0,))
    stopper.start()
    assert [reply.num_points for reply in stream] == [7]
    stopper.join()


def start_watch(client):
    """Return a stream that the server has accepted, once it has seen that earlier clients left."""
    while True:
        stream = client.watch(interval_s=60.0)
        try:
            assert next(stream).run_id == "r1"
        except ControlUnavailableError:
            continue
        return stream


def test_a_client_that_leaves_frees_its_place(server):
    """Twelve at a time; a thirteenth is refused, and none is held by the dead."""
    for _ in range(3):
        with connect(server.socket_path) as client:
            streams = [start_watch(client) for _ in range(12)]
            with pytest.raises(ControlUnavailableError):
                next(client.watch(interval_s=60.0))
            assert client.status().run_id == "r1", "watchers must not starve status"
            assert len(streams) == 12


@pytest.mark.parametrize(
    ("given", "used"),
    [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (0.5, 0.5), (1e9, 60.0), (float("inf"), 60.0)],
)
def test_an_interval_is_clamped(given, used):
    assert clamp_interval(given) == used


def test_health_serves_until_stop(client, server):
    assert client.health()
    server.stop(0.0)
    with pytest.raises(ControlUnavailableError):
        client.health(timeout_s=1.0)


def test_stop_removes_the_socket_and_may_be_repeated(server):
    server.stop(0.0)
    server.stop(0.0)
    assert not server.socket_path.exists()


def test_a_client_finds_a_restarted_aggregator(run, folder):
    path = folder / "c.sock"
    first = ControlServer(path, run.status, run.finish)
    with connect(path) as client:
        assert client.status().run_id == "r1"
        first.stop(0.0)
        with ControlServer(path, run.status, run.finish):
            while True:
                try:
                    assert client.status(timeout_s=5.0).run_id == "r1"
                    break
                except ControlUnavailableError:
                    continue


def test_a_socket_left_by_a_crash_is_replaced(run, folder):
    path = folder / "c.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.is_socket()
    with ControlServer(path, run.status, run.finish), connect(path) as client:
        assert client.health()


def test_a_path_with_odd_characters_works(run, tmp_path):
    folder = tmp_path / "a b%20#?é"
    with ControlServer(folder / "c", run.status, run.finish) as server, connect(server.socket_path) as client:
        assert client.status().run_id == "r1"
        assert (folder / "c").is_socket()


def test_a_folder_in_the_sockets_place_is_refused(run, folder):
    (folder / "c.sock").mkdir()
    with pytest.raises(ConfigError):
        ControlServer(folder / "c.sock", run.status, run.finish)


def test_a_path_too_long_is_refused_naming_what_to_set(run, tmp_path):
    path = tmp_path / ("x" * MAX_SOCKET_PATH_BYTES) / "c.sock"
    with pytest.raises(ConfigError) as caught:
        ControlServer(path, run.status, run.finish)
    assert caught.value.setting == "spool"
    assert not path.parent.exists()


def test_the_longest_path_works(run, tmp_path):
    folder = Path(os.path.relpath(tmp_path, "/"))  # a path of exactly 107 bytes
    room = MAX_SOCKET_PATH_BYTES - len(f"/{folder}/")
    if room < 1:
        pytest.skip("this host's temporary folder is too deep")
    path = tmp_path / ("s" * room)
    tmp_path.chmod(0o700)
    with ControlServer(path, run.status, run.finish), connect(path) as client:
        assert len(os.fsencode(path)) == MAX_SOCKET_PATH_BYTES
        assert client.health()


def test_a_folder_open_to_others_is_refused(run, folder):
    folder.chmod(0o750)
    with pytest.raises(ConfigError):
        ControlServer(folder / "c.sock", run.status, run.finish)


def test_a_folder_behind_a_link_is_refused(run, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError):
        ControlServer(tmp_path / "link" / "c.sock", run.status, run.finish)


def test_connect_refuses_what_is_no_socket(folder):
    with pytest.raises(ControlUnavailableError):
        connect(folder / "none.sock")
    (folder / "file").touch()
    with pytest.raises(ControlUnavailableError):
        connect(folder / "file")


def test_a_dead_aggregators_socket_is_unavailable(folder):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "c.sock"))
    with connect(folder / "c.sock") as client, pytest.raises(ControlUnavailableError):
        client.status(timeout_s=2.0)


def test_a_hanging_aggregator_is_unavailable_after_the_time_out(run, folder):
    release = threading.Event()

    def hang():
        release.wait()
        return run.snapshot

    with ControlServer(folder / "c.sock", hang, run.finish), connect(folder / "c.sock") as client:
        with pytest.raises(ControlUnavailableError):
            client.status(timeout_s=0.2)
        release.set()


def test_a_closed_client_says_so(server):
    client = ControlClient(server.socket_path)
    client.close()
    with pytest.raises(LocalProtocolError):
        client.status()


def registered_methods():
    return {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}


def test_the_role_table_lists_every_method_of_every_service():
    assert set(registered_methods()) <= set(ROLES), "a method without a role is denied to everybody"
    assert set(ROLES.values()) == {READ, INSPECT, STOP}


def test_every_registered_service_is_in_the_list(server):
    """What gRPC really serves, not what we say we serve."""
    generic = server._server._state.generic_handlers
    names = {getattr(handler, "service_name", lambda: "?")() for handler in generic}
    assert names | {"?"} == {service.full_name for service in SERVICES} | {"?"}
    for name in ("grpc.reflection.v1alpha.ServerReflection", "grpc.channelz.v1.Channelz"):
        assert name not in names


def call(channel, name, method):
    """Call any method with an empty request; return the status code."""
    if method is not None and method.server_streaming:
        stream = channel.unary_stream(name)(b"", timeout=5)
        try:
            next(iter(stream))
        except grpc.RpcError as exc:
            return exc.code()
        finally:
            stream.cancel()
        return grpc.StatusCode.OK
    try:
        channel.unary_unary(name)(b"", timeout=5)
    except grpc.RpcError as exc:
        return exc.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("granted", [(), (READ,), (INSPECT,), (STOP,), (READ, INSPECT, STOP)])
def test_every_method_is_denied_unless_its_role_is_granted(run, folder, granted):
    server = ControlServer(folder / "c.sock", run.status, run.finish, roles=granted)
    with server, channel_to(server) as channel:
        for name, method in registered_methods().items():
            denied = call(channel, name, method) is grpc.StatusCode.PERMISSION_DENIED
            assert denied == (ROLES[name] not in granted), name


@pytest.mark.parametrize(
    "name",
    [
        "/ddplog.v1.Control/status",
        "/ddplog.v1.Control/Stop",
        "/grpc.health.v1.Health/",
        "/x/y",
        "/ddplog.v1.Control/Status/",
    ],
)
def test_a_method_nobody_knows_is_denied(server, name):
    with channel_to(server) as channel:
        assert call(channel, name, None) is grpc.StatusCode.PERMISSION_DENIED


def test_bytes_that_are_no_request_harm_nobody(server, client):
    with channel_to(server) as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/ddplog.v1.Control/Finish")(b"\xff" * 64, timeout=5)
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    assert client.status().run_id == "r1"


def test_the_repr_shows_the_state(server, client):
    assert "watches=0" in repr(server)
    stream = client.watch(60.0)
    next(stream)
    assert "watches=1" in repr(server)
    stream.close()
    assert str(server.socket_path) in repr(client)
