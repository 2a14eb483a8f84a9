"""A power cut of the aggregator's node: what the store's transaction points to is in the rank log, byte for byte.

The rank log writes real files over the model of a disk; SQLite's FULL is trusted, so a commit is the position that the
last transaction noted. A restart opens what the disk has with that position.
"""

import random
import shutil
from collections import Counter

import pytest
from faults.disk_model import Disk

from ddplog.store.rank_log import Position, RankLog, iter_entries, whole_end

TRIALS = 1000
NIGHTLY_TRIALS = 100_000


class Trial:
    """The life of a rank log, as RunStore.commit() leads it."""

    def __init__(self, seed, root):
        self.rng = random.Random(seed)
        self.root = root
        self.folder = root / "ranks"
        self.disk = Disk(self.rng, root, self.folder, has_garbage=self.rng.random() < 0.5)
        self.log = None
        self.written = []
        """Entries in the log; the first num_stored of them are acknowledged."""
        self.num_stored = 0
        self.end = Position(1, 0)
        self.next_seq = 0
        self.fails = self.rng.random() < 0.5

    def live(self):
        self.log = self._open()
        for _ in range(self.rng.randint(1, 12)):
            self._commit()
            if self.rng.random() < 0.3:
                self.disk.write_back()
            if self.rng.random() < 0.1:  # killed, and started again
                self.log.close()
                self.log = self._open()
        if self.rng.random() < 0.7:  # the power goes amid a commit
            self.log.extend(self._entries())
            if self.rng.random() < 0.5:
                self.disk.write_back()

    def _open(self):
        return RankLog(self.folder, self.end, file_bytes=self.rng.choice((3000, 10_000, 50_000)))

    def _entries(self):
        rng = self.rng
        entries = []
        for _ in range(rng.randint(1, 6)):
            count = rng.randint(1, 9)
            payload = rng.randbytes(rng.choice((48, 500, 5000)) * count // 8 * 8)
            entries.append((rng.randint(1, 3), 0, 0, bytes([rng.randint(0, 9)]) * 16, self.next_seq, count, payload))
            self.next_seq += count
        return entries

    def _commit(self):
        entries, before = self._entries(), self.log.end
        while True:
            if self.fails and self.rng.random() < 0.4:
                self.disk.fail_in = self.rng.randint(0, 2)
            try:
                self.log.extend(entries)
                self.log.sync()
            except OSError:
                self.log.rewind(before)
            else:
                break
        self.disk.fail_in = None
        self.written += entries
        if self.rng.random() < 0.9:  # else it dies before the transaction, and begins again where that one points
            self.num_stored, self.end = len(self.written), self.log.end
        else:
            del self.written[self.num_stored :]
            self.log.close()
            self.log = self._open()

    def cut(self):
        after = self.root / "after"
        self.disk.cut(self.folder, after)
        return after

    def check(self, after):
        wanted = self.written[: self.num_stored]
        assert whole_end(after, Position(1, 0), self.end) == self.end
        log = RankLog(after, self.end)
        assert _read(after) == wanted
        more = self._entries()
        log.extend(more)
        log.close()
        assert _read(after) == wanted + more


def _read(folder):
    return [
        (e.writer_id, e.attempt, e.rank, e.incarnation, e.first_seq, e.num_records, e.payload)
        for e in iter_entries(folder)
    ]


def run(seed, root):
    root.mkdir()
    trial = Trial(seed, root)
    try:
        with trial.disk.watching():
            trial.live()
        trial.check(trial.cut())
        trial.log.close()
    except BaseException as exc:
        exc.add_note(f"seed {seed}")
        raise
    finally:
        trial.disk.close()
        shutil.rmtree(root)
    return Counter(trials=1, entries=trial.num_stored, failed_syncs=trial.disk.num_failed)


def run_many(trials, folder, suite_table):
    first = random.SystemRandom().randrange(1 << 32)
    print(f"seeds from {first}")
    counts = Counter()
    for seed in range(first, first + trials):
        counts += run(seed, folder / str(seed))
    print(dict(counts))
    assert counts["failed_syncs"] > trials // 10
    suite_table("power cuts: rank log", **counts, lost=0, doubled=0, wrong=0)


def test_a_power_cut_leaves_every_entry_that_a_transaction_points_to(shm_path, suite_table):
    """Reliability case 16."""
    run_many(TRIALS, shm_path, suite_table)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_many_power_cuts_leave_every_entry_that_a_transaction_points_to(shm_path, suite_table):
    """Reliability case 16."""
    run_many(NIGHTLY_TRIALS, shm_path, suite_table)


@pytest.mark.parametrize(
    "bug", ["the folder is not synced", "a failed sync is asked again", "full files are not synced"]
)
def test_a_planted_bug_is_caught(bug, shm_path, monkeypatch, suite_table):
    """Reliability case 16."""
    if bug == "the folder is not synced":
        monkeypatch.setattr("ddplog.store.rank_log.sync_folder", lambda folder: None)
    elif bug == "a failed sync is asked again":
        real = RankLog.sync

        def sync(self):
            try:
                real(self)
            except OSError:
                real(self)

        monkeypatch.setattr(RankLog, "sync", sync)
    else:
        real_sync = RankLog.sync

        def sync_the_last(self):
            self._rolled.clear()
            real_sync(self)

        monkeypatch.setattr(RankLog, "sync", sync_the_last)
    for seed in range(300):
        try:
            run(seed, shm_path / str(seed))
        except AssertionError:
            break
    else:
        pytest.fail("300 trials do not see it")
    suite_table("power cuts: planted bugs", bugs=1, caught=1)
