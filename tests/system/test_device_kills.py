"""A rank that is killed while values are on their way from a device: what it had is stored, the rest is counted."""

import json
from pathlib import Path

import pytest
from system.jobs import DDPLOG

pytest.importorskip("torch")
pytestmark = pytest.mark.system

TESTS = Path(__file__).parents[1]
NUM_STEPS = 100
NUM_BEHIND = 4

KILLED = f"""
import os, signal
import ddplog
from ddplog.worker.pending import Pending
from worker.fake_device import FakeDevice, on_device

run = ddplog.init()
device = FakeDevice()
run._pending = Pending(run._journal, device)
for step in range({NUM_STEPS}):
    run.set_step(step)
    run.log({{"loss": on_device(float(step)), "lr": 0.1}})
    run.log({{"behind": float(step)}})
    for event in device.waiting[:-{NUM_BEHIND - 1}]:  # a device that is some steps behind; the last calls found them so
        event.complete()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_what_was_on_the_device_and_the_audit_says_so(job):
    """The agent adds up what the rank can no longer: every value is stored or dropped, and `show` names the reason."""
    environ = {"PYTHONPATH": f"{job.environ['PYTHONPATH']}:{TESTS}"}
    job.run(*job.ranks(1, job.script(KILLED)), code=137, **environ)
    num_arrived, num_lost = NUM_STEPS - NUM_BEHIND, 3 * NUM_BEHIND
    with job.open() as run:
        (writer,) = run.writers()
        for key in ("loss", "lr", "behind"):
            assert run.metric(key).step.tolist() == list(range(num_arrived))
        assert run.metric("loss").value.tolist() == list(map(float, range(num_arrived)))
        assert [(drop.rank, drop.reason, drop.count) for drop in run.drops()] == [(0, "device_pending", num_lost)]
        assert (writer.num_values, writer.step) == (3 * num_arrived, num_arrived)
    out, _ = job.run(*DDPLOG, "show", str(job.run_dir))
    said = f"{3 * NUM_STEPS} values logged = {3 * num_arrived} stored + {num_lost} dropped"
    assert said in out
    assert "device_pending" in out
    out, _ = job.run(*DDPLOG, "show", "--json", str(job.run_dir))
    assert "device_pending" in json.dumps(json.loads(out))
