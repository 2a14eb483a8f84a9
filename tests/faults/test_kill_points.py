"""A process that dies at any named point of ddplog loses nothing, doubles nothing and stores nothing wrong.

Each run goes on until its point has killed several times, and stays armed to its end. What the ranks accepted, and the
values they gave it, f(rank, step), are the oracle; the kills are counted by the processes themselves, before they die.
"""

import math
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
from system.jobs import DDPLOG, SOURCE, wait_until

from ddplog.killpoints import POINTS

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

KILLS = 2
NIGHTLY_KILLS = 50
NUM_RANKS = 2

ARMED = {
    "agent.after_send": "agent.after_send:0.1",
    "agent.before_bye": "agent.before_bye:1",  # reached once a death: one that got through would be the last
    "agent.after_ack": "agent.after_ack:0.1",
    "aggregator.after_log_append": "aggregator.after_log_append:0.1",
    "aggregator.after_log_sync": "aggregator.after_log_sync:0.1",
    "aggregator.before_sql_commit": "aggregator.before_sql_commit:0.1",
    "aggregator.after_commit": "aggregator.after_commit:0.1",
    "aggregator.during_replay": "aggregator.after_commit:0.05,aggregator.during_replay:0.3",  # a replay needs a death
    "forwarder.after_write": "forwarder.after_write:0.3",
    "forwarder.after_cursor": "forwarder.after_cursor:0.3",
}

STEADY = """
import os, time
from pathlib import Path
import ddplog
run = ddplog.init()
rank, stop = int(os.environ["RANK"]), Path("stop")
run.define_metric("count", reduce="sum")
step = 0
while not stop.exists() if rank == 0 else step < 300:  # the others end early: there are deaths to report
    run.log({"loss": step * 1.25 + rank, "count": rank + 1.0}, step=step, weight=rank + 1.0)
    run.log({f"own_{rank}": float(step * 7 + rank)}, step=step)
    step += 1
    time.sleep(0.004)
Path(f"steps.{rank}").write_text(str(step))
"""

SUPERVISOR = """
import os, subprocess, sys
while subprocess.run([sys.executable, *sys.argv[1:]], env={
    **os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
}).returncode:
    pass
"""

ROLLING = """
import os, struct, time
from pathlib import Path
import ddplog
accepted = os.open("accepted", os.O_RDWR | os.O_CREAT)  # in the page cache: it survives the kill
stop = Path("stop")
run = ddplog.init()
(step,) = struct.unpack("<q", os.pread(accepted, 8, 0) or bytes(8))
while not stop.exists() or step < 1000:  # the first segment is made by init(): the deaths may all have been there
    run.log({f"key_{i}": float(step * 7 + i) for i in range(20)}, step=step)
    step += 1
    os.pwrite(accepted, struct.pack("<q", step), 0)
    time.sleep(0.0005)
"""


def _kills(job):
    """How often each point has killed."""
    path = job.folder / "kills"
    return Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()


def _run_until_killed(job, words, point, armed, times, **environ):
    """Run the job until the point has killed so often, and to its end; the point stays armed."""
    environ |= {"DDPLOG_SINKS": "jsonl", "DDPLOG_KILL_AT": armed, "DDPLOG_KILL_LOG": str(job.folder / "kills")}
    process = job.start(*words, **environ)
    try:
        wait_until(lambda: _kills(job)[point] >= times or process.poll() is not None, 20 + 10 * times)
    except pytest.fail.Exception:
        print(job.logs(), _kills(job))
        raise
    (job.folder / "stop").touch()
    job.end(process)
    if point == "agent.before_bye":  # armed for ever, no agent would get past it
        job.run(*DDPLOG, "sync", "r1")
    assert _kills(job)[point] >= times
    print(dict(_kills(job)))


def _check(job, wanted):
    """The store has every point with its number of ranks and its value and no other, and the file has them once."""
    with job.open(60) as run:
        found = {}
        for key in sorted(run.keys()):
            points = run.metric(key)
            assert len(set(points.step.tolist())) == len(points), f"{key}: a step twice"
            for step, n, value in zip(points.step.tolist(), points.n.tolist(), points.value.tolist(), strict=True):
                found[key, step] = (n, value)
        assert run.drops() == ()
        status = run.status, run.detail
    assert found.keys() == wanted.keys()
    for name, (n, value) in wanted.items():
        assert found[name][0] == n, name
        assert math.isclose(found[name][1], value, rel_tol=1e-12), (name, found[name], value)
    lines = job.jsonl()
    assert len({line["id"] for line in lines}) == len(lines), "a line twice"
    first = [(line["key"], line["step"]) for line in lines if line["revision"] == 0]
    assert len(first) == len(set(first)), "a point twice"
    assert {(line["key"], line["step"]): (line["n"], line["value"]) for line in lines} == found
    return status


def _steady(lengths):
    wanted = {}
    for step in range(max(lengths.values())):
        weights = {rank: rank + 1.0 for rank, length in lengths.items() if step < length}
        mean = sum(weight * (step * 1.25 + rank) for rank, weight in weights.items()) / sum(weights.values())
        wanted["loss", step] = (len(weights), mean)
        wanted["count", step] = (len(weights), sum(weights.values()))
        wanted.update({(f"own_{rank}", step): (1, float(step * 7 + rank)) for rank in weights})
    return wanted


def _kill_helpers(job, point, times):
    _run_until_killed(job, job.ranks(NUM_RANKS, job.script(STEADY)), point, ARMED[point], times)
    lengths = {rank: int((job.folder / f"steps.{rank}").read_text()) for rank in range(NUM_RANKS)}
    assert _check(job, _steady(lengths)) == ("finished", "")


def _kill_writer(job, point, times):
    words = job.ranks(1, job.script(SUPERVISOR, "supervisor.py"), job.script(ROLLING))[:1]
    words = (*words, str(job.folder / "supervisor.py"), str(job.folder / "train.py"))
    _run_until_killed(job, words, point, f"{point}:0.3", times, DDPLOG_SEGMENT_BYTES=str(64 * 1024))
    (length,) = struct.unpack("<q", (job.folder / "accepted").read_bytes())
    _check(job, {(f"key_{i}", step): (1, float(step * 7 + i)) for step in range(length) for i in range(20)})


def _kill(job, point, times):
    (_kill_writer if point.startswith("writer.") else _kill_helpers)(job, point, times)


@pytest.mark.parametrize("point", POINTS)
def test_a_death_at_a_kill_point_loses_and_doubles_nothing(job, point, suite_table):
    """log() had returned, so the store has it, with the value it had; what the sink owns says each thing once."""
    _kill(job, point, KILLS)
    suite_table("deaths at named points", kill_points=1, kills=_kills(job)[point], lost=0, doubled=0, wrong=0, stuck=0)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
def test_fifty_deaths_at_a_kill_point_lose_and_double_nothing(job, point, suite_table):
    _kill(job, point, NIGHTLY_KILLS)
    suite_table("deaths at named points", kill_points=1, kills=_kills(job)[point], lost=0, doubled=0, wrong=0, stuck=0)


def test_every_point_that_can_be_armed_is_reached_somewhere_and_no_other():
    """A point that nothing reaches would never kill, and its test would wait in vain."""
    text = "\n".join(path.read_text() for path in Path(SOURCE / "ddplog").rglob("*.py"))
    assert set(re.findall(r"\breach\(\"([a-z_.]+)\"\)", text)) == set(POINTS)
