"""Which forwarder is started, when again, and when it is over; with real forwarder processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from emission_store import StoreMaker
from system.jobs import wait_until

from ddplog.aggregator.forwarders import Forwarders
from ddplog.store.emissions import EmissionReader
from ddplog.store.sink_states import read_sink_states
from ddplog.testing import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

SECOND = 1_000_000_000
ENVIRON = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.fixture
def run_dir(tmp_path):
    run_dir = tmp_path / "r1"
    StoreMaker(run_dir).add_points([("loss", step, 1.0) for step in range(3)])
    return run_dir


@pytest.fixture
def supervise(run_dir):
    """Make the forwarders of a run; whatever they started ends with the test."""
    made = []

    def make(*sinks):
        made.append(Forwarders(run_dir, sinks))
        return made[-1]

    yield make
    for child in psutil.Process().children():
        if any(str(run_dir) in word for word in child.cmdline()):
            child.kill()
            child.wait(10)
    for forwarders in made:
        for forwarder in forwarders._forwarders:
            if forwarder.process is not None:
                forwarder.process.wait(10)


def process_of(forwarders, index=0):
    return forwarders._forwarders[index].process


def state_of(run_dir, name="jsonl"):
    try:
        return json.loads((run_dir / "sinks" / name / "state.json").read_text())["state"]
    except FileNotFoundError:
        return None


def test_a_run_without_sinks_waits_for_none(supervise):
    forwarders = supervise()
    forwarders.supervise(SECOND)

    assert forwarders.have_ended


def test_a_forwarder_that_delivered_the_end_is_not_started_again(run_dir, supervise):
    StoreMaker.set_status(_maker(run_dir), "finished")
    forwarders = supervise("jsonl")
    assert not forwarders.have_ended
    forwarders.supervise(SECOND)
    process = process_of(forwarders)
    assert process.wait(30) == 0
    forwarders.supervise(2 * SECOND)
    forwarders.supervise(100 * SECOND)

    assert forwarders.have_ended
    assert process_of(forwarders) is None
    assert [(state.name, state.state, state.lag) for state in read_sink_states(run_dir)] == [("jsonl", "drained", 0)]
    assert len(read_jsonl(run_dir / "sinks" / "jsonl" / "r1.jsonl")) >= 3
    assert list((run_dir / "logs").iterdir()) == [run_dir / "logs" / "forward-jsonl.log"]


def _maker(run_dir):
    maker = StoreMaker.__new__(StoreMaker)
    maker.run_dir = run_dir
    return maker


def test_a_sink_that_cannot_work_is_started_once_and_holds_nobody_up(run_dir, supervise):
    """Its package is missing: the run must end all the same, and say so."""
    forwarders = supervise("no-such-sink")
    forwarders.supervise(SECOND)
    assert process_of(forwarders).wait(30) == 3
    forwarders.supervise(2 * SECOND)
    forwarders.supervise(100 * SECOND)

    assert forwarders.have_ended
    assert process_of(forwarders) is None
    assert state_of(run_dir, "no-such-sink") == "failed"


def test_a_forwarder_that_was_killed_comes_back_later_every_time(run_dir, supervise):
    """At once the first time, then after longer pauses: a tracker's SDK that crashes must not take a core."""
    forwarders = supervise("jsonl")
    now = SECOND
    forwarders.supervise(now)
    for pause_ns in (200_000_000, 1 * SECOND, 5 * SECOND):
        process = process_of(forwarders)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        forwarders.supervise(now + pause_ns - 1)
        assert process_of(forwarders) is None
        now += pause_ns
        forwarders.supervise(now)
        assert process_of(forwarders).pid != process.pid
    assert not forwarders.have_ended


def test_a_forwarder_that_delivers_between_its_deaths_comes_back_soon_every_time(run_dir, supervise):
    """Killed from outside, again and again: with the pauses of one that is broken, the sink would fall behind for good."""
    forwarders = supervise("jsonl")
    now = SECOND
    forwarders.supervise(now)
    for cursor in range(10, 16):
        process = process_of(forwarders)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        (run_dir / "sinks" / "jsonl").mkdir(parents=True, exist_ok=True)
        (run_dir / "sinks" / "jsonl" / "cursor.json").write_text(json.dumps({"cursor": cursor}))
        now += SECOND // 5
        forwarders.supervise(now)
        assert process_of(forwarders).pid != process.pid


