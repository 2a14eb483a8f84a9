"""Real forwarder processes: killed at any moment, stopped, alone per sink, and without their tracker's package."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from emission_store import StoreMaker
from event_files import read_scalars

from ddplog.bootstrap import command
from ddplog.testing import read_jsonl

pytestmark = pytest.mark.system

KEYS = ("loss", "acc", "lr", "grad_norm")
STEPS = 5_000
LIVES = 8


@pytest.fixture
def start():
    processes = []

    def start(store, sink, *more, **environ):
        arguments = [sys.executable, "-m", "ddplog.forward", "--run-dir", str(store.run_dir), "--sink", sink, *more]
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ})
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(condition, process=None, timeout_s=60.0):
    """Look again and again; a failed look costs a millisecond."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        assert process is None or process.poll() is None, process.communicate()
        select.select([], [], [], 0.001)


def until_grown(process, folder, suffix, before):
    until(lambda: size_of(folder, suffix) > before, process)


def size_of(folder, suffix):
    return sum(path.stat().st_size for path in folder.glob(f"*{suffix}*")) if folder.exists() else 0


def state_of(store, sink):
    try:
        return json.loads((store.run_dir / "sinks" / sink / "state.json").read_text())
    except FileNotFoundError:
        return {"state": None}


def rows(first, last):
    return [(key, step, step + i / 4) for step in range(first, last) for i, key in enumerate(KEYS)]


@pytest.mark.parametrize(("sink", "suffix"), [("jsonl", "jsonl"), ("tensorboard", "tfevents")])
def test_killed_again_and_again_every_point_arrives_exactly_once(tmp_path, start, sink, suffix):
    """20,000 points in 8 lives; each is killed as soon as its file has grown: after a write, mostly before the cursor."""
    store = StoreMaker(tmp_path / "run-1")
    folder = store.run_dir / "sinks" / sink
    part = STEPS // LIVES
    for life in range(LIVES):
        store.add_points(rows(life * part, (life + 1) * part))
        before = size_of(folder, suffix)
        process = start(store, sink)
        until_grown(process, folder, suffix, before)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    store.add_points(rows(LIVES * part, STEPS))
    store.set_status("finished")
    process = start(store, sink)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert state_of(store, sink)["state"] == "drained"
    wanted = {key: [(step, step + i / 4) for step in range(STEPS)] for i, key in enumerate(KEYS)}
    if sink == "tensorboard":
        assert read_scalars(folder) == wanted
    else:
        lines = read_jsonl(folder / "run-1.jsonl")
        assert max(Counter(line["id"] for line in lines).values()) == 1
        assert {key: [(p["step"], p["value"]) for p in lines if p["key"] == key] for key in KEYS} == wanted


def test_killed_while_the_run_is_live_nothing_is_lost(tmp_path, start):
    store = StoreMaker(tmp_path / "run-1")
    folder = store.run_dir / "sinks" / "jsonl"
    for life in range(4):
        process = start(store, "jsonl")
        for part in range(5):
            before = size_of(folder, "jsonl")
            store.add_points([("loss", life * 500 + part * 100 + step, 0.5) for step in range(100)])
            until_grown(process, folder, "jsonl", before)
        process.kill()
        process.wait()
    store.set_status("finished")
    assert start(store, "jsonl").wait(60) == 0
    assert [line["step"] for line in read_jsonl(folder / "run-1.jsonl")] == list(range(2000))


def test_sigterm_ends_it_at_once_and_sigint_does_not(tmp_path, start):
    store = StoreMaker(tmp_path / "run-1")
    store.add_points([("loss", 1, 0.5)])
    process = start(store, "jsonl")
    until(lambda: state_of(store, "jsonl")["state"] == "running", process)
    process.send_signal(signal.SIGINT)
    store.add_points([("loss", 2, 0.5)])
    path = store.run_dir / "sinks" / "jsonl" / "cursor.json"
    until(lambda: path.exists() and json.loads(path.read_text())["cursor"] == 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert state_of(store, "jsonl")["detail"] == "stopped"


def test_a_second_forwarder_of_one_sink_leaves(tmp_path, start):
    store = StoreMaker(tmp_path / "run-1")
    process = start(store, "jsonl")
    until(lambda: state_of(store, "jsonl")["state"] == "running", process)
    second = start(store, "jsonl")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 0
    assert "another forwarder" in errors
    assert start(store, f"jsonl://{tmp_path / 'other'}", "--once").wait(30) == 0
    assert process.poll() is None


def test_a_missing_package_fails_with_the_extras_name(tmp_path, start):
    """Started again it would fail again: a status of its own tells the supervisor."""
    store = StoreMaker(tmp_path / "run-1")
    hidden = tmp_path / "hidden" / "tensorboard"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('No module named tensorboard')")
    path = os.pathsep.join([str(hidden.parent), os.environ.get("PYTHONPATH", "")])
    process = start(store, "tensorboard", PYTHONPATH=path)
    assert process.wait(30) == 3
    assert state_of(store, "tensorboard")["state"] == "failed"
    assert "ddplog[tensorboard]" in state_of(store, "tensorboard")["detail"]


def test_a_vanished_run_folder_ends_it(tmp_path, start):
    store = StoreMaker(tmp_path / "run-1")
    process = start(store, "jsonl")
    until(lambda: state_of(store, "jsonl")["state"] == "running", process)
    store.run_dir.rename(tmp_path / "moved")
    assert process.wait(30) == 0


def test_wrong_arguments_are_told_in_one_line(tmp_path, start):
    store = StoreMaker(tmp_path / "run-1")
    for sink in ("../x", "comte"):
        process = start(store, sink)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 3
        assert len(errors.splitlines()) == 1
    missing = start(type("Missing", (), {"run_dir": Path(tmp_path / "none")}), "jsonl")
    assert missing.wait(30) == 3


def test_the_lock_ends_with_the_process(tmp_path, start):
    """A record lock: no stale lock file can keep a sink from being delivered."""
    store = StoreMaker(tmp_path / "run-1")
    process = start(store, "jsonl")
    until(lambda: state_of(store, "jsonl")["state"] == "running", process)
    process.kill()
    process.wait()
    with (store.run_dir / "sinks" / "jsonl" / "lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_way_the_aggregator_starts_it_keeps_the_exit_status(tmp_path):
    """It must not start a sink again and again that can never work."""
    store = StoreMaker(tmp_path / "run-1")
    arguments = command("ddplog.forward.__main__", "--run-dir", str(store.run_dir), "--sink", "comte")
    assert subprocess.run(arguments, check=False, stderr=subprocess.DEVNULL).returncode == 3
