"""Step times, from frames in memory and through the rank log."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from view.run_maker import RunMaker

from ddplog.core.records import KIND_MESSAGE, NO_STEP, encode_message, encode_scalars
from ddplog.store.rank_log import RankLog
from ddplog.store.reader import open_run
from ddplog.store.step_times import collect_step_times


def entry(rank, samples, attempt=1, incarnation=None, num_values=2):
    frames = [
        encode_scalars(1, seq, step, int(time_s * 1e9), 1.0, (0.0,) * num_values, 7)
        for seq, (step, time_s) in enumerate(samples)
    ]
    identity = incarnation or bytes([attempt, rank]) * 8
    return SimpleNamespace(attempt=attempt, rank=rank, incarnation=identity, payload=b"".join(frames))


def test_a_step_time_is_the_time_between_first_records():
    found = collect_step_times(
        [entry(0, [(0, 10), (0, 10.9), (1, 11), (2, 13)]), entry(1, [(0, 10), (1, 10.5)]), entry(1, [(2, 12.5)])]
    )
    assert found.ranks.tolist() == [0, 1]
    assert found.steps.tolist() == [1, 2]
    np.testing.assert_allclose(found.seconds, [[1, 2], [0.5, 2]])


def test_it_is_divided_by_the_steps_between():
    found = collect_step_times([entry(3, [(0, 0), (50, 5), (100, 15)])])
    assert found.steps.tolist() == [50, 100]
    np.testing.assert_allclose(found.seconds, [[0.1, 0.2]])


def test_a_rank_without_a_step_has_nan():
    found = collect_step_times([entry(0, [(0, 0), (1, 1), (2, 2)]), entry(1, [(0, 0), (2, 2)])])
    assert np.isnan(found.seconds[1, 0])
    assert found.seconds[1, 1] == 1.0


def test_attempts_are_never_differenced_and_the_highest_wins():
    entries = [entry(0, [(0, 0), (1, 1), (2, 2)]), entry(0, [(1, 100), (2, 103), (3, 106)], attempt=2)]
    np.testing.assert_allclose(collect_step_times(entries).seconds, [[1, 3, 3]])
    np.testing.assert_allclose(collect_step_times(entries, attempt=1).seconds, [[1, 1]])


def test_records_without_a_step_and_messages_do_not_count():
    mixed = entry(0, [(0, 0), (NO_STEP, 0.5), (1, 1)])
    mixed.payload += encode_message(KIND_MESSAGE, 3, 2, 5, {"type": "text", "key": "k", "text": "t"}, 7)
    found = collect_step_times([mixed])
    assert found.steps.tolist() == [1]


def test_frames_of_different_lengths_are_found():
    """The vectorised path must not take a payload of mixed frames for one of equal ones."""
    mixed = entry(0, [(0, 0), (1, 1)])
    mixed.payload += entry(0, [(2, 3)], num_values=6).payload + entry(0, [(3, 4), (4, 5)]).payload
    found = collect_step_times([mixed])
    assert found.steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found.seconds, [[1, 2, 1, 1]])


@pytest.mark.parametrize(("first", "every"), [(0, 1), (1, 2), (5, 10), (7, 50)])
def test_a_long_run_is_thinned_and_keeps_its_mean(first, every):
    """Whatever steps a rank logs at, thinning leaves it a sample in every stretch."""
    samples = [(first + i * every, i * 0.25) for i in range(5000)]
    found = collect_step_times([entry(0, samples), entry(1, samples[3:])], max_samples=100)
    assert 40 <= len(found) <= 100
    assert found.seconds.shape == (2, len(found))
    np.testing.assert_allclose(found.seconds[np.isfinite(found.seconds)], 0.25 / every)


def test_nothing_gives_nothing():
    assert len(collect_step_times([])) == 0
    assert len(collect_step_times([entry(0, [(5, 1)])])) == 0


def test_the_run_reads_its_rank_log(tmp_path):
    maker = RunMaker(tmp_path / "r")
    log = RankLog(maker.folder / "ranks")
    for rank in (0, 1):
        one = entry(rank, [(step, step * (rank + 1)) for step in range(5)])
        log.append(
            writer_id=rank, attempt=1, rank=rank, incarnation=one.incarnation, first_seq=0, num_records=5,
            payload=one.payload,
        )  # fmt: skip
    log.sync()
    log.close()
    with open_run(maker.finish()) as run:
        np.testing.assert_allclose(run.rank_step_times().seconds, [[1] * 4, [2] * 4])


def test_a_rank_with_one_record_has_no_row():
    found = collect_step_times([entry(0, [(0, 0), (1, 1)]), entry(1, [(0, 0)])])
    assert found.ranks.tolist() == [0]
    assert np.isfinite(found.seconds).all()
