"""The sampler's process is started, watched, killed and ended; its place is taken by a script. Time is an argument."""

import itertools
import json
import sys

import psutil
import pytest
from system.jobs import wait_until

import ddplog.agent.keeper as keeper_module
from ddplog.agent.keeper import MAX_STRIKES, Keeper

pytestmark = pytest.mark.system

SECOND = 1_000_000_000
SCRIPT = """
import json, os, signal, sys, time
folder, plan = sys.argv[1], json.loads(sys.argv[2])
with open(folder + "/plans", "a") as file:
    file.write(sys.argv[2] + "\\n")
if "deaf" in os.listdir(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "dumb" not in os.listdir(folder):
    os.write(1, b".")
os.close(os.open(folder + "/up", os.O_CREAT))
if "broken" not in os.listdir(folder):
    time.sleep(300)
"""


class Watched:
    def __init__(self, folder, sample_s=1.0):
        self.folder, self.num_abandoned, self.now = folder, 0, 1000 * SECOND
        (folder / "logs").mkdir()
        self.keeper = Keeper(folder, sample_s, self.abandon)

    def abandon(self):
        self.num_abandoned += 1

    def look(self, seconds=0.0, created=7):
        self.now += int(seconds * SECOND)
        self.keeper.look(created, self.now)
        return self.keeper.pid

    def start(self):
        """Let the first one come up, and speak."""
        self.look()
        pid = self.look(1.1)
        wait_until((self.folder / "up").exists)
        self.look()
        return pid

    def plans(self):
        return [json.loads(line) for line in (self.folder / "plans").read_text().splitlines()]

    def end(self):
        wait_until(lambda: self.keeper.end(self.now))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "command", lambda _, *words: [sys.executable, "-c", SCRIPT, *words])
    watched = Watched(tmp_path)
    yield watched
    watched.now += 100 * SECOND
    watched.end()
    wait_until(lambda: not watched.keeper._bury() and not watched.keeper._doomed)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_job_is_sampled_once_it_is_a_second_old_and_the_aggregator_knows_how(watched):
    assert watched.look(created=0) == 0
    assert watched.look(5, created=0) == 0
    assert watched.look() > 0
    wait_until((watched.folder / "up").exists)
    assert watched.plans() == [
        {"created_unix_ns": 7, "sample_s": 1.0, "with_gpus": True, "notice": "", "notice_level": "warning"}
    ]


def test_a_young_job_is_not_sampled_yet(watched):
    assert watched.look() == 0
    assert watched.look(0.9) == 0
    assert watched.look(0.2) > 0


def test_one_that_speaks_is_left_alone(watched):
    pid = watched.start()
    assert watched.look(2.9) == pid
    assert watched.keeper.num_strikes == 0


def test_one_that_is_killed_is_replaced(watched):
    pid = watched.start()
    watched.now += 100 * SECOND
    psutil.Process(pid).kill()
    wait_until(lambda: gone(pid))
    watched.look()
    assert watched.num_abandoned == 1
    assert watched.look() not in (0, pid), "it had been well"
    assert watched.keeper.num_strikes == 0


def test_one_that_cannot_start_is_tried_less_and_less_often(watched):
    (watched.folder / "broken").touch()
    starts = []
    watched.start()
    for _ in range(60):
        if watched.keeper.pid:
            wait_until(lambda: gone(watched.keeper.pid))
        if watched.look(1.0):
            starts.append(watched.now)
    gaps = [(b - a) / SECOND for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 29


def test_a_silent_one_is_killed_and_after_three_nobody_calls_a_driver(watched):
    (watched.folder / "dumb").touch()
    pids = [watched.start()]
    for _ in range(MAX_STRIKES):
        (watched.folder / "up").unlink()
        watched.look(3.1)
        wait_until(lambda: gone(pids[-1]))
        pids.append(watched.look(0.1))
        wait_until((watched.folder / "up").exists)
    plans = watched.plans()

    assert len(set(pids)) == 4
    assert watched.num_abandoned == 3
    assert [plan["with_gpus"] for plan in plans] == [True, True, True, False]
    assert [plan["notice_level"] for plan in plans if plan["notice"]] == ["warning", "warning", "error"]
    assert "(2 of 3)" in plans[2]["notice"]
    assert "GPUs are not sampled any more" in plans[3]["notice"]


def test_one_that_is_silent_without_a_driver_is_not_replaced_any_more(watched):
    (watched.folder / "dumb").touch()
    watched.start()
    for _ in range(MAX_STRIKES + 1):
        watched.look(3.1)
        watched.look(0.1)
    assert watched.keeper.pid == 0
    assert watched.look(100) == 0


def test_the_end_is_asked_for_and_waited_for_shortly(watched):
    pid = watched.start()
    assert not watched.keeper.end(watched.now)
    watched.end()
    assert gone(pid)
    assert (watched.keeper.pid, watched.num_abandoned) == (0, 1)
    assert watched.keeper.end(watched.now), "and there is none any more"


def test_one_that_does_not_end_is_killed_and_not_waited_for(watched):
    (watched.folder / "deaf").touch()
    pid = watched.start()
    assert not watched.keeper.end(watched.now)
    assert not watched.keeper.end(watched.now + SECOND // 2)
    assert watched.keeper.end(watched.now + 2 * SECOND)
    wait_until(lambda: gone(pid))


def test_ranks_that_come_back_are_sampled_again(watched):
    """torchrun has restarted the group."""
    pid = watched.start()
    watched.end()
    assert watched.look(10) == 0
    assert watched.look(1.1) not in (0, pid)


def test_no_sampler_where_the_setting_says_so(tmp_path):
    watched = Watched(tmp_path, sample_s=0.0)
    assert watched.look() == watched.look(10) == 0
    assert watched.keeper.end(watched.now)


def test_no_room_for_a_process_is_no_end_of_the_agent(watched, monkeypatch):
    monkeypatch.setattr(keeper_module, "command", lambda *_: ["/no/such/interpreter"])
    watched.look()
    assert watched.look(1.1) == 0
    assert watched.look(0.5) == 0, "and it is not tried again at once"


@pytest.mark.parametrize(("sample_s", "patience_s"), [(1, 3), (2, 4), (5, 10), (3600, 10)])
def test_patience_is_two_samples_within_bounds(tmp_path, sample_s, patience_s):
    assert Keeper(tmp_path, sample_s, lambda: None)._patience_ns == patience_s * SECOND
