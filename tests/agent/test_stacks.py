"""The agent asks a real process where it is, one whose main thread never looks at a signal, and never asks the wrong one."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from agent.test_shipper import Journal, Node, node  # noqa: F401 - a fixture
from system.jobs import SOURCE, wait_until

from ddplog.agent import stacks as of_agent
from ddplog.agent.stacks import PATIENCE_NS, QUIET_NS, Stacks
from ddplog.core.stacks import MAX_TEXT, parse, place
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

SIGNAL = 50

RANK = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from ddplog.journal.writer import JournalWriter
from ddplog.worker import stacks

how, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
identity = {"rank": 0, "world_size": 1, "local_rank": 0, "node_rank": 0, "pid": os.getpid(), "host": "h", "boot_id": "b",
            "started_unix_ns": 1}
options = {"segment_bytes": 65536, "spool_bytes": 1 << 30, "check": lambda: None}
if how == "users":
    signal.signal(number, lambda *_: print("mine", flush=True))
if how == "ignored":
    signal.signal(number, signal.SIG_IGN)
if how == "c handler":
    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)
    libc.signal(number, handler)
writer = JournalWriter(folder, bytes(16), identity, **options)
print(stacks.arm(folder, number), len(os.listdir("/proc/self/task")), flush=True)

def in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def in_c():
    read, _ = os.pipe()
    ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1)  # without the GIL, and never back in Python

def in_c_with_the_gil():
    read, _ = os.pipe()
    ctypes.PyDLL(None).read(read, ctypes.create_string_buffer(1), 1)

def asleep():
    time.sleep(3600)

def counting():
    left = 0.3
    print(time.sleep(left) or "slept", flush=True)
    sys.stdin.read()

if how == "threads":
    threading.Thread(target=asleep, daemon=True).start()
if how == "gone":
    signal.signal(number, signal.SIG_DFL)
if how != "counting":
    print("here", flush=True)
{"in_a_lock": in_a_lock, "in_c": in_c, "in_c_with_the_gil": in_c_with_the_gil, "counting": counting}.get(how, asleep)()
"""


class Rank:
    """A process that holds a journal."""

    def __init__(self, folder, how, number=SIGNAL):
        self.folder = folder / f"0.{how.replace(' ', '_')}"
        words = [sys.executable, "-c", RANK, how, str(self.folder), str(number)]
        self.process = subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        armed, self.num_threads = self.process.stdout.readline().split()
        self.is_armed = armed == "True"

    def wait_for_state(self, letter):
        wait_until(lambda: Path(f"/proc/{self.process.pid}/stat").read_text().split(") ")[1][0] == letter)

    def wait_until_it_waits(self):
        """Until its main thread sleeps in the kernel, where it will stay."""
        assert self.process.stdout.readline() == "here\n"
        self.wait_for_state("S")

    def says(self):
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        return self.process.stdout.readline().strip() if ready else ""

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path):
    ranks = []

    def start(how, number=SIGNAL):
        ranks.append(Rank(tmp_path, how, number))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.close()


def collect(rank, patience_s=30):
    """Ask, and look every few milliseconds as the agent does."""
    stacks = Stacks()
    stacks.ask(b"i" * 16, rank.folder, time.monotonic_ns())
    found = []
    wait_until(lambda: found.extend(stacks.answers(time.monotonic_ns())) or found, patience_s)
    ((incarnation, text, trouble),) = found
    assert incarnation == b"i" * 16
    assert stacks.num_waiting == 0
    return text, trouble


@pytest.mark.parametrize("how", ["asleep", "in_a_lock", "in_c", "in_c_with_the_gil"])
def test_a_rank_that_never_comes_back_to_python_says_where_it_is(start, how):
    """A collective that waits for ever holds the main thread in C: no handler written in Python would run."""
    rank = start(how)
    rank.wait_until_it_waits()
    for _ in range(2):  # and again: the file holds one answer at a time
        text, trouble = collect(rank)
        assert trouble == ""
        assert place(text).startswith(f"{how} (<string>:")
        assert len(parse(text)) == 1
    assert os.path.getsize(rank.folder / f"stacks.{SIGNAL}") == 0
    assert (rank.is_armed, rank.num_threads) == (True, "1")
    assert rank.process.poll() is None


def test_every_thread_is_there(start):
    rank = start("threads")
    rank.wait_until_it_waits()
    text, _ = collect(rank)
    assert len(parse(text)) == 2


def test_a_system_call_that_the_signal_meets_goes_on(start):
    rank = start("counting")
    for _ in range(5):
        assert collect(rank)[1] == ""
    wait_until(lambda: rank.says() == "slept")


@pytest.mark.parametrize("how", ["users", "ignored", "c handler"])
def test_a_signal_that_is_taken_stays_with_its_owner(start, how):
    """Whoever set it, from Python or from C."""
    rank = start(how)
    assert not rank.is_armed
    text, trouble = collect(rank)
    assert (text, trouble.startswith("it is not armed")) == ("", True)
    rank.wait_until_it_waits()
    assert rank.says() == ""
    os.kill(rank.process.pid, SIGNAL)
    if how == "users":
        wait_until(lambda: rank.says() == "mine")


