"""kill -9 of a writer at any instruction: what log() returned for is in the journal, and nothing else is.

The child says what was accepted through a shared page, in memory that outlives it: it counts up after each log(). At
most the one record whose log() had not returned may follow, and then it is whole.
"""

import gc
import mmap
import os
import random
import select
import signal
import struct
import time
from collections import Counter

import pytest

from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, decode, scan_payload
from ddplog.journal.reader import JournalReader
from ddplog.journal.writer import JournalWriter

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

KILLS = 200
NIGHTLY_KILLS = 5000
LONGEST_S = 0.03
ACCEPTED = struct.Struct("<q")


def keys_of(index):
    """A few sets of names, so that schemas are declared in the midst; every 50th record declares another."""
    if index % 50 == 49:
        return tuple(f"rare_{index}_{i}" for i in range(3))
    return tuple(f"key_{i}" for i in range(1 + index % 7 * 5))


def value_of(writer, index, place):
    return float(writer * 1_000_003 + index * 257 + place)


def write_for_ever(folder, writer, accepted, ready):
    journal = JournalWriter(
        folder,
        writer.to_bytes(16, "little"),
        {"rank": writer, "world_size": 1},
        segment_bytes=64 * 1024,
        spool_bytes=1 << 30,
        check=lambda: None,
    )
    os.write(ready, b"x")
    index = 0
    while True:
        if index % 97 == 96:
            journal.enter()
            journal.append_message({"type": "text", "text": f"{writer}:{index}:" + "x" * (index % 3000)}, index)
            journal.leave()
        else:
            keys = keys_of(index)
            values = [value_of(writer, index, place) for place in range(len(keys))]
            if not journal.log_floats(dict(zip(keys, values, strict=True)), index, 2.0):
                journal.enter()
                journal.append_scalars(keys, values, index, 2.0)
                journal.leave()
        index += 1
        accepted[:8] = ACCEPTED.pack(index)  # at once: pack_into() writes byte by byte, and zeros before


def kill_one(folder, writer, delay_s):
    """Fork a writer, kill it after so long; return how many of its calls had returned."""
    accepted = mmap.mmap(-1, mmap.PAGESIZE)
    ready, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready)
            write_for_ever(folder, writer, accepted, end)
        finally:
            os._exit(1)
    os.close(end)
    try:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        assert poll.poll(30_000)
        assert os.read(ready, 1) == b"x", "the writer failed"
        time.sleep(delay_s)  # the random moment of the kill
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer ended by itself"
        return ACCEPTED.unpack_from(accepted, 0)[0]
    finally:
        os.close(ready)
        accepted.close()


def read_back(folder, writer, max_bytes):
    """Return the steps that the journal holds, in order, after a look at every record."""
    reader = JournalReader(folder)
    schemas, steps, seq = {}, [], 0
    try:
        assert not reader.is_alive
        while (chunk := reader.read(max_bytes)) is not None:
            assert chunk.first_seq == seq
            for offset, _ in scan_payload(chunk.payload):
                record = decode(chunk.payload, offset)
                assert record.seq == seq
                seq += 1
                if record.kind == KIND_SCHEMA:
                    schemas[record.message["id"]] = tuple(record.message["keys"])
                    continue
                steps.append(record.step)
                if record.kind == KIND_SCALARS:
                    keys = schemas[record.schema_id]
                    assert keys == keys_of(record.step)
                    assert list(record.values) == [value_of(writer, record.step, i) for i in range(len(keys))]
                    assert record.weight == 2.0
                else:
                    assert record.kind == KIND_MESSAGE
                    text = f"{writer}:{record.step}:" + "x" * (record.step % 3000)
                    assert record.message == {"type": "text", "text": text}
        assert reader.next_seq == seq
    finally:
        reader.close()
    return steps


def kill_writers(tmp_path, kills):
    chance = random.Random()
    seed = chance.getrandbits(32)
    chance.seed(seed)
    seen = Counter()
    for writer in range(kills):
        folder = tmp_path / f"{writer}.x"
        accepted = kill_one(folder, writer, chance.random() ** 2 * LONGEST_S)
        steps = read_back(folder, writer, chance.choice((1, 5000, 1 << 20)))
        assert steps[:accepted] == list(range(accepted)), f"seed {seed}, writer {writer}: lost or doubled"
        assert steps[accepted:] in ([], [accepted]), f"seed {seed}, writer {writer}: never logged"
        seen["kills"] += 1
        seen["records"] += accepted
        seen["whole, not yet returned"] += len(steps) - accepted
        seen["in the midst of a roll"] += any(folder.glob("*.new"))
        seen["segments"] += len(list(folder.glob("*.seg")))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    print(dict(seen), "lost 0, doubled 0, wrong 0")
    return seen


@pytest.fixture
def _quiet_fork():
    """Children inherit a heap that the collector leaves alone: none of it is copied 200 times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_quiet_fork")
def test_200_writers_killed_at_any_moment_lose_nothing_they_accepted(tmp_path, suite_table):
    """Reliability's I1: what was accepted is in the journal after SIGKILL; no torn record is ever read."""
    seen = kill_writers(tmp_path, KILLS)
    assert seen["kills"] == KILLS
    assert seen["records"] > 5 * KILLS
    assert seen["segments"] > KILLS
    suite_table("kill -9 of a writer", kills=seen["kills"], records=seen["records"], lost=0, doubled=0, wrong=0)


def test_a_step_is_never_seen_half_written(tmp_path):
    """The other side reads the head page at any moment: a 0 between two steps below it would let others pass ahead."""
    ready, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            journal = JournalWriter(
                tmp_path / "0.x", bytes(16), {}, segment_bytes=64 * 1024, spool_bytes=1 << 30, check=lambda: None
            )
            journal.set_step(-1)
            os.write(end, b"x")
            while True:
                journal.set_step(-300)
                journal.set_step(-1)
        finally:
            os._exit(1)
    os.close(end)
    try:
        assert os.read(ready, 1) == b"x"
        reader = JournalReader(tmp_path / "0.x")
        seen = Counter(reader.step for _ in range(200_000))
        reader.close()
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert seen.keys() <= {-1, -300}


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("_quiet_fork")
def test_5000_writers_killed_at_any_moment_lose_nothing_they_accepted(tmp_path, suite_table):
    seen = kill_writers(tmp_path, NIGHTLY_KILLS)
    suite_table("kill -9 of a writer", kills=seen["kills"], records=seen["records"], lost=0, doubled=0, wrong=0)
