"""Real jobs that hang: the run says who is behind, where everybody is, and when it is over; the ranks go on untouched."""

import json
import os
import signal

import pytest
from system.jobs import DDPLOG, wait_until

from ddplog.errors import DdplogError
from ddplog.store.reader import open_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]

GLOO = """
import os, time
from pathlib import Path
import torch, torch.distributed as dist
import ddplog

def wait_for_a_file():
    while not Path("go").exists():
        time.sleep(0.05)

def train(run, rank):
    for step in range(8):
        if rank == 1 and step == 5:
            wait_for_a_file()
        run.log({"loss": float(step)}, step=step)
        dist.all_reduce(torch.ones(2))
        time.sleep(0.02)

dist.init_process_group("gloo")
run = ddplog.init()
train(run, dist.get_rank())
dist.destroy_process_group()
print("rank", run.rank, "went on", len(os.listdir("/proc/self/task")) > 1)
"""


def events(job, *kinds):
    """The live run's events of some kinds."""
    try:
        with open_run(job.run_dir) as run:
            return [event for event in run.events() if event.kind in kinds]
    except DdplogError:
        return []


def line_of(text, needle):
    return next(number for number, line in enumerate(text.splitlines(), 1) if needle in line)


def test_a_rank_that_sleeps_while_the_other_waits_in_a_collective(job):
    """Reliability case 8: named within hang_s, with the stacks of both, and the job ends as if nothing had been."""
    script = job.script(GLOO)
    process = job.start(*job.torchrun(2, script), DDPLOG_HANG_S="1")
    collected = wait_until(lambda: len(events(job, "stack")) >= 2 and events(job, "hang", "stack"))

    hang, *stacks = collected
    assert (hang.kind, hang.level, hang.rank, hang.step) == ("hang", "warning", 1, 4)
    assert hang.message.startswith("rank 1 has not moved for 1.")
    assert "last step 4; the other one has reached step 5" in hang.message
    places = {event.rank: (event.message, event.data["text"]) for event in stacks}
    assert places[1][0] == f"rank 1 is in wait_for_a_file (train.py:{line_of(GLOO, 'time.sleep(0.05)')})"
    assert places[0][0] == f"rank 0 is in train (train.py:{line_of(GLOO, 'all_reduce')})"
    for _, text in places.values():
        assert f'File "{script}", line {line_of(GLOO, "train(run, dist")} in <module>' in text

    shown, _ = job.run(*DDPLOG, "show", "r1")
    assert "hangs: rank 1 has not moved" in shown
    found = json.loads(job.run(*DDPLOG, "show", "r1", "--json")[0])
    assert found["hang"] == hang.message
    assert [rank["standing"] for rank in found["ranks"]] == ["waiting", "hung"]
    once, _ = job.run(*DDPLOG, "top", "r1", "--once")
    assert "hangs: rank 1 has not moved" in once
    assert [line.split()[2] for line in once.splitlines() if line.strip()[:2] in ("0 ", "1 ")] == ["waiting", "hung"]

    asked = json.loads(job.run(*DDPLOG, "stacks", "r1", "--json")[0])
    assert [(rank["rank"], rank["at"].split()[0], rank["step"], rank["trouble"]) for rank in asked] == [
        (0, "train", 5, None),
        (1, "wait_for_a_file", 4, None),
    ]
    text, _ = job.run(*DDPLOG, "stacks", "r1", "--rank", "1")
    assert "rank 1 hung, step 4" in text
    assert "rank 0" not in text

    (job.folder / "go").touch()
    out, _ = job.end(process)
    assert sorted(line[:14] for line in out.splitlines()) == ["rank 0 went on", "rank 1 went on"]
    with job.open() as run:
        assert (run.status, run.detail) == ("finished", "")
        assert run.metric("loss").n.tolist() == [2] * 8
        (over,) = [event for event in run.events() if event.kind == "hang_over"]
        assert over.message.startswith("it moved again after ")
        assert run.drops() == ()
    text, err = job.run(*DDPLOG, "stacks", "r1")
    assert "not live; these are the last stacks" in err
    assert "at wait_for_a_file (train.py:" in text


GOES_ON = """
import os, time
from pathlib import Path
import ddplog
run = ddplog.init()
rank, stop = int(os.environ["RANK"]), Path("stop")
step = 0
while not stop.exists():
    if rank == 1 and step == 20:
        while not Path("go").exists():
            time.sleep(0.01)
    run.log({"loss": float(step)}, step=step)
    step += 1
    time.sleep(0.01)
"""


def test_a_rank_that_sleeps_while_the_others_go_on_and_the_aggregator_dies(job):
    """The next aggregator knows of the hang: it is said once, and its end too."""
    process = job.start(*job.ranks(3, job.script(GOES_ON)), DDPLOG_HANG_S="0.5")
    wait_until(lambda: events(job, "stack"))
    (hang,) = events(job, "hang")
    assert (hang.rank, hang.step, hang.data["is_everybody"]) == (1, 19, False)
    assert [event.rank for event in events(job, "stack")] == [1], "those that move are left alone"

    known = job.aggregator_pid()
    os.kill(known, signal.SIGKILL)
    wait_until(lambda: job.aggregator_pid() not in (None, known))
    last = len(job.peek("loss"))
    wait_until(lambda: len(job.peek("loss")) > last + 100)
    (job.folder / "go").touch()
    (over,) = wait_until(lambda: events(job, "hang_over"))
    assert over.rank == 1
    (job.folder / "stop").touch()
    job.end(process)
    with job.open() as run:
        assert [event.kind for event in run.events() if "hang" in event.kind] == ["hang", "hang_over"]


VALIDATES = """
import os, time
from pathlib import Path
import ddplog
run = ddplog.init()
rank = int(os.environ["RANK"])
for epoch in range(2):
    for step in range(epoch * 5, epoch * 5 + 5):
        run.log({"loss": float(step)}, step=step)
        time.sleep(0.02)
    if rank == 0:
        for batch in range(60):
            run.log({"val/loss": float(batch)}, step=step)
            time.sleep(0.025)
        Path(f"validated.{epoch}").touch()
    while not Path(f"validated.{epoch}").exists():
        time.sleep(0.01)
"""


def test_validation_on_rank_0_and_ranks_that_are_done_raise_no_alarm(job):
    """Reliability case 8: idle is not hung. The others stand still for 1.5 s of each epoch, three times hang_s."""
    job.run(*job.ranks(3, job.script(VALIDATES)), DDPLOG_HANG_S="0.5")
    with job.open() as run:
        assert [event.message for event in run.events() if event.kind in ("hang", "stack")] == []
        assert len(run.metric("loss")) == 10


def test_a_run_without_the_signal_says_so_and_hangs_all_the_same(job):
    process = job.start(*job.ranks(2, job.script(GOES_ON)), DDPLOG_HANG_S="0.5", DDPLOG_STACK_SIGNAL="0")
    event = wait_until(lambda: events(job, "stack"))[0]
    assert (event.level, event.message.split(":")[0]) == ("warning", "no stack of rank 1")
    assert "stack_signal" in event.message
    assert [path.name for path in job.spool.glob("*/*/stacks.*")] == []
    for name in ("go", "stop"):
        (job.folder / name).touch()
    job.end(process)
    job.open().close()
