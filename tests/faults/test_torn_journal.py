"""Everything of a job is killed, its journal loses pages, and `ddplog sync` completes the run with what is left."""

import json
import os
import random
import signal

import pytest
from system.jobs import DDPLOG, wait_until

from ddplog.journal import segment

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PAGE = 4096
KEYS = 20
TRAIN = """
import json, os, signal, time
from pathlib import Path
import ddplog

run = ddplog.init()
keys = [f"key_{i}" for i in range(20)]
run.log(dict.fromkeys(keys, 0.0), step=0)
while not Path("alone").exists():  # from here on nobody takes anything
    time.sleep(0.01)
for step in range(1, 4000):
    run.log(dict.fromkeys(keys, float(step)), step=step)
Path("accepted").write_text("4000")
os.kill(os.getpid(), signal.SIGKILL)
"""


def tear(folder, rng):
    """Lose a quarter of the pages of every segment, but no header; return the offsets of what is gone, by segment."""
    lost = {}
    for path in sorted(folder.glob("*.seg")):
        data = bytearray(path.read_bytes())
        for at in range(PAGE, len(data) - PAGE, PAGE):
            if any(data[at : at + PAGE]) and rng.random() < 0.25:
                data[at : at + PAGE] = bytes(PAGE)
                lost.setdefault(path.name, []).append(at)
        path.write_bytes(data)
    return lost


def test_a_run_whose_journal_lost_pages_is_completed_and_says_what_is_missing(job, suite_table):
    """Reliability cases 16 and 17: the records behind the holes are stored, the holes are counted, nobody waits."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    process = job.start(*job.ranks(1, job.script(TRAIN)), DDPLOG_SEGMENT_BYTES=str(64 * 1024))
    wait_until(lambda: job.peek("key_0"))
    for pid in (job.agent_pid(), job.aggregator_pid()):
        os.kill(pid, signal.SIGSTOP)
    (job.folder / "alone").touch()
    job.end(process, code=128 + signal.SIGKILL)
    for pid in (job.agent_pid(), job.aggregator_pid()):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not job.agent_pid())
    (folder,) = job.spool.glob("*/0.*")
    assert len(segment.segment_numbers(str(folder))) > 5
    lost = tear(folder, random.Random(seed))
    assert lost
    job.run(*DDPLOG, "sync", "r1")

    with job.open() as run:
        steps = run.metric("key_0").step.tolist()
        values = run.metric("key_19").value.tolist()
        drops = {drop.reason: drop.count for drop in run.drops()}
        losses = [event.message for event in run.events() if event.kind == "loss"]
        (writer,) = run.writers()
    missing = 4000 - len(steps)
    assert values == [float(step) for step in steps]
    assert writer.num_values == len(steps) * KEYS
    declared = sum(int(message.partition(": ")[2].partition(" ")[0]) for message in losses)
    num_segments = len(segment.segment_numbers(str(folder)))
    assert drops == {"lost_records": declared}
    tail = 4000 - 1 - steps[-1]  # behind the last whole record nobody can know of any
    assert missing - tail <= declared <= missing - tail + num_segments, "each segment declares its keys once"
    assert len(steps) > 2000
    suite_table(
        "torn journals synced", jobs=1, pages=sum(map(len, lost.values())), declared_lost=declared, wrong=0, stuck=0
    )
    print(json.dumps({"steps": len(steps), "declared": declared, "tail": tail}))
