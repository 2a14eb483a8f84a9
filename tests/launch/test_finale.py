"""The end work of a job: what is reported, printed and written, and that nothing escapes it."""

import dataclasses
import io
import signal

import pytest
from launch.end_fakes import FakeAggregator, FakePatience, make_job, write_sink
from rich.console import Console

from ddplog.config import Settings
from ddplog.errors import RemoteProtocolError
from ddplog.launch import finale
from ddplog.launch.drain import Drain
from ddplog.launch.finale import Finale, Progress
from ddplog.launch.outcome import FINISHED, RankFailure, launcher_signalled, ranks_failed
from ddplog.store.sink_states import SinkState

JOB = "0123456789abcdef"
FAILED = ranks_failed([RankFailure(rank=2, pid=12, exit_code=7)])


class Stage:
    """A job that has ended, and what its end work prints."""

    def __init__(self, tmp_path):
        self.spool, self.runs = tmp_path / "spool", tmp_path / "runs"
        self.spool.mkdir(mode=0o700)
        self.patience = FakePatience()
        self.settings = Settings(spool=str(self.spool))
        self.fake = None

    def declare(self, sinks=(), run_id="r1", **more):
        folder = make_job(self.spool, self.runs, JOB, run_id, sinks, **more)
        self.fake = FakeAggregator(self.runs / run_id, sinks)
        return folder

    def end(self, outcome=FINISHED, **options):
        text = io.StringIO()
        console = Console(file=text, width=10_000)
        connect = self.fake.connect if self.fake else None
        options = {"has_summary": False, **options}
        Finale(
            self.settings,
            outcome,
            console=console,
            patience=self.patience,
            connect=connect,
            revive=lambda folder: None,
            **options,
        ).end_job(JOB)
        return text.getvalue()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Stage(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_job_that_never_called_init_gets_one_line(stage):
    assert stage.end() == "ddplog: the job never called ddplog.init(): there is no run to show\n"
    assert stage.end(is_quiet=True) == ""


def test_logging_that_is_off_gets_no_line(stage):
    stage.settings = dataclasses.replace(stage.settings, mode="off")
    assert stage.end() == ""


def test_the_aggregator_is_told_how_the_job_ended(stage):
    stage.declare()
    assert stage.end(FAILED) == ""
    assert [(r.status, r.detail, len(r.exits)) for r in stage.fake.requests] == [("failed", "rank 2: exit code 7", 1)]
    assert stage.fake.num_open == 0


def test_the_node_without_rank_zero_has_nothing_to_end(stage):
    stage.declare(has_rank_zero=False)
    assert "rank 0 is not on this node" in stage.end()
    assert stage.fake.requests == []


def test_sinks_that_are_behind_are_named_with_the_command_that_delivers_the_rest(stage):
    stage.declare(sinks=("jsonl",))
    text = stage.end()
    assert "jsonl running, 3 behind" in text
    assert f"ddplog sync {stage.runs / 'r1'}" in text
    assert stage.patience.clock_s >= stage.settings.drain_wait_s


def test_after_sigterm_the_wait_is_short(stage):
    """SLURM and Kubernetes send SIGKILL 30 s after it."""
    stage.declare(sinks=("jsonl",))
    stage.end(launcher_signalled(signal.SIGTERM, {}, dies=False))
    assert finale.HURRIED_WAIT_S <= stage.patience.clock_s < finale.HURRIED_WAIT_S + 1


def test_a_wait_without_a_terminal_prints_a_line_each_ten_seconds(stage):
    stage.declare(sinks=("jsonl",))
    stage.patience.at(25.0, stage.fake.drain)
    lines = stage.end().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ddplog: waiting for jsonl 3 behind (10 s")


def test_quiet_prints_problems_only(stage):
    stage.declare(sinks=("jsonl",))
    lines = stage.end(is_quiet=True).splitlines()
    assert len(lines) == 1
    assert "not up to date" in lines[0]


def test_a_terminal_gets_a_live_line():
    text = io.StringIO()
    progress = Progress(Console(file=text, force_terminal=True, width=200), is_quiet=False)
    progress.show(Drain(is_stored=True, sinks=(SinkState(name="jsonl", state="running", lag=2),)), 1.0)
    progress.close()
    assert "waiting for jsonl 2 behind (1 s" in text.getvalue()


def test_records_that_are_not_stored_are_said(stage):
    stage.declare()
    stage.fake.is_drained = False
    assert "not every record is stored yet" in stage.end()


def test_an_aggregator_that_never_answers_is_said_and_nothing_breaks(stage):
    folder = stage.declare()
    stage.fake.is_up = False
    text = stage.end(FAILED)
    assert "failed (rank 2: exit code 7)" in text
    assert str(folder) in text


def test_a_run_that_ended_before_is_not_told_and_not_waited_for(stage, monkeypatch):
    stage.declare(sinks=("jsonl",))
    stage.fake.leave()
    write_sink(stage.runs / "r1", "jsonl", "drained")
    monkeypatch.setattr(finale, "_is_ended", lambda run_dir: True)
    assert stage.end() == ""
    assert stage.patience.clock_s == 0


def test_every_run_of_a_job_is_ended(stage):
    stage.declare(run_id="r1")
    first = stage.fake
    stage.declare(run_id="r2")
    second = stage.fake
    text = io.StringIO()
    both = {first.run_dir: first, second.run_dir: second}
    answers = iter(both.values())
    Finale(
        stage.settings,
        FINISHED,
        has_summary=False,
        console=Console(file=text),
        patience=stage.patience,
        connect=lambda path: next(answers).connect(path),
    ).end_job(JOB)
    assert [len(fake.requests) for fake in both.values()] == [1, 1]


@pytest.mark.parametrize("exc", [RemoteProtocolError("odd"), RuntimeError("bug"), KeyboardInterrupt()])
def test_no_exception_escapes(stage, exc):
    """The job's exit code is the job's."""
    stage.declare()

    def connect(path):
        raise exc

    stage.fake.connect = connect
    assert "ddplog: " in stage.end()


def test_a_broken_terminal_does_not_escape(stage, monkeypatch):
    """After SIGHUP every write to the terminal fails."""
    end = Finale(stage.settings, FINISHED, console=Console(file=io.StringIO()), patience=stage.patience)
    monkeypatch.setattr(end._console, "print", lambda *a, **k: (_ for _ in ()).throw(OSError(5, "EIO")))
    end.end_job(JOB)


def test_a_summary_that_fails_does_not_cost_the_report(stage, monkeypatch):
    stage.declare()
    (stage.runs / "r1" / "run.db").touch()
    done = []

    def broken(self, info):
        raise RuntimeError("no table")

    monkeypatch.setattr(Finale, "_print_summary", broken)
    monkeypatch.setattr(Finale, "_write_report", lambda self, info: done.append(info.run_id))
    assert "the summary failed: RuntimeError: no table" in stage.end(has_summary=True)
    assert done == ["r1"]


def test_ctrl_c_during_the_end_work_means_do_not_wait(stage):
    stage.declare(sinks=("jsonl",))
    stage.patience.at(2.0, lambda: signal.raise_signal(signal.SIGINT))
    assert "not up to date" in stage.end()
    assert stage.patience.clock_s < 3
