"""Reaching a run's aggregator at the end of a job, and waiting for delivery."""

import signal

import pytest
from launch.end_fakes import FakeAggregator, FakePatience, make_job, write_sink

from ddplog.journal.spool import read_job
from ddplog.launch.drain import (
    REACH_S,
    Aggregator,
    Drain,
    Patience,
    describe_behind,
    find_jobs,
    hosts_aggregator,
    make_request,
    wait_drained,
)
from ddplog.launch.outcome import FINISHED, RankFailure, ranks_failed
from ddplog.store.sink_states import SinkState, read_sink_states


@pytest.fixture
def patience():
    return FakePatience()


@pytest.fixture
def fake(tmp_path):
    return FakeAggregator(tmp_path / "runs" / "r1", sinks=("jsonl",))


@pytest.fixture
def ended():
    return []


@pytest.fixture
def revived():
    return []


@pytest.fixture
def aggregator(fake, patience, ended, revived):
    return Aggregator(
        fake.run_dir, lambda: bool(ended), patience, fake.connect, lambda: revived.append(patience.clock_s)
    )


def wait(aggregator, fake, patience, limit_s=60.0, show=lambda drain, waited_s: None):
    return wait_drained(aggregator, fake.run_dir, limit_s, patience, show)


def test_a_jobs_runs_are_found_oldest_first_and_no_other_jobs(tmp_path):
    second = make_job(tmp_path / "s", tmp_path, run_id="a2")
    first = make_job(tmp_path / "s", tmp_path, run_id="b1")
    make_job(tmp_path / "s", tmp_path, job="f" * 16)
    (tmp_path / "s" / "0123456789abcdef-half").mkdir()
    import os

    os.utime(first / "job.json", ns=(1, 1))
    assert find_jobs(tmp_path / "s", "0123456789abcdef") == [first, second]


def test_the_aggregator_is_on_the_node_of_rank_zero(tmp_path):
    assert hosts_aggregator(make_job(tmp_path / "s", tmp_path))
    other = make_job(tmp_path / "s", tmp_path, run_id="r2", has_rank_zero=False)
    assert not hosts_aggregator(other)
    (other / "aggregator.json").write_text("{}")
    assert hosts_aggregator(other)


def test_the_request_names_every_failed_rank():
    failures = [
        RankFailure(rank=2, pid=12, exit_code=-9, timestamp_s=1),
        RankFailure(rank=3, pid=13, exit_code=7, timestamp_s=2, message="ValueError: x"),
    ]
    request = make_request(ranks_failed(failures))
    assert (request.status, request.detail) == ("failed", "rank 2: signal 9 (SIGKILL)")
    killed, exited = request.exits
    assert (killed.rank, killed.pid, killed.signal, killed.HasField("exit_code")) == (2, 12, 9, False)
    assert (exited.exit_code, exited.message, exited.HasField("signal")) == (7, "ValueError: x", False)


def test_an_aggregator_that_is_up_answers_at_once(aggregator, fake, patience, revived):
    assert aggregator.ask(lambda client: client.finish(make_request(FINISHED))).status == "finished"
    assert (patience.clock_s, revived) == (0, [])
    aggregator.close()
    aggregator.close()
    assert fake.num_open == 0


def test_a_dead_aggregator_is_waited_for_until_the_agent_has_restarted_it(aggregator, fake, patience, revived):
    """And the agent, which the ranks would have replaced, is replaced by us: they are gone."""
    fake.is_up = False
    patience.at(3.0, lambda: setattr(fake, "is_up", True))
    assert aggregator.ask(lambda client: client.status()) is not None
    assert 3 <= patience.clock_s < 4
    assert revived[0] == 0


def test_a_connection_that_breaks_is_made_again(aggregator, fake, patience):
    aggregator.ask(lambda client: client.status())
    fake.is_up = False
    patience.at(0.5, lambda: setattr(fake, "is_up", True))
    assert aggregator.ask(lambda client: client.status()) is not None
    assert fake.num_open == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"socket": 3}', None])
def test_nobody_is_waited_for_longer_than_a_while(aggregator, fake, patience, text):
    if text is None:
        (fake.run_dir / "control.json").unlink()
    else:
        (fake.run_dir / "control.json").write_text(text)
    assert aggregator.ask(lambda client: client.status()) is None
    assert REACH_S <= patience.clock_s < REACH_S + 1


