"""Bad input is a clear message or a counted drop; training goes on, and nothing already logged is lost."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from system.jobs import DDPLOG, SOURCE, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]


def _may(*words):
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not _may("unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"), reason="this machine permits no mount (unshare)"
)

SHORT = """
import sys
import ddplog
run = ddplog.init(**eval(sys.argv[1]))
run.log({"loss": 1.0}, step=0)
print("trained")
"""


@pytest.mark.parametrize(
    ("arguments", "environ", "toml", "message"),
    [
        ({"projekt": "x"}, {}, "", "projekt='x': no such setting; there are .*project"),
        ({"grace_s": "soon"}, {}, "", "grace_s='soon': must be of type float"),
        ({"sinks": ("jsonl", 3)}, {}, "", "sinks=.*a list of strings"),
        ({"run_id": "../up"}, {}, "", "run_id='../up'"),
        ({}, {"DDPLOG_GRACE_S": "soon"}, "", "DDPLOG_GRACE_S='soon': must be a number"),
        ({}, {"DDPLOG_EXIT_WAIT_S": "-1"}, "", "exit_wait_s=-1"),
        ({}, {"DDPLOG_RESUME": "must", "DDPLOG_RUN_ID": "r2"}, "", "there is no run r2"),
        ({}, {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "", "WORLD_SIZE='two': must be a whole number"),
        ({}, {}, "projekt = 'x'", r"ddplog.toml: projekt='x': no such setting"),
        ({}, {}, "port = 70000", "port=70000"),
        ({}, {}, "port = ", "ddplog.toml.*must be TOML"),
    ],
)
def test_a_setting_that_cannot_work_is_named_by_init(job, arguments, environ, toml, message):
    """Before training starts is the one moment at which an exception helps."""
    if toml:
        (job.folder / "ddplog.toml").write_text(toml)
    script = job.script(SHORT)
    _, err = job.run(sys.executable, script, repr(arguments), code=1, **environ)
    assert re.search("ConfigError: .*" + message, err), err


def test_ddplog_run_refuses_a_bad_setting_before_it_starts_the_job(job):
    script = job.script(SHORT)
    _, err = job.run(*DDPLOG, "run", "--", sys.executable, script, "{}", code=2, DDPLOG_GRACE_S="soon")
    assert "DDPLOG_GRACE_S" in err
    assert "Traceback" not in err
    assert not job.runs.exists()


@pytest.mark.parametrize("setting", ["dir", "spool"])
def test_a_folder_that_cannot_be_made_is_named_by_init(job, setting):
    (job.folder / "file").write_text("in the way")
    script = job.script(SHORT)
    path = str(job.folder / "file" / "below")
    _, err = job.run(sys.executable, script, repr({setting: path}), code=1)
    assert re.search(f"ConfigError: {setting}=", err), err


def test_an_unknown_reduction_is_an_error_at_once(job):
    script = job.script("import ddplog\nrun = ddplog.init()\nrun.define_metric('loss', reduce='average')\n")
    _, err = job.run(sys.executable, script, code=1)
    assert "reduce='average': must be one of mean, sum" in err


def test_a_script_that_does_not_exist_is_said_so(job):
    _, err = job.run(*DDPLOG, "run", "--nproc-per-node", "2", "nothing.py", code=2)
    assert "nothing.py" in err
    assert "Traceback" not in err
    _, err = job.run(*DDPLOG, "run", "--", "no-such-program", code=127)
    assert "no-such-program" in err
    assert "Traceback" not in err


def test_without_torch_ddplog_run_says_what_to_do_and_runs_any_command(job):
    """torch is the user's own: an image for data preparation has none."""
    packages = Path(pytest.__file__).parents[1]
    bare = job.folder / "bare"
    bare.mkdir()
    for entry in packages.iterdir():
        if not re.match(r"(torch|functorch|torchgen|.*\.pth$)", entry.name):
            (bare / entry.name).symlink_to(entry)
    words = (sys.executable, "-S", "-m", "ddplog.cli.main", "run")
    environ = {"PYTHONPATH": f"{SOURCE}{os.pathsep}{bare}"}
    script = job.script(SHORT)
    _, err = job.run(*words, script, code=2, **environ)
    assert "torch is not installed" in err
    assert "ddplog run -- " in err
    out, _ = job.run(*words, "--", sys.executable, "-S", script, "{}", **environ)
    assert out == "trained\n"
    with job.open() as run:
        assert (run.status, len(run.metric("loss"))) == ("finished", 1)


