"""The aggregator's disk is lost: the journals of the living nodes are kept beyond the acknowledgement, and refill it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from system.jobs import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NUM_RANKS = 2
TRAIN = """
import os, time
from pathlib import Path
import ddplog

run = ddplog.init(sinks="jsonl")
rank = int(os.environ["RANK"])
run.log_text("who", f"rank {rank}")
step = 0
while not Path("stop").exists() or step < 500:
    run.log({"loss": 10.0 * step + rank}, step=step)
    step += 1
    time.sleep(0.002)
Path(f"steps.{rank}").write_text(str(step))
"""


def test_a_store_that_is_lost_is_refilled_from_the_journals(job, suite_table):
    """Reliability case 10: what was acknowledged is asked for again, by a store with another identity."""
    process = job.start(*job.ranks(NUM_RANKS, job.script(TRAIN)))
    wait_until(lambda: len(job.jsonl()) > 50 if (job.run_dir / "sinks" / "jsonl" / "r1.jsonl").exists() else False)
    lost = job.run_dir.rename(job.folder / "lost")
    os.kill(wait_until(job.aggregator_pid), signal.SIGKILL)
    known = len(Path(lost / "sinks" / "jsonl" / "r1.jsonl").read_bytes().splitlines())
    assert known > 50
    shutil.rmtree(lost)
    wait_until((job.run_dir / "run.db").exists)
    (job.folder / "stop").touch()
    job.end(process)

    lengths = [int((job.folder / f"steps.{rank}").read_text()) for rank in range(NUM_RANKS)]
    with job.open() as run:
        assert (run.status, run.detail, run.drops()) == ("finished", "", ())
        loss = run.metric("loss")
        assert loss.step.tolist() == list(range(max(lengths)))
        both = min(lengths)
        assert set(loss.n[:both].tolist()) == {NUM_RANKS}
        assert loss.value[:both].tolist() == [10.0 * step + 0.5 for step in range(both)]
        assert sorted(text.text for text in run.texts()) == ["rank 0", "rank 1"]
        points = len(loss)
    wait_until(lambda: len({line["step"] for line in job.jsonl()}) == points)
    assert len([line for line in job.jsonl() if line["revision"] == 0]) == points
    suite_table("lost stores refilled", stores=1, points=points, lost=0, doubled=0, wrong=0)