HOLD = """
import sys
from pathlib import Path
from ddplog.forward.ledger import Ledger
held = Ledger(Path(sys.argv[1]))
assert held.try_lock()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_sink_that_an_earlier_aggregators_forwarder_has_is_left_to_it(run_dir, supervise):
    """It lives on: another one, every 0.2 s, would take half a core only to end again."""
    (run_dir / "sinks").mkdir()
    words = (sys.executable, "-c", HOLD, str(run_dir / "sinks" / "jsonl"))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRON) as holder:
        assert holder.stdout.readline() == b"held\n"
        forwarders = supervise("jsonl")
        for seconds in range(1, 100):
            forwarders.supervise(seconds * SECOND)
            assert process_of(forwarders) is None
        assert not forwarders.have_ended
    StoreMaker.set_status(_maker(run_dir), "finished")
    forwarders.supervise(100 * SECOND)
    assert process_of(forwarders).wait(30) == 0
    forwarders.supervise(101 * SECOND)

    assert forwarders.have_ended


def test_an_end_before_everything_was_delivered_is_none(run_dir, supervise):
    """An earlier aggregator's forwarder was the faster one after all: ours leaves with 0, and nothing is delivered."""
    forwarders = supervise("jsonl")
    forwarders.supervise(SECOND)
    wait_until(lambda: state_of(run_dir) == "running")
    process_of(forwarders).terminate()
    assert process_of(forwarders).wait(30) == 0
    forwarders.supervise(SECOND + 1)
    assert not forwarders.have_ended
    StoreMaker.set_status(_maker(run_dir), "finished")
    forwarders.supervise(2 * SECOND)
    assert process_of(forwarders).wait(30) == 0
    forwarders.supervise(3 * SECOND)

    assert forwarders.have_ended


def test_a_forwarder_that_delivered_an_end_after_which_the_run_went_on_is_started_again(run_dir, supervise):
    """A run id is taken up again while the forwarder of its first life is on its way out."""
    StoreMaker.set_status(_maker(run_dir), "finished")
    forwarders = supervise("jsonl")
    forwarders.supervise(SECOND, 3)
    assert process_of(forwarders).wait(30) == 0
    more = _maker(run_dir)
    more.next_id = 4
    more.add_points([("loss", step, 1.0) for step in range(3, 6)])
    last_id = EmissionReader(run_dir).last_id()
    forwarders.supervise(2 * SECOND, last_id)
    assert not forwarders.have_ended
    assert process_of(forwarders).wait(30) == 0
    forwarders.supervise(3 * SECOND, last_id)

    assert forwarders.have_ended
    assert len(read_jsonl(run_dir / "sinks" / "jsonl" / "r1.jsonl")) == 6


def test_each_sink_is_supervised_by_itself(run_dir, supervise):
    StoreMaker.set_status(_maker(run_dir), "finished")
    forwarders = supervise("jsonl", "no-such-sink", "jsonl://other")
    forwarders.supervise(SECOND)
    for index in range(3):
        process_of(forwarders, index).wait(30)
        assert not forwarders.have_ended
    forwarders.supervise(2 * SECOND)

    assert forwarders.have_ended
    assert len(list((run_dir / "logs").glob("forward-*.log"))) == 3


def test_forwarders_live_on_without_their_aggregator(run_dir, supervise):
    """What is behind is delivered after the run ended; the aggregator need not stay for that."""
    forwarders = supervise("jsonl")
    forwarders.supervise(SECOND)
    wait_until(lambda: state_of(run_dir) == "running")
    process = process_of(forwarders)
    forwarders.leave()

    assert psutil.Process(process.pid).is_running()
    process.returncode = None
    assert os.getsid(process.pid) == process.pid  # a session of its own: Ctrl-C goes past it
    StoreMaker.set_status(_maker(run_dir), "finished")
    assert process.wait(30) == 0
    assert state_of(run_dir) == "drained"
