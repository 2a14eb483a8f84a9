"""What is killed with -9 loses nothing and doubles nothing: a rank, the agent, the aggregator twenty times."""

import math
import os
import signal

import pytest
from system.jobs import DDPLOG, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NUM_LOGS = 5000
WHAT_IS_KNOWN = [("died", 9, "signal 9 (SIGKILL)"), ("died", None, "died, code unknown")]
"""Of a rank killed with -9: without `ddplog run` it depends on the kernel, and on whether the agent saw it alive."""

SUICIDE = """
import os, signal, sys, time
import ddplog
run = ddplog.init()
rank = int(os.environ["RANK"])
step = 0
while rank != 1 or step < 5000:  # the others go on until torchrun ends them
    run.log({f"rank_{rank}": float(step)}, step=step)
    step += 1
    if step > 5000:
        time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("launcher", "detail"), [("ddplog", "rank 1: signal 9 (SIGKILL)"), ("torchrun", "")])
def test_a_rank_killed_right_after_its_5000th_log_leaves_all_5000(job, launcher, detail):
    """log() has returned: no exit handler runs, and nobody but the agent can save what the rank left."""
    script = job.script(SUICIDE)
    words = job.torchrun(2, script)
    if launcher == "ddplog":
        words = (*DDPLOG, "run", "--quiet", "--no-summary", "--standalone", "--nproc-per-node", "2", script)
    job.run(*words, code=1)
    with job.open() as run:
        assert run.metric("rank_1").step.tolist() == list(range(NUM_LOGS))
        assert run.metric("rank_1").value.tolist() == list(map(float, range(NUM_LOGS)))
        assert run.metric("rank_0").step.tolist() == list(range(len(run.metric("rank_0"))))
        died = next(writer for writer in run.writers() if writer.rank == 1)
        assert (run.status, run.detail) == ("failed", detail or f"rank 1: {died.detail}")
        assert (died.state, died.signal, died.detail) in WHAT_IS_KNOWN[: 1 if detail else 2]
        assert run.drops() == ()


FIRST_RANK_DIES = """
import os, signal, time
import ddplog
run = ddplog.init(sinks="jsonl")
rank = int(os.environ["RANK"])
for step in range(400):
    run.log({"loss": float(10 * step + rank)}, step=step)
    time.sleep(0.002)
    if rank == 0 and step == 99:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rank_0_killed_takes_nobody_elses_logging_with_it(job):
    """Reliability case 25: the aggregator is not in rank 0's fate, though it lives on rank 0's node."""
    job.run(*job.ranks(3, job.script(FIRST_RANK_DIES)), code=128 + 9)

    with job.open() as run:
        loss = run.metric("loss")
        assert loss.step.tolist() == list(range(400))
        assert loss.n.tolist() == [3] * 100 + [2] * 300
        assert loss.expected.tolist() == [3] * 400
        assert (run.status, run.detail) in [("failed", f"rank 0: {detail}") for _, _, detail in WHAT_IS_KNOWN]
        assert [writer.state for writer in run.writers()] == ["died", "finished", "finished"]
    wait_until(lambda: len(job.jsonl()) == 400)


NUM_RANKS = 3

STEADY = """
import os, sys, time
from pathlib import Path
import ddplog
run = ddplog.init()
rank, stop = int(os.environ["RANK"]), Path("stop")
run.define_metric("count", reduce="sum")
step = 0
while not stop.exists() or step % 100:
    run.log({"loss": step * 1.25 + rank, "count": float(rank)}, step=step, weight=rank + 1.0)
    if rank:
        run.log({"some": float(step + rank)}, step=step)
    step += 1
    time.sleep(0.002)
Path(f"steps.{rank}").write_text(str(step))
"""


def _wait_for_other(job, known, find, most):
    """Wait for another process than `known`, and until it has done its work: the store has more points."""

    def has_moved():
        pid, points = find(), len(job.peek("loss"))
        return (pid, points) if pid and pid != known and points > most else None

    return wait_until(has_moved)


