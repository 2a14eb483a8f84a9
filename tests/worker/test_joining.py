"""Which run a framework's hook logs to."""

import pytest

from ddplog.errors import ConfigError
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.worker import current, joining
from ddplog.worker.absent import AbsentRun, NullRun
from ddplog.worker.identity import Identity
from ddplog.worker.joining import is_open, join
from ddplog.worker.run import Run

JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    made = []

    def make(rank=0, world_size=1):
        journal = JournalWriter(
            tmp_path / f"{rank}.{len(made)}",
            b"i" * 16,
            {},
            segment_bytes=1 << 20,
            spool_bytes=1 << 30,
            check=lambda: None,
        )
        who = Identity(
            rank=rank, world_size=world_size, local_rank=rank, local_world_size=1, node_rank=0, launcher="env"
        )
        made.append(Run(journal, JOB, who, strict=False, exit_wait_s=0.0, max_keys=10))
        return made[-1]

    yield make
    for run in made:
        run._journal.close(finished=False)


@pytest.fixture
def started(monkeypatch):
    """What init() was called with; it starts nothing."""
    calls = []
    monkeypatch.setattr(joining, "init", lambda **settings: calls.append(settings) or "started")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_current_run_is_used_and_the_settings_for_a_new_one_are_not(make_run, started, monkeypatch):
    run = make_run()
    monkeypatch.setattr(current, "run", run)

    assert join({"project": "p"}) is run
    assert started == []


def test_a_run_that_is_off_stays_off(started, monkeypatch):
    run = NullRun()
    monkeypatch.setattr(current, "run", run)

    assert join({}) is run


@pytest.mark.parametrize("ended", ["none", "absent", "finished"])
def test_where_no_run_takes_values_one_is_started(ended, make_run, started, monkeypatch):
    run = {"none": None, "absent": AbsentRun(), "finished": make_run()}[ended]
    if ended == "finished":
        run.finish()
    monkeypatch.setattr(current, "run", run)

    assert join({"project": "p"}) == "started"
    assert started == [{"project": "p"}]
    assert run is None or not is_open(run)


def test_a_run_from_before_the_ranks_were_known_is_refused(make_run, started, monkeypatch):
    """init() above Lightning's Trainer: every process would go on as rank 0 of 1, in a run of its own."""
    monkeypatch.setattr(current, "run", make_run(0, 1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=r"world_size=1: .* this is rank 0 of 2"):
        join({})
