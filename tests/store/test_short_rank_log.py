"""A rank log that is shorter than the store says, or damaged: it is noticed, said, and filled again from the journals."""

import random
import shutil
import sqlite3
from collections import deque
from contextlib import closing

import pytest
from store.store_jobs import OPTIONS, TIME_NS, Rank

from ddplog.core.dedup import Gap
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import WORD, scan_payload
from ddplog.errors import ConfigError
from ddplog.store.rank_log import Position, RankLog, iter_entries, next_seqs, whole_end
from ddplog.store.run_store import RunStore

RUN = {"run_id": "r1", "project": "p", "name": None, "tags": [], "config": {}, "created_unix_ns": 1, "sinks": []}
HEADER = 56
SEEDS = 25


# -- where the whole entries end


def make_log(folder, count=9, file_bytes=3 * (HEADER + 16)):
    log = RankLog(folder, file_bytes=file_bytes)
    places = [log.end]
    for number in range(count):
        log.append(
            writer_id=number % 2, attempt=0, rank=0, incarnation=bytes(16), first_seq=number * 5, num_records=5,
            payload=bytes([number + 1]) * 16,
        )  # fmt: skip
        places.append(log.end)
    log.close()
    return places


def test_a_log_that_is_whole_ends_where_the_store_says(tmp_path):
    places = make_log(tmp_path)
    starts = [*places, Position(2, 0), Position(3, 0)]

    assert [whole_end(tmp_path, start, places[-1]) for start in starts] == [places[-1]] * len(starts)
    assert whole_end(tmp_path / "nowhere", Position(1, 0), Position(1, 0)) == Position(1, 0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_log_cut_anywhere_ends_with_its_last_whole_entry(tmp_path, number):
    """Whatever is behind the cut, in this file or a later one, is not what was logged there."""
    places = make_log(tmp_path)
    path = tmp_path / f"{number:06d}.log"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        if number < 3 and cut % (HEADER + 16) == 0:  # between two entries: only of the last file is the length known
            continue
        path.write_bytes(whole[:cut])
        wanted = max(place for place in [*places, Position(number, 0)] if place.file == number and place.offset <= cut)
        assert whole_end(tmp_path, Position(number, 0), places[-1]) == wanted
        for start in places[(number - 1) * 3 : number * 3]:  # of an entry that may itself be gone
            assert whole_end(tmp_path, start, places[-1]) == wanted
    path.write_bytes(whole)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        wanted = Position(number, at - at % (HEADER + 16))
        assert whole_end(tmp_path, Position(number, 0), places[-1]) == wanted


@pytest.mark.parametrize(
    ("gone", "from_1", "from_3"),
    [
        ((3,), Position(2, 216), Position(2, 216)),
        ((2,), Position(1, 216), Position(3, 216)),
        ((2, 3), Position(1, 216), Position(1, 216)),
        ((1, 2, 3), Position(1, 0), Position(3, 0)),
    ],
)
def test_a_log_without_some_of_its_files_ends_before_them(tmp_path, gone, from_1, from_3):
    places = make_log(tmp_path)
    for number in gone:
        (tmp_path / f"{number:06d}.log").unlink()

    assert whole_end(tmp_path, Position(1, 0), places[-1]) == from_1
    assert whole_end(tmp_path, Position(3, 72), places[-1]) == from_3


def test_the_seqs_that_are_left_are_known_per_writer(tmp_path):
    places = make_log(tmp_path)

    assert next_seqs(tmp_path, places[-1]) == {0: 45, 1: 40}
    assert next_seqs(tmp_path, places[3]) == {0: 15, 1: 10}
    assert next_seqs(tmp_path, Position(1, 0)) == {}


def test_a_file_of_a_newer_format_is_no_torn_tail(tmp_path):
    """It would be cut off, and with it what a newer ddplog has stored."""
    make_log(tmp_path / "ranks")
    path = tmp_path / "ranks" / "000003.log"
    newer = path.read_bytes().replace(b"1DLR", b"2DLR", 1)
    path.write_bytes(newer)
    for read in (lambda: RankLog(tmp_path / "ranks"), lambda: list(iter_entries(tmp_path / "ranks"))):
        with pytest.raises(ConfigError, match=r"000003\.log: format 2; this ddplog reads 1"):
            read()
    assert path.read_bytes() == newer


# -- the store


class Life:
    """An aggregator's life: its loop, as aggregator/process.py has it, without sockets."""

    def __init__(self, run_dir, now_ns):
        self.store = RunStore(run_dir, RUN)
        self.pipeline = Pipeline(OPTIONS, self.store.restore(), now_ns)
        self.positions = deque()
        for position, writer_id, first_seq, payload in self.store.entries(self.store.replay_from):
            self.positions.append((self.pipeline.num_entries, position))
            self.pipeline.replay(writer_id, first_seq, payload, now_ns)
        self.pipeline.end_replay()

    def send(self, rank, last, now_ns, oldest_seq=0, most=3):
        """As an agent does: from where the aggregator says, a few records at a time."""
        (writer,) = self.pipeline.hello([_info(rank, oldest_seq)], now_ns, TIME_NS)
        first = writer.next_seq
        while first < last:
            count = min(most, last - first)
            payload = b"".join(rank.records[first : first + count])
            outcome = self.pipeline.batch(rank.incarnation, first, count, payload, now_ns, TIME_NS)
            first = outcome.next_seq if isinstance(outcome, Gap) else first + count
            self.commit(now_ns)
        assert writer.next_seq == max(last, oldest_seq, first), (writer.next_seq, first, last)

    def end(self, rank, now_ns):
        self.pipeline.bye(rank.incarnation, len(rank.records), now_ns, TIME_NS)
        self.commit(now_ns)

    def commit(self, now_ns, *, at_once=False):
        pipeline = self.pipeline
        pipeline.tick(now_ns, TIME_NS)
        effects = pipeline.take()
        for stale in pipeline.take_stale(now_ns, at_once=at_once):
            entries = [row[1:] for row in self.store.entries()]
            entries += [(entry.writer_id, entry.first_seq, entry.payload) for entry in effects.log]
            emission = pipeline.derive(stale, entries)
            if emission is not None:
                effects.emissions.append((stale.attempt, emission))
        effects.unsettled = pipeline.unsettled
        base, kept = pipeline.num_entries - len(effects.log), []

        def locate(positions):
            new = [(base + index, position) for index, position in enumerate(positions)]
            needed = pipeline.oldest_entry_needed
            kept[:] = [place for place in (*self.positions, *new) if place[0] >= needed]
            return kept[0][1] if kept else None

        self.store.commit(effects, locate, TIME_NS)
        self.positions = deque(kept)

    def kill(self):
        self.store._db.close()  # without the store's own farewell
        self.store.rank_log.close()


def _info(rank, oldest_seq):
    info = rank.info
    return type(info)(**{name: getattr(info, name) for name in info.__slots__} | {"oldest_seq": oldest_seq})


def make_ranks(rng):
    a, b = Rank(0, 2), Rank(1, 2)
    for step in range(30):
        for rank in (a, b):
            rank.log(step, loss=step + rank.rank * 0.5, acc=1.0)
            if rng.random() < 0.2:
                rank.say(type="text", key="t", text=f"{rank.rank}:{step}", step=step)
            if rng.random() < 0.2:
                rank.log(max(0, step - 9), late=float(step))
    a.say(type="params", values={"lr": 1})
    b.say(type="alert", title="hot", text="", level="error")
    for rank in (a, b):
        rank.say(type="finish", status="finished", detail="")
    return a, b


def plan(rng, ranks):
    """How far each rank is sent, turn by turn."""
    sent, turns = [0, 0], []
    while any(sent[rank.rank] < len(rank.records) for rank in ranks):
        rank = rng.choice(ranks)
        sent[rank.rank] = min(len(rank.records), sent[rank.rank] + rng.randint(1, 12))
        turns.append((rank, sent[rank.rank]))
    return turns


def finish(life, ranks, now_ns):
    for rank in ranks:
        life.end(rank, now_ns)
    for _ in range(4):
        now_ns += 10 * OPTIONS.late_ns
        life.commit(now_ns, at_once=True)
    life.store.close()


def result(run_dir):
    """What a reader sees at the end, and what the rank log holds of each writer."""
    with closing(sqlite3.connect(run_dir / "run.db")) as db:
        points = db.execute(
            "SELECT name, step, value, n, min, max, mean, std FROM points JOIN keys USING (key_id) ORDER BY name, step"
        ).fetchall()
        texts = db.execute("SELECT rank, text FROM texts ORDER BY rank, id").fetchall()
        writers = db.execute("SELECT rank, next_seq, state, num_values FROM writers ORDER BY rank").fetchall()
        drops = db.execute("SELECT * FROM drops").fetchall()
        events = db.execute("SELECT kind FROM events WHERE kind NOT IN ('damage', 'define') ORDER BY kind").fetchall()
        params = db.execute("SELECT name, value FROM params").fetchall()
        refill = db.execute("SELECT value FROM meta WHERE key = 'refill'").fetchone()
    log = {}
    for entry in iter_entries(run_dir / "ranks"):
        for offset, length in scan_payload(entry.payload):
            (seq,) = WORD.unpack_from(entry.payload, offset + 8)
            log.setdefault(entry.writer_id, []).append((seq, entry.payload[offset : offset + length]))
    assert refill in (None, ("{}",))
    return points, texts, writers, drops, events, params, log


def damage_kinds(run_dir):
    with closing(sqlite3.connect(run_dir / "run.db")) as db:
        return db.execute("SELECT level, message FROM events WHERE kind = 'damage'").fetchall()


def damage(rng, folder, end, replay_from):
    """Cut the log, or spoil it, or take a file away, behind where a restart begins to read; return whether it shows.

    Never exactly between two entries of a file that another one follows: nobody can see that, and points that are derived
    again from it lack what is gone. A file that is complete was synced, and does not shrink.
    """
    before = [entry.position for entry in iter_entries(folder, replay_from, end)]
    what = rng.choice(("cut", "cut", "zeros", "flip", "gone"))
    number = rng.randint(replay_from.file, end.file)
    path = folder / f"{number:06d}.log"
    data = path.read_bytes()
    low = replay_from.offset if number == replay_from.file else 0
    at = rng.randrange(low, len(data)) if low < len(data) else len(data)
    if Position(number, at) in before and number < end.file:
        at += 1
    if what == "gone":
        path.unlink()
    elif what == "cut":
        path.write_bytes(data[:at])
    elif what == "zeros":
        path.write_bytes(data[:at] + bytes(len(data) - at))
    elif at < len(data):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    after = [entry.position for entry in iter_entries(folder, replay_from, end)]
    return before != after


def test_what_a_short_log_has_lost_is_asked_for_again_and_nothing_counts_twice(tmp_path, monkeypatch, suite_table):
    """Reliability cases 10 and 16: SQLite's transaction is durable, and the log it points into is not what was synced."""
    monkeypatch.setattr(RankLog.__init__, "__defaults__", (None, 4000))
    damaged = 0
    first = random.SystemRandom().randrange(1 << 32)
    print(f"seeds from {first}")
    for seed in range(first, first + SEEDS):
        rng = random.Random(seed)
        ranks = make_ranks(rng)
        turns = plan(rng, ranks)
        now, run_dir, other = 0, tmp_path / f"{seed}" / "r1", tmp_path / f"{seed}" / "undisturbed"
        life = Life(other, 0)
        for rank, last in turns:
            life.send(rank, last, now := now + 50)
        finish(life, ranks, now)

        now, life = 0, Life(run_dir, 0)
        cuts = {rng.randrange(3, len(turns)) for _ in range(2)}
        for number, (rank, last) in enumerate(turns):
            if number in cuts:
                where = run_dir / "ranks", life.store.rank_log.end, life.store._places()["replay_from"]
                life.kill()
                before = len(damage_kinds(run_dir))
                shows = damage(rng, *where)
                life = Life(run_dir, now)
                found = damage_kinds(run_dir)[before:]
                damaged += len(found)
                assert found or not shows, f"seed {seed}: not noticed"
            life.send(rank, last, now := now + 50)
        for rank in ranks:  # the agents' second look: whoever was asked to go back has gone back
            life.send(rank, len(rank.records), now := now + 50)
        finish(life, ranks, now)
        assert result(run_dir) == result(other), f"seed {seed}"
        shutil.rmtree(run_dir.parent)
    print(damaged, "damaged logs")
    assert damaged > SEEDS
    suite_table("rank logs cut or damaged", logs=damaged, lost=0, doubled=0, wrong=0)


def test_what_no_journal_has_any_more_is_not_lost_a_second_time(tmp_path):
    """Its points are stored; only what is derived later goes without."""
    rank = Rank(0)
    for step in range(20):
        rank.log(step, x=step)
    life = Life(tmp_path / "r1", 0)
    life.send(rank, 15, 50)
    life.kill()
    (tmp_path / "r1" / "ranks" / "000001.log").write_bytes(b"")
    life = Life(tmp_path / "r1", 100)
    life.send(rank, len(rank.records), 150, oldest_seq=9)
    finish(life, [rank], 200)

    with closing(sqlite3.connect(tmp_path / "r1" / "run.db")) as db:
        assert db.execute("SELECT * FROM drops").fetchall() == []
        assert db.execute("SELECT kind FROM events WHERE kind = 'loss'").fetchall() == []
        assert db.execute("SELECT num_values, next_seq FROM writers").fetchall() == [(20, 21)]
        steps = [step for (step,) in db.execute("SELECT step FROM points ORDER BY step")]
    assert set(steps) >= set(range(8, 20))
    ((level, message),) = damage_kinds(tmp_path / "r1")
    assert level == "error"
    assert "ends at byte 0 of file 1" in message