def test_a_signal_that_would_end_the_rank_is_not_sent(start):
    """Somebody put the default back: a real-time signal then ends the process."""
    rank = start("gone")
    rank.wait_until_it_waits()
    text, trouble = collect(rank)
    assert (text, trouble) == ("", f"it does not catch signal {SIGNAL} any more")
    assert rank.process.poll() is None


def test_it_can_be_switched_off(start):
    rank = start("asleep", 0)
    assert not rank.is_armed
    assert collect(rank)[1].startswith("it is not armed: the setting stack_signal is 0")


def test_a_stopped_rank_is_named_as_such_and_its_late_answer_is_not_the_next(start):
    rank = start("asleep")
    rank.wait_until_it_waits()
    os.kill(rank.process.pid, signal.SIGSTOP)
    rank.wait_for_state("T")
    stacks, now = Stacks(), 0
    stacks.ask(b"i", rank.folder, now)
    assert list(stacks.answers(now)) == []
    assert list(stacks.answers(now + PATIENCE_NS - 1)) == []
    ((_, text, trouble),) = stacks.answers(now + PATIENCE_NS)
    assert (text, trouble) == ("", "no answer in 3 s: it is stopped")
    os.kill(rank.process.pid, signal.SIGCONT)
    path = rank.folder / f"stacks.{SIGNAL}"
    wait_until(lambda: path.stat().st_size)
    text, _ = collect(rank)
    assert len(parse(text)) == 1


def test_a_dead_rank_and_one_that_got_its_pid_are_not_asked(start, monkeypatch):
    """Reliability case 3: the lock is the identity, and the pidfd is opened before it is looked at again."""
    rank, other = start("asleep"), start("threads")
    rank.close()
    assert collect(rank) == ("", "it has ended")

    holders = iter([other.process.pid, 0])  # at the first look the pid is the rank's, then the lock is gone
    monkeypatch.setattr(of_agent, "_holder", lambda path: next(holders))
    assert collect(rank) == ("", "it has ended")
    holders = iter([other.process.pid, 1])
    assert collect(rank) == ("", "it has ended")
    holders = iter([2**22 + 1])  # above pid_max
    assert collect(rank) == ("", "it has ended")
    assert os.path.getsize(other.folder / f"stacks.{SIGNAL}") == 0


def test_a_text_is_whole_when_it_has_not_grown_for_a_while(tmp_path, monkeypatch):
    path = tmp_path / f"stacks.{SIGNAL}"
    path.touch()
    monkeypatch.setattr(of_agent, "_signal", lambda folder, now_ns: of_agent._Waiting(path, 1, now_ns))
    stacks = Stacks()
    stacks.ask(b"i", tmp_path, 0)
    stacks.ask(b"i", tmp_path, 0)
    assert stacks.num_waiting == 1, "the second joins the first"
    for now in (0, QUIET_NS, 2 * QUIET_NS):
        with path.open("a") as file:
            file.write(f'  File "x{now}"\n')
        assert list(stacks.answers(now)) == []
    assert list(stacks.answers(3 * QUIET_NS - 1)) == []
    ((_, text, trouble),) = stacks.answers(3 * QUIET_NS)
    assert (len(text.splitlines()), trouble) == (3, "")


def test_a_giant_text_is_cut_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / f"stacks.{SIGNAL}"
    path.write_bytes(b"x\xff\x1b" * MAX_TEXT + b"\nthe end\n")
    monkeypatch.setattr(of_agent, "_signal", lambda folder, now_ns: of_agent._Waiting(path, 1, now_ns))
    stacks = Stacks()
    stacks.ask(b"i", tmp_path, 0)
    list(stacks.answers(0))
    ((_, text, _),) = stacks.answers(QUIET_NS)
    assert text.endswith("the end\n")
    assert len(text) <= MAX_TEXT
    codec.encode_stack(b"i" * 16, text, "")
    assert path.stat().st_size == 0


def test_the_shipper_answers_a_request(node):  # noqa: F811 - the fixture
    journal = Journal(node.folder, 0)
    node.shipper.discover()
    node.shipper.receive(codec.encode_stack_request([journal.incarnation, b"unknown_________"]), 0)
    answers = {m.incarnation: m for m in node.drain() if isinstance(m, pb.Stack)}
    assert answers[journal.incarnation].trouble.startswith("it is not armed")
    assert answers[b"unknown_________"].trouble == "its node does not know it"


def test_two_runs_of_one_process_share_the_signal(tmp_path):
    """One signal, one file, two names: whichever run asks gets the answer."""
    code = """
import os, sys, time
from pathlib import Path
from ddplog.worker import stacks
for name in "ab":
    Path(sys.argv[1], name).mkdir()
    print(stacks.arm(Path(sys.argv[1], name), 50), end=" ")
pid = os.fork()
if not pid:
    Path(sys.argv[1], "c").mkdir()
    print(stacks.arm(Path(sys.argv[1], "c"), 50), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
os.kill(os.getpid(), 50)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True", "False"], "a forked child is not armed with its parent's file"
    with closing((tmp_path / "a" / "stacks.50").open()) as a, closing((tmp_path / "b" / "stacks.50").open()) as b:
        assert a.read() == b.read() != ""
