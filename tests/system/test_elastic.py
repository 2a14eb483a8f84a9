"""Elastic training: a rank killed by -9, its group restarted, steps repeated, and all of it one coherent run.

examples/elastic.py trains; its batches depend on step and rank only, and it saves its optimizer, so that a repeated step
has bit for bit the loss that it had.
"""

import os
import signal
import socket
from pathlib import Path

import pytest
from event_files import read_scalars
from system.jobs import DDPLOG, TORCHRUN, wait_until

from ddplog.store.sink_states import read_sink_states

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "elastic.py")
GLOO = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""In torchrun's own store, which outlives a restart, Gloo would find the addresses of ranks that are gone."""
KEYS = ("loss", "samples", "world_size", "restarts")
BATCH = 16
EVERY = 20


HELD = """
# The example, whose rank 1 waits at some steps to be killed: once at each.
import os, runpy, sys, time
import ddplog

example, held = sys.argv[1], {int(step) for step in sys.argv[2].split(",") if step}
log = ddplog.Run.log

def log_and_wait(run, data, step=None, **more):
    log(run, data, step, **more)
    if run.rank == 1 and step in held and not os.path.exists(f"held.{step}"):
        open("held.new", "w").write(str(os.getpid()))
        os.rename("held.new", f"held.{step}")
        while True:
            time.sleep(1)

ddplog.Run.log = log_and_wait
sys.argv[:3] = [example]
try:
    runpy.run_path(example, run_name="__main__")
except RuntimeError:  # the other one is gone
    while "WAIT_FOR_LAUNCHER" in os.environ:
        time.sleep(1)
    raise
"""


def _example(job, steps, held=()):
    script = job.script(HELD, "held.py")
    options = ("--steps", str(steps), "--every", str(EVERY), "--checkpoint", "elastic.pt", "--step-s", "0.002")
    return (script, EXAMPLE, ",".join(map(str, held)), *options)


def _kill_rank(job, step):
    """Kill rank 1, which waits after that step, once the store has it: it is in no checkpoint."""
    path = job.folder / f"held.{step}"
    wait_until(path.exists, 120)
    wait_until(lambda: job.peek("loss") and job.peek("loss")[-1][0] >= step)
    pid = int(path.read_text())
    os.kill(pid, signal.SIGKILL)


def _column(run, key, attempt=None):
    points = run.metric(key, attempt=attempt) if attempt is not None else run.metric(key)
    rows = zip(points.step.tolist(), points.value.tolist(), points.n.tolist(), points.expected.tolist(), strict=True)
    steps = points.step.tolist()
    assert len(set(steps)) == len(steps), f"{key}: a step twice"
    return {step: (value, n, expected) for step, value, n, expected in rows}


def _check_series(run, steps, worlds):
    """Each step has one point of each key, of the highest attempt, and with all of that attempt's ranks.

    Args:
        run: The run.
        steps: How many steps it went.
        worlds: World size of each attempt.

    Returns:
        The first step of each attempt.
    """
    assert [(attempt.attempt, attempt.world_size) for attempt in run.attempts] == list(enumerate(worlds))
    firsts = [min(_column(run, "loss", attempt)) for attempt in range(len(worlds))]
    assert firsts[0] == 0
    assert all(first % EVERY == 0 for first in firsts), "each goes on from a checkpoint"
    for key in KEYS:
        series = _column(run, key)
        parts = [_column(run, key, attempt) for attempt in range(len(worlds))]
        assert sorted(series) == list(range(steps)), key
        for step, point in series.items():
            attempt = max(attempt for attempt, part in enumerate(parts) if step in part)
            assert attempt == max(attempt for attempt, first in enumerate(firsts) if first <= step)
            assert point == parts[attempt][step], (key, step)
            assert point[1:] == (worlds[attempt], worlds[attempt]), (key, step)
            if key == "samples":
                assert point[0] == BATCH * worlds[attempt]
            if key == "world_size":
                assert point[0] == worlds[attempt]
    assert run.drops() == ()
    return firsts


def _check_repeated(run, firsts):
    """The attempts have steps in common, whose values were kept apart; they are equal, since training went back."""
    for attempt, first in enumerate(firsts[1:], 1):
        before, after = _column(run, "loss", attempt - 1), _column(run, "loss", attempt)
        world_size = run.attempts[attempt].world_size
        both = [step for step in before if step >= first and before[step][1] == world_size]
        assert both, "nothing was repeated: this test proves nothing"
        assert [before[step] for step in both] == [after[step] for step in both]