def _stop(job, process):
    (job.folder / "stop").touch()
    job.end(process)
    return {rank: int((job.folder / f"steps.{rank}").read_text()) for rank in range(NUM_RANKS)}


def _check_steady(job, lengths):
    """Every point once, and of the values it must have: those of the ranks that went so far."""
    wanted = {}
    for step in range(max(lengths.values())):
        ranks = [rank for rank, length in lengths.items() if step < length]
        weights = {rank: rank + 1.0 for rank in ranks}
        mean = sum(w * (step * 1.25 + rank) for rank, w in weights.items()) / sum(weights.values())
        wanted["loss", step] = (len(ranks), mean)
        wanted["count", step] = (len(ranks), float(sum(ranks)))
        some = [rank for rank in ranks if rank]
        if some:
            wanted["some", step] = (len(some), step + sum(some) / len(some))
    with job.open() as run:
        found = {}
        for key in sorted(run.keys()):
            points = run.metric(key)
            assert len(set(points.step.tolist())) == len(points), f"{key}: a step twice"
            for step, n, value in zip(points.step.tolist(), points.n.tolist(), points.value.tolist(), strict=True):
                found[key, step] = (n, value)
        assert (run.status, run.detail) == ("finished", "")
        assert run.drops() == ()
        assert [writer.rank for writer in sorted(run.writers(), key=lambda w: w.rank)] == list(range(NUM_RANKS))
    assert found.keys() == wanted.keys()
    for name, (n, value) in wanted.items():
        assert found[name][0] == n, name
        assert math.isclose(found[name][1], value, rel_tol=1e-12), (name, found[name], value)
    return found


def _check_jsonl(job, found):
    """The file has every id once; where a point was emitted again, the last line is the store's."""
    lines = job.jsonl()
    assert len({line["id"] for line in lines}) == len(lines), "a line twice"
    first = [(line["key"], line["step"]) for line in lines if line["revision"] == 0]
    assert len(first) == len(set(first)), "a point twice"
    assert {(line["key"], line["step"]): (line["n"], line["value"]) for line in lines} == found


def test_the_aggregator_killed_20_times_loses_and_doubles_nothing(job):
    """It dies at any instruction, and the next one goes on from its store and from the agents' journals."""
    process = job.start(*job.ranks(NUM_RANKS, job.script(STEADY)), DDPLOG_SINKS="jsonl")
    known, most = 0, 0
    for _ in range(20):
        known, most = _wait_for_other(job, known, job.aggregator_pid, most)
        os.kill(known, signal.SIGKILL)
    lengths = _stop(job, process)
    _check_jsonl(job, _check_steady(job, lengths))


def test_an_agent_killed_in_the_middle_is_replaced_and_nothing_is_lost(job):
    """log() looks at the agent once a second and starts another; the aggregator is found again, not doubled."""
    process = job.start(*job.ranks(NUM_RANKS, job.script(STEADY)), DDPLOG_SINKS="jsonl")
    known, most = 0, 0
    for _ in range(2):
        known, most = _wait_for_other(job, known, job.agent_pid, most)
        os.kill(known, signal.SIGKILL)
    lengths = _stop(job, process)
    _check_jsonl(job, _check_steady(job, lengths))


def test_agent_and_aggregator_killed_together_are_replaced(job):
    """As the kernel does when the node runs out of memory and takes the helpers."""
    process = job.start(*job.ranks(NUM_RANKS, job.script(STEADY)), DDPLOG_SINKS="jsonl")
    wait_until(lambda: len(job.peek("loss")) > 100)
    aggregator, agent = job.aggregator_pid(), job.agent_pid()
    os.kill(agent, signal.SIGKILL)
    os.kill(aggregator, signal.SIGKILL)
    points = len(job.peek("loss"))
    wait_until(lambda: len(job.peek("loss")) > points)
    lengths = _stop(job, process)
    _check_jsonl(job, _check_steady(job, lengths))
