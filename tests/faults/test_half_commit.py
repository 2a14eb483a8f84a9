"""A transaction of an aggregator that was killed inside COMMIT is there or it is not, and never comes back later.

SQLite writes a transaction into the WAL and then says so in the shared index. Killed between the two, it is seen by
nobody while any connection is left, and by everybody after the last one is gone, when the index is made again from the
WAL. The next aggregator cuts the rank log back to what it sees: what it does not see must not return.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from store.store_jobs import Feed, Rank

from ddplog.store.run_store import RunStore

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
LIFE = """
import os, sys
from pathlib import Path
from faults.test_half_commit import rank_of, RUN
from ddplog.store.emissions import EmissionReader
from ddplog.store.run_store import RunStore
from store.store_jobs import Feed, TIME_NS
what, run_dir = sys.argv[1], Path(sys.argv[2])
if what == "reader":
    held = EmissionReader(run_dir)
    print(held.last_id(), flush=True)
    sys.stdin.read()
store = RunStore(run_dir, RUN)
if what == "commit":
    header = 96  # both copies of the WAL index's header: https://sqlite.org/walformat.html, 2.1
    before = os.pread(os.open(run_dir / "run.db-shm", os.O_RDONLY), header, 0)
    rank = rank_of()
    feed = Feed(rank, restored=store.restore())
    feed.send(rank)
    store.commit(feed.effects(), lambda positions: None, TIME_NS)
    os.pwrite(os.open(run_dir / "run.db-shm", os.O_RDWR), before, 0)  # as if it had died before the index was changed
print(store.last_id, flush=True)
os.kill(os.getpid(), 9)
"""
RUN = {"run_id": "r1", "project": "p", "name": None, "tags": [], "config": {}, "created_unix_ns": 1, "sinks": []}


def rank_of():
    rank = Rank(0)
    for step in range(50):
        rank.log(step, x=float(step))
    return rank


def live(what, run_dir):
    """Start a life of the store in a process of its own."""
    words = (sys.executable, "-c", LIFE, what, str(run_dir))
    return subprocess.Popen(words, env=ENVIRON, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def die(process):
    """Let a life end as it does; return the last id it saw."""
    out, _ = process.communicate(timeout=30)
    assert process.returncode == -9
    return int(out)


def test_a_commit_that_was_killed_in_its_middle_never_comes_back_later(tmp_path):
    """Reliability case 11: the next life cuts the rank log back; with it, the records that the store had would be gone."""
    run_dir = tmp_path / "r1"
    assert die(live("open", run_dir)) == 0
    reader = live("reader", run_dir)
    assert int(reader.stdout.readline()) == 0
    assert die(live("commit", run_dir)) == 50
    assert die(live("open", run_dir)) == 0, "it is in the WAL, and the index does not say so"
    reader.kill()
    reader.communicate(timeout=30)

    store = RunStore(run_dir, RUN)
    stored = {writer.info.incarnation: writer.next_seq for writer in (store.restore().writers if store.last_id else ())}
    logged = {writer_id: first_seq for _, writer_id, first_seq, _ in store.entries()}
    assert (len(stored), len(logged)) in ((0, 0), (1, 1)), "the store says that it has records which are not there"
    rank = rank_of()
    feed = Feed(rank, restored=store.restore())
    feed.send(rank)
    store.commit(feed.effects(), lambda positions: None, 1)
    assert [first_seq for _, _, first_seq, _ in store.entries()] == [0]
    assert store.last_id == 50
    store.close()