def _check_sinks(job, run, firsts):
    """TensorBoard shows the run's series; the JSONL file has every attempt's; both say what came again, and from where."""
    series = {key: _column(run, key) for key in KEYS}
    shown = read_scalars(job.run_dir / "sinks" / "tensorboard")
    assert set(shown) == set(KEYS)
    for key, points in shown.items():
        assert [step for step, _ in points] == sorted(series[key]), key
        assert [value for _, value in points] == pytest.approx([series[key][step][0] for step in sorted(series[key])])
    lines = [line for line in job.jsonl() if line["key"] in KEYS]
    assert len({line["id"] for line in lines}) == len(lines)
    last = {
        (line["key"], line["attempt"], line["step"]): (line["value"], line["n"], line["expected"]) for line in lines
    }
    wanted = {
        (key, attempt, step): point
        for key in KEYS
        for attempt in range(len(firsts))
        for step, point in _column(run, key, attempt).items()
    }
    assert last == wanted
    states = read_sink_states(job.run_dir)
    assert [(state.name, state.state) for state in states] == [("jsonl", "drained"), ("tensorboard", "drained")]
    for state in states:
        assert "steps that came again" in state.detail
        for attempt, first in enumerate(firsts[1:], 1):
            assert f"attempt {attempt} from {first} on (" in state.detail, state


@pytest.mark.parametrize(("launcher", "kills"), [("torchrun", 1), ("ddplog run", 2)])
def test_a_killed_rank_restarts_its_group_and_the_run_stays_one(job, suite_table, launcher, kills):
    """Reliability case 6: steps are repeated from the last checkpoint, and attempts never mix."""
    steps, held = 100, [35, 75][:kills]
    words = (*DDPLOG, "run", "--quiet", "--no-summary") if launcher == "ddplog run" else TORCHRUN
    options = ("--standalone", "--max-restarts", "2", "--nproc-per-node", "2", *_example(job, steps, held))
    process = job.start(*words, *options, **GLOO)
    for step in held:
        _kill_rank(job, step)
    job.end(process, timeout_s=120)
    with job.open() as run:
        firsts = _check_series(run, steps, [2] * (kills + 1))
        _check_repeated(run, firsts)
        assert set(_column(run, "restarts", kills).values()) == {(float(kills), 2, 2)}
        assert (run.status, run.detail) == ("finished", "")
        wait_until(lambda: not (job.run_dir / "control.json").exists())
        _check_sinks(job, run, firsts)
        ends = {(w.attempt, w.rank): (w.state, w.signal) for w in run.writers()}
        out, _ = job.run(*DDPLOG, "show", "r1")
    for attempt in range(kills):
        known = [("died", 9)] if launcher == "ddplog run" else [("died", 9), ("died", None)]  # the kernel may not tell
        assert ends[attempt, 1] in known, "the first exit code stays in the record"
    assert [ends[kills, rank][0] for rank in range(2)] == ["finished"] * 2
    assert f"attempt {kills} from {firsts[-1]} on" in out.replace("\n", " ")
    suite_table("elastic restarts", kills=kills, attempts=kills + 1, steps=steps, lost=0, doubled=0, wrong=0, stuck=0)


def test_another_world_size_goes_on_with_one_correct_series(job, suite_table):
    """Reliability case 6: the second launch of the run id has 2 ranks where the first had 4."""
    job.run(*job.torchrun(4, *_example(job, 50)), timeout_s=120, **GLOO)
    job.run(*job.torchrun(2, *_example(job, 70)), timeout_s=120, **GLOO)
    with job.open() as run:
        firsts = _check_series(run, 70, [4, 2])
        assert firsts == [0, 40]
        assert run.status == "finished"
        assert {step: n for step, (_, n, _) in _column(run, "loss").items()} == {
            step: 4 if step < 40 else 2 for step in range(70)
        }
        _check_sinks(job, run, firsts)
    suite_table("elastic restarts", attempts=2, steps=70, lost=0, doubled=0, wrong=0, stuck=0)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_launchers_whose_restart_counts_differ_are_one_attempt(job, suite_table):
    """Reliability case 6: with c10d the group of the killed rank counts 1 restart, the other one 0, in one generation."""
    rendezvous = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}")
    words = (*TORCHRUN, *rendezvous, "--rdzv-id", "two", "--local-addr", "127.0.0.1", "--max-restarts", "2")
    environ = {
        **GLOO,
        "WAIT_FOR_LAUNCHER": "1",
    }  # a rank that failed by itself would be a restart of its launcher's, too
    launchers = [job.start(*words, "--nproc-per-node", "1", *_example(job, 100, [35]), **environ) for _ in range(2)]
    try:
        _kill_rank(job, 35)
        for launcher in launchers:
            job.end(launcher, timeout_s=120)
        with job.open() as run:
            firsts = _check_series(run, 100, [2, 2])
            _check_repeated(run, firsts)
            counts = run.metric("restarts", attempt=1)
            assert set(zip(counts.min.tolist(), counts.max.tolist(), strict=True)) == {(0.0, 1.0)}
            assert {(w.attempt, w.rank) for w in run.writers()} == {(a, r) for a in range(2) for r in range(2)}
            assert run.status == "finished"
            _check_sinks(job, run, firsts)
        assert len(job.folders()) == 2, "each launcher has its own agent"
        wait_until(lambda: job.agent_pid() is None and job.aggregator_pid() is None)
    finally:
        while (pid := job.agent_pid()) is not None:  # the fixture ends one
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: job.agent_pid() != pid)
    suite_table("elastic restarts", kills=1, attempts=2, steps=100, lost=0, doubled=0, wrong=0, stuck=0)
