"""A tracker that takes a request and says nothing for a long time: its forwarder waits, and nothing else does.

What could go wrong: the store's WAL grows without bound because a reader sits in a statement; the other sink or the
ranks are held up; what was under way when the tracker came back is lost or doubled.
"""

import json
import time

import pytest
from faults.grid_job import Grid
from faults.http_tracker import Project, Tracker, install_plugin
from faults.test_forwarder_kills import check_rows
from system.jobs import SOURCE, wait_until

from ddplog.sinks import parse_spec

pytestmark = pytest.mark.system

HANG_S = 8
NIGHTLY_HANG_S = 60
NUM_RANKS, NUM_KEYS = 2, 50
MAX_WAL_BYTES = 32 * 1024 * 1024
"""The aggregator checkpoints at every commit that leaves 4,000 pages (16 MiB) or more in the WAL; the next one begins at
its start again if no reader is inside. Readers are inside for a page's time (20 ms): as much again for their sake."""


def read_cursor(folder):
    try:
        return json.loads((folder / "cursor.json").read_text())["cursor"]
    except FileNotFoundError:
        return 0


def watch(job, is_over, hang_s):
    """Look at the WAL for so long, and until it is over; return its largest size."""
    largest, until, deadline = 0, time.monotonic() + hang_s, time.monotonic() + hang_s + 120
    while time.monotonic() < until or not is_over():
        assert time.monotonic() < deadline, "the other sink does not go on"
        largest = max(largest, (job.run_dir / "run.db-wal").stat().st_size)
        time.sleep(0.02)
    return largest


def hang(job, hang_s, steps):
    project = Project(is_keyed=True)
    with Tracker({"hangs": project}).serving() as address:
        spec = f"tracker://{address}/hangs"
        grid = Grid(job, ranks=NUM_RANKS, steps=steps, families=[list(range(NUM_KEYS))])
        job.environ |= {"PYTHONPATH": f"{SOURCE}:{install_plugin(job.folder)}", "TRACKER_TIMEOUT_S": "600"}
        process = grid.start(DDPLOG_SINKS=f"jsonl,{spec}")
        folder, other = (job.run_dir / "sinks" / parse_spec(name).folder_name for name in (spec, "jsonl"))
        try:
            grid.allow(0.1 * steps)
            wait_until(lambda: read_cursor(folder), 60)
            project.is_hanging.set()
            wait_until(lambda: project.seen["hung"], 60)
            grid.allow(0.95 * steps)  # the run does not end while it is looked at
            cursor = read_cursor(folder)
            largest = watch(job, lambda: read_cursor(other) >= 0.9 * grid.points, hang_s)
            print(f"WAL at most {largest:,} bytes, store {(job.run_dir / 'run.db').stat().st_size:,}")
            assert largest <= MAX_WAL_BYTES
            assert read_cursor(folder) == cursor, "it did not hang"
            assert project.seen["hung"] == 1, "it is asked once"
            project.is_hanging.clear()
            project.was_released.set()
            grid.allow(steps)
            job.end(process, timeout_s=300)
            grid.check_store(300)
        except BaseException:
            print(job.logs())
            raise
    grid.check_jsonl()
    check_rows(grid, project.table.values())
    assert project.seen["wrong"] == 0
    return {"hung_s": hang_s, "points": 2 * grid.points}


@pytest.mark.timeout(400)
def test_a_sink_that_hangs_for_8_s_delays_nobody_and_gets_everything(job, suite_table):
    """Reliability cases 13 and 22: a process and a cursor of its own, and no statement open while it waits."""
    suite_table("a sink that hangs", **hang(job, HANG_S, 5_000), lost=0, doubled=0, wrong=0)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_sink_that_hangs_for_60_s_delays_nobody_and_gets_everything(job, suite_table):
    suite_table("a sink that hangs", **hang(job, NIGHTLY_HANG_S, 40_000), lost=0, doubled=0, wrong=0)