def test_an_aggregator_that_said_goodbye_is_not_waited_for(aggregator, fake, patience, ended, revived):
    fake.leave()
    ended.append(True)
    assert aggregator.ask(lambda client: client.status()) is None
    assert aggregator.is_gone
    assert (patience.clock_s, revived) == (0, [])


def test_a_run_that_ended_is_not_gone_while_its_aggregator_delivers(aggregator, ended):
    ended.append(True)
    assert not aggregator.is_gone


def test_waiting_ends_when_every_sink_is_drained(aggregator, fake, patience):
    patience.at(5.0, fake.drain)
    drain = wait(aggregator, fake, patience)
    assert (drain.is_over, drain.behind) == (True, ())
    assert 5 <= patience.clock_s < 6


def test_waiting_shows_how_far_it_is(aggregator, fake, patience):
    seen = []
    patience.at(1.0, fake.drain)
    wait(aggregator, fake, patience, show=lambda drain, waited_s: seen.append((drain.sinks[0].lag, waited_s)))
    assert seen[0] == (3, 0.0)
    assert len(seen) == 5


def test_records_are_waited_for_without_any_sink(tmp_path, patience):
    fake = FakeAggregator(tmp_path / "r")
    fake.is_drained = False
    patience.at(2.0, lambda: setattr(fake, "is_drained", True))
    aggregator = Aggregator(fake.run_dir, lambda: False, patience, fake.connect, lambda: None)
    assert wait(aggregator, fake, patience).is_stored
    assert patience.clock_s >= 2


def test_waiting_is_bounded(aggregator, fake, patience):
    drain = wait(aggregator, fake, patience, limit_s=7.0)
    assert not drain.is_over
    assert drain.behind[0] == SinkState(name="jsonl", state="running", lag=3)
    assert 7 <= patience.clock_s < 8


def test_ctrl_c_skips_the_wait(aggregator, fake, patience):
    patience.at(1.0, lambda: patience.cut(signal.SIGINT, None))
    assert not wait(aggregator, fake, patience).is_over
    assert patience.clock_s < 2


def test_a_failed_sink_is_not_waited_for(aggregator, fake, patience):
    fake.sinks[0].state, fake.sinks[0].detail = "failed", "401"
    drain = wait(aggregator, fake, patience)
    assert patience.clock_s == 0
    assert drain.behind[0].detail == "401"


def test_an_aggregator_that_ends_when_done_has_delivered(aggregator, fake, patience, ended):
    """It ends by itself once all is delivered, maybe between two looks: the sinks' files tell the rest."""
    ended.append(True)
    write_sink(fake.run_dir, "jsonl", "drained")
    patience.at(1.0, fake.leave)
    assert wait(aggregator, fake, patience) == Drain(is_stored=True, sinks=(SinkState(name="jsonl", state="drained"),))


@pytest.mark.parametrize("has_end", [True, False])
def test_what_an_aggregator_that_dies_and_does_not_return_has_done_is_in_the_files(
    aggregator, fake, patience, ended, has_end
):
    """The store gets the run's end after the last record."""
    ended.extend([True] * has_end)
    write_sink(fake.run_dir, "jsonl", "running", lag=2)
    patience.at(1.0, lambda: setattr(fake, "is_up", False))
    drain = wait(aggregator, fake, patience)
    assert drain.is_stored == has_end
    assert drain.behind[0].lag == 2


def test_a_sink_state_that_cannot_be_read_says_so(tmp_path):
    write_sink(tmp_path, "a", "running", lag=1)
    write_sink(tmp_path, "b", "drained")
    (tmp_path / "sinks" / "b" / "state.json").write_text("{")
    first, second = read_sink_states(tmp_path)
    assert (first.state, second.name, second.state) == ("running", "b", "unreadable")


def test_sinks_that_are_behind_are_described(tmp_path):
    info = read_job(make_job(tmp_path / "s", tmp_path, sinks=("jsonl", "comet://w/p", "mlflow")))
    sinks = (
        SinkState(name="jsonl", state="drained"),
        SinkState(name="comet", state="retrying", lag=1234, detail="503"),
    )
    assert describe_behind(info, Drain(is_stored=True, sinks=sinks)) == [
        "comet retrying, 1,234 behind (503)",
        "mlflow not started",
    ]


def test_the_second_signal_gives_up():
    patience = Patience()
    patience.cut(signal.SIGINT, None)
    assert repr(patience) == "Patience(is_cut=True)"
    patience.wait(60)
    with pytest.raises(KeyboardInterrupt):
        patience.cut(signal.SIGINT, None)
