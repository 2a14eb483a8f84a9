"""A real disk of a few MB that is full while a real job runs: training goes on, the audit balances, and it recovers.

The disk is a tmpfs in a mount namespace of the test's own, and in a PID namespace, so that nothing is left behind.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

SOURCE = Path(__file__).parents[2] / "src"
TESTS = Path(__file__).parents[1]
UNSHARE = ("unshare", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

TRAIN = """
import json, os, time
from pathlib import Path
import ddplog

run = ddplog.init(sinks="jsonl")
keys = [f"key_{i}" for i in range(int(os.environ["KEYS"]))]
logged = step = 0
slowest = 0.0
while not Path("stop").exists():
    begin = time.perf_counter()
    run.log(dict.fromkeys(keys, float(step)), step=step)
    slowest = max(slowest, time.perf_counter() - begin)
    logged += len(keys)
    step += 1
    if step % 50 == 0:
        Path("progress.new").write_text(json.dumps({"logged": logged, "step": step, "drops": dict(run.drops)}))
        Path("progress.new").rename("progress")
    time.sleep(0.001)
run.finish()
Path("end").write_text(json.dumps({"logged": logged, "steps": step, "drops": dict(run.drops), "slowest": slowest}))
"""

DRIVER = """
import json, os, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from system.jobs import wait_until

which, folder = sys.argv[1], Path.cwd()
small = folder / "small"
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 if which == 'spool' else 48}m,mode=0700", "none", str(small)], check=True)
environ = {**os.environ, "DDPLOG_SPOOL": str(small / "s" if which == "spool" else folder / "s"),
           "DDPLOG_DIR": str(small / "runs" if which == "store" else folder / "runs")}
run_dir = Path(environ["DDPLOG_DIR"]) / "r1"

def progress():
    return json.loads(Path("progress").read_text()) if Path("progress").exists() else None

def shown():
    from ddplog.store.reader import open_run
    with open_run(run_dir) as run:
        (writer,) = run.writers()
        return run.status, writer.num_values, [(drop.reason, drop.count) for drop in run.drops()], len(run.metric("key_0"))

train = subprocess.Popen([sys.executable, "train.py"], env=environ)
wait_until(lambda: progress() and (run_dir / "run.db").exists())
def is_full():
    # Takes every last page, those too that were given back meanwhile.
    with (small / "filler").open("ab", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return os.statvfs(small).f_bavail == 0
wait_until(is_full)
start = progress()["step"]
if which == "spool":
    wait_until(lambda: progress()["drops"].get("disk_full"))
else:
    wait_until(lambda: is_full() and progress()["step"] > start + 1500)  # more than the store has room for
at_worst = progress()
(small / "filler").unlink()
def is_well():
    now = progress()
    is_taking = now["logged"] - sum(now["drops"].values()) > at_worst["logged"] - sum(at_worst["drops"].values()) + 600
    return is_taking and now["step"] > at_worst["step"] + 300
wait_until(is_well)
Path("stop").touch()
code = train.wait(60)
from ddplog.errors import DdplogError
def has_ended():
    try:
        return not (run_dir / "control.json").exists() and shown()[0] != "running"
    except DdplogError:
        return False
wait_until(has_ended, 60)
status, values, drops, points = shown()
lines = sum(1 for line in (run_dir / "sinks/jsonl/r1.jsonl").read_text().splitlines() if '"key_0"' in line)
Path("result").write_text(json.dumps({
    "code": code, "status": status, "values": values, "drops": dict(drops),
    "points": points, "lines": lines, **json.loads(Path("end").read_text())}))
for path in [*Path(environ["DDPLOG_SPOOL"]).glob("*/logs/*.log")]:
    print("---", path.name, path.read_text()[-3000:])
"""


def _may_unshare():
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("which", ["spool", "store"])
def test_a_full_disk_stops_nothing_and_hides_nothing(tmp_path, which, suite_table):
    """Reliability case 15: no SIGBUS, values logged = stored + dropped by reason, and all is well when room returns."""
    if not _may_unshare():
        pytest.skip("no mount namespace may be made here: unshare is missing, or not permitted")
    keys = 50 if which == "spool" else 2
    (tmp_path / "small").mkdir()
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DDPLOG_", "TORCHELASTIC_"))}
    environ |= {
        "PYTHONPATH": str(SOURCE), "DDPLOG_RUN_ID": "r1", "DDPLOG_SEGMENT_BYTES": str(64 * 1024),
        "DDPLOG_EXIT_WAIT_S": "20", "KEYS": str(keys),
    }  # fmt: skip
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-c", DRIVER, which, str(TESTS)],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads((tmp_path / "result").read_text())
    print(result)

    assert (result["code"], result["status"]) == (0, "finished")
    assert result["values"] + sum(result["drops"].values()) == result["logged"]
    assert result["lines"] == result["points"] == result["values"] / keys
    if which == "spool":
        assert set(result["drops"]) == {"disk_full"}
    else:
        assert result["drops"] == {}, "the journals hold what the store cannot"
    suite_table("full disks of real jobs", jobs=1, values=result["logged"], lost=0, doubled=0, stuck=0)
