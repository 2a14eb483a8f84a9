"""The rank log: what was appended is read back, and a full disk leaves it as it was."""

import os

import pytest

from ddplog.store.rank_log import Position, RankLog, file_numbers, iter_entries


def entry(number, size=80):
    return (number, 0, number % 4, bytes([number % 256]) * 16, number * 10, 10, bytes([number % 251]) * size)


def read(folder):
    return [
        (e.writer_id, e.attempt, e.rank, e.incarnation, e.first_seq, e.num_records, e.payload)
        for e in iter_entries(folder)
    ]


def test_entries_are_read_back_with_their_positions(tmp_path):
    """More than one writev() takes, over several files."""
    log = RankLog(tmp_path / "ranks", file_bytes=40_000)
    entries = [entry(number) for number in range(900)]
    positions = log.extend(entries[:700]) + log.extend(entries[700:])
    log.close()

    assert read(tmp_path / "ranks") == entries
    assert [e.position for e in iter_entries(tmp_path / "ranks")] == positions
    assert file_numbers(tmp_path / "ranks") == [1, 2, 3, 4]
    assert next(iter_entries(tmp_path / "ranks", positions[650])).first_seq == 6500


def test_nothing_to_append_appends_nothing(tmp_path):
    log = RankLog(tmp_path / "ranks")
    assert log.extend([]) == []
    assert log.end == Position(1, 0)


def test_one_entry_is_as_many(tmp_path):
    log = RankLog(tmp_path / "ranks")
    writer_id, attempt, rank, incarnation, first_seq, count, payload = entry(1)
    log.append(
        writer_id=writer_id, attempt=attempt, rank=rank, incarnation=incarnation, first_seq=first_seq,
        num_records=count, payload=payload,
    )  # fmt: skip
    log.close()

    assert read(tmp_path / "ranks") == [entry(1)]


@pytest.mark.parametrize("how", ["raises", "writes less"])
def test_a_full_disk_takes_nothing_back_to_the_beginning_of_the_call(tmp_path, monkeypatch, how):
    log = RankLog(tmp_path / "ranks", file_bytes=40_000)
    log.extend([entry(0)])
    end, writev, calls = log.end, os.writev, []

    def fill(descriptor, buffers):
        calls.append(len(buffers))
        if len(calls) < 3:
            return writev(descriptor, buffers)
        if how == "raises":
            raise OSError(28, "no space left on device")
        return writev(descriptor, buffers[:1])

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", fill)
        with pytest.raises(OSError, match=r"disk|space"):
            log.extend(entry(number) for number in range(1, 900))
    assert log.end == end
    assert read(tmp_path / "ranks") == [entry(0)]

    log.extend([entry(1)])
    log.sync()
    assert read(tmp_path / "ranks") == [entry(0), entry(1)]


def test_a_file_that_cannot_be_made_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = RankLog(tmp_path / "ranks", file_bytes=200)
    log.extend([entry(0)])
    with monkeypatch.context() as patch:
        patch.setattr(log, "_open", lambda: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(OSError, match="no space"):
            log.extend([entry(1), entry(2)])
    log.extend([entry(1)])
    log.close()

    assert read(tmp_path / "ranks") == [entry(0), entry(1)]