def test_a_port_that_is_in_use_loses_nothing(job):
    """The aggregator cannot listen: training must not notice, and all is there once the port is free."""
    script = job.script(
        "import ddplog\nrun = ddplog.init()\nfor i in range(500): run.log({'loss': float(i)}, step=i)\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _, err = job.run(*job.ranks(1, script), DDPLOG_PORT=port, DDPLOG_EXIT_WAIT_S="0.3")
        assert "they are safe in" in err
        assert job.peek("loss") == []
        _, err = job.run(*DDPLOG, "run", "--", sys.executable, script, code=2, DDPLOG_PORT=port)
        assert f"port={port}" in err
    with job.open() as run:
        assert run.metric("loss").step.tolist() == list(range(500))
        assert run.status == "finished"


VALUES = """
import json, sys, warnings
import ddplog, numpy, torch
warnings.simplefilter("always")
run = ddplog.init(strict=sys.argv[1] == "strict")
run.log({
    "int": 3, "bool": True, "big": 2**60, "nan": float("nan"), "inf": float("inf"),
    "nested": {"a": {"b": 1.5}, "c": 2},
    "np32": numpy.float32(0.5), "np64": numpy.float64(0.25), "npint": numpy.int64(7), "npbool": numpy.bool_(True),
    "nparray": numpy.array([1.25]), "np0d": numpy.array(4), "npnan": numpy.float32("nan"),
    "torch": torch.tensor(0.75), "torchgrad": torch.tensor([1.5], requires_grad=True) * 2,
    "torchint": torch.tensor(9), "torchhalf": torch.tensor(0.5, dtype=torch.bfloat16),
}, step=numpy.int64(1), weight=torch.tensor(2.0))

class Hostile:
    def __float__(self): raise RuntimeError("no")
    def __repr__(self): raise RuntimeError("no")

bad = {
    "string": "1.5", "none": None, "complex": 1j, "npcomplex": numpy.complex64(1), "list": [1.0], "vector": torch.ones(3),
    "matrix": numpy.ones((2, 2)), "object": Hostile(), "huge": 10**400, "torchcomplex": torch.tensor(1j),
}
errors = {}
for key, value in bad.items():
    try:
        run.log({key: value, "good": 1.0}, step=len(errors))
    except ddplog.UsageError as exc:
        errors[key] = str(exc)
    else:
        errors[key] = ""
for key in (float("nan"), None, 3, "", "a" * 251, "new\\nline", ("t",), "\\ud800"):
    try:
        run.log({key: 1.0, "good": 1.0}, step=100)
    except ddplog.UsageError as exc:
        errors[repr(key)] = str(exc)
for call in (lambda: run.log(3.0), lambda: run.log(None), lambda: run.log([("loss", 1.0)]),
             lambda: run.log({"good": 1.0}, step="x"), lambda: run.log({"good": 1.0}, step=1.5),
             lambda: run.log({"good": 1.0}, step=2**64),
             lambda: run.log({"weighted": 1.0}, step=0, weight=-1.0),
             lambda: run.log({"weighted": 1.0}, step=1, weight=float("nan")),
             lambda: run.log({"weighted": 1.0}, step=2, weight="x"),
             lambda: run.set_step("x"), lambda: run.set_step(None)):
    try:
        call()
    except ddplog.UsageError as exc:
        errors[f"call {len(errors)}"] = str(exc)
print(json.dumps([errors, dict(run.drops)]))
"""

GOOD = {
    "int": 3, "bool": 1, "big": 2**60, "inf": float("inf"), "nested/a/b": 1.5, "nested/c": 2, "np32": 0.5, "np64": 0.25,
    "npint": 7, "npbool": 1, "nparray": 1.25, "np0d": 4, "torch": 0.75, "torchgrad": 3, "torchint": 9, "torchhalf": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_numbers_of_every_library_are_taken_and_everything_else_is_named(job, mode):
    """Off: counted and warned about once per reason. strict=True: UsageError names the key, where the mistake is."""
    out, err = job.run(sys.executable, job.script(VALUES), mode)
    errors, drops = json.loads(out)
    with job.open() as run:
        for key, value in GOOD.items():
            assert run.metric(key).value.tolist() == [value], key
        for key in ("nan", "npnan"):
            assert run.metric(key).nan_count.tolist() == [1]
        bad = {"string", "none", "complex", "npcomplex", "list", "vector", "matrix", "object", "huge", "torchcomplex"}
        assert not bad & set(run.keys())
        assert run.metric("good").step.tolist() == [*range(10), 100]
        assert run.metric("weighted").step.tolist() == [0, 1, 2]
        assert {drop.reason: drop.count for drop in run.drops()} == drops
    assert drops == {"bad_value": 13, "bad_key": 8, "bad_step": 5, "bad_weight": 3}
    if mode == "strict":
        assert all(key in errors[key] for key in bad)
        assert len([key for key in errors if key.startswith("call")]) == 11
    else:
        assert not any(errors.values())
        assert err.count("bad_") == 0
        assert err.count("RuntimeWarning") == 4


LARGE = """
import json
import ddplog
run = ddplog.init()
run.log({"loss": 1.0}, step=0)
run.log_text("large", "x" * 10_000_000)
run.log_text("small", "y" * 200_000)
run.log_params({"large": "z" * 10_000_000, "lr": 0.1})
run.alert("large", "a" * 10_000_000)
run.log({"loss": 2.0}, step=1)
for start in range(0, 20_000, 100):
    run.log({f"key_{n}": float(n) for n in range(start, start + 100)}, step=2)
run.log({f"wide_{n}": 1.0 for n in range(5000)}, step=3)
run.log({"loss": 3.0, "key_7": 7.5}, step=4)
print(json.dumps(dict(run.drops)))
"""


def test_what_is_too_large_is_counted_and_harms_nothing_else(job):
    """A name with a loop index in it, or a 10 MB string, would otherwise fill every tracker and the journal."""
    out, err = job.run(sys.executable, job.script(LARGE))
    drops = json.loads(out)
    with job.open(60) as run:
        assert run.metric("loss").value.tolist() == [1, 2, 3]
        assert len(run.keys()) == 10_000
        assert run.metric("key_7").value.tolist() == [7, 7.5]
        assert run.metric("key_9998").value.tolist() == [9998]
        texts = {text.key: len(text.text) for text in run.texts()}
        assert texts == {"small": 200_000}
        assert {drop.reason: drop.count for drop in run.drops()} == drops
    assert drops["key_limit"] == 20_001 - 10_000 + 5000
    assert drops["record_too_large"] == 3
    assert "max_keys" in err


FILL = """
import json, os, sys
import ddplog
run = ddplog.init(segment_bytes=256 * 1024)
accepted = 0
before = 0
for step in range(200_000):
    run.log({"loss": float(step), "other": 1.0}, step=step)
    now = run.drops.get("disk_full", 0)
    accepted += now == before
    if now == before:
        last = step
    before = now
    if now > 50_000:
        break
print(json.dumps([accepted, last, dict(run.drops)]))
"""


@needs_mounts
def test_a_full_journal_disk_drops_with_a_count_and_keeps_what_was_accepted(job):
    """A sparse mapping on a full disk would be a SIGBUS, which ends training."""
    job.spool.mkdir(mode=0o700)
    mount = 'mount -t tmpfs -o size=4m,mode=700 none "$DDPLOG_SPOOL" && exec "$@"'
    out, err = job.run("unshare", "-m", "/bin/sh", "-c", mount, "sh", *job.ranks(1, job.script(FILL)))
    accepted, last, drops = json.loads(out)
    assert accepted > 10_000
    assert drops["disk_full"] == 2 * (drops["disk_full"] // 2) > 50_000
    assert "disk is full" in err
    wait_until(lambda: len(job.peek("loss")) >= accepted)
    with job.open() as run:
        steps = run.metric("loss").step.tolist()
        assert len(steps) == accepted
        assert steps[-1] == last
        assert run.metric("loss").value.tolist() == list(map(float, steps))
        assert run.drops()[0].count >= drops["disk_full"]
        assert (run.status, run.detail) == ("finished", "")


FULL_STORE = """
import errno, json, os, sys, time
import ddplog
runs = os.environ["DDPLOG_DIR"]
run = ddplog.init()
for step in range(100):
    run.log({"loss": float(step)}, step=step)

def points():
    try:
        with ddplog.open_run(run.dir) as past:
            return past.metric("loss").step.tolist()
    except ddplog.DdplogError:
        return []

def wait(wanted):
    deadline = time.monotonic() + 20
    while not wanted():
        assert time.monotonic() < deadline, wanted
        time.sleep(0.05)

wait(lambda: len(points()) >= 50)
with open(runs + "/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(65536))
    except OSError as exc:
        assert exc.errno == errno.ENOSPC
    try:
        while True:
            filler.write(b"x")
    except OSError:
        pass
for step in range(100, 20_000):
    run.log({"loss": float(step)}, step=step)
sequence = run._journal.next_seq
wait(lambda: "error" in open(next(__import__("pathlib").Path(os.environ["DDPLOG_SPOOL"]).glob("*/logs/aggregator.log"))).read().lower())
assert run._journal.acked_seq < sequence
os.unlink(runs + "/filler")
run.finish()
wait(lambda: len(points()) == 20_000)
assert points() == list(range(20_000))
print(json.dumps(dict(run.drops)))
"""


@needs_mounts
def test_a_full_disk_under_the_store_delays_and_loses_nothing(job):
    """Nothing is acknowledged meanwhile, so the journals hold it until there is room again."""
    job.runs.mkdir()
    mount = 'mount -t tmpfs -o size=8m none "$DDPLOG_DIR" && exec "$@"'
    out, _ = job.run("unshare", "-m", "/bin/sh", "-c", mount, "sh", *job.ranks(1, job.script(FULL_STORE)))
    assert json.loads(out) == {}
