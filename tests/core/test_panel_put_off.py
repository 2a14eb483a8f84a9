"""Records put off and added together give what records added one by one give, to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.core.batches import Rows, join, single
from ddplog.core.panel import Panel, RankStates
from ddplog.core.records import KIND_SCHEMA, NO_STEP, encode_message, encode_scalars

WORLD, KEYS = 3, 2
REDUCTIONS = ("mean", "sum")

records = st.lists(
    st.tuples(
        st.integers(0, WORLD - 1),
        st.integers(0, 5),
        st.sampled_from([0.1, 1e16, -1e16, 3.0, float("nan"), float("inf")]),
        st.sampled_from([1.0, 0.0, 32.0]),
        st.booleans(),
    ),
    max_size=40,
)


def make_panel(**options):
    return Panel(range(1, KEYS + 1), REDUCTIONS, [False] * KEYS, world_size=WORLD, settle_ns=0, late_ns=0, **options)


def encode(seq, step, value, weight=1.0):
    return encode_scalars(1, seq, step, 1000 + seq, weight, [value, value / 3], 5)


def states():
    return RankStates(
        progress=np.full(WORLD, 10),
        ended=np.zeros(WORLD, np.bool_),
        finished=np.zeros(WORLD, np.bool_),
        silent=np.zeros(WORLD, np.bool_),
    )


def outcome(panel):
    emission = panel.close_ready(NO_STEP, states(), 0, at_once=True)
    if emission is None:
        return None
    block = emission.block
    arrays = (emission.steps, emission.value, emission.expected, emission.nan_count, emission.inf_count,
              emission.bad_rank, emission.time_unix_ns, block.mean, block.std, block.min, block.max, block.min_rank,
              block.max_rank, block.n)  # fmt: skip
    return [array.tobytes() for array in arrays]


@settings(deadline=None)
@given(records)
def test_put_off_is_add(taken):
    one_by_one, together = make_panel(), make_panel()
    for seq, (rank, step, value, weight, is_end) in enumerate(taken):
        payload = encode(seq, step, value, weight)
        one_by_one.add(rank, join([payload]), None, NO_STEP, 7, seq)
        together.put_off(rank, payload, NO_STEP, 7, seq)
        if is_end:
            together.flush()
    together.flush()

    assert together.num_open == one_by_one.num_open
    assert together.oldest_open == one_by_one.oldest_open
    assert outcome(together) == outcome(one_by_one)


def test_a_block_behind_what_was_put_off_comes_after_it():
    """Each rank's values fold in the order of seq."""
    panel = make_panel()
    panel.reductions[0] = "last"
    panel.put_off(0, encode(0, 4, 1.0), NO_STEP, 7, 0)
    panel.add(0, join([encode(1, 4, 2.0), encode(2, 5, 9.0)]), None, NO_STEP, 7, 1)

    emission = panel.close_ready(NO_STEP, states(), 0, at_once=True)
    assert emission.value[:, 0].tolist() == [2.0, 9.0]


def test_a_step_whose_window_is_gone_becomes_stale():
    panel = make_panel(emitted_to=3)
    panel.put_off(0, encode(0, 3, 1.0), NO_STEP, 7, 0)
    panel.put_off(0, encode(1, 4, 1.0), NO_STEP, 8, 1)
    panel.flush()

    assert (panel.stale_steps, panel.num_open, panel.oldest_open) == ({3}, 1, 1)


def test_a_rank_that_left_comes_back_with_its_value():
    panel = make_panel()
    for step in range(4):
        panel.put_off(0, encode(step, step, 1.0), NO_STEP, 7, step)
        panel.close_ready(NO_STEP, states(), 7, at_once=True)
    assert not panel.expected[1].any()
    panel.put_off(1, encode(0, 4, 1.0), NO_STEP, 7, 4)
    panel.flush()

    assert panel.expected[1].all()
    assert not panel.expected[2].any()


def test_many_windows_reduce_as_one_by_one(monkeypatch):
    """A point must not depend on which others are reduced with it."""
    values = np.random.default_rng(0).standard_normal((WORLD, 50, KEYS)) * 10.0 ** np.arange(-8, 17).repeat(2)[:, None]
    found = []
    for cells in (1, 40, 1 << 20):
        monkeypatch.setattr("ddplog.core.panel._CHUNK_CELLS", cells)
        panel = make_panel()
        for rank in range(WORLD):
            rows = Rows(
                schema_id=1, steps=np.arange(50), times=np.arange(50), weights=np.full(50, 3.0), values=values[rank]
            )
            panel.add(rank, rows, None, NO_STEP, 7)
        found.append(outcome(panel))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        encode(0, 0, 1.0)[:-8],
        encode(0, 0, 1.0) + encode(1, 1, 1.0),
        encode_message(KIND_SCHEMA, 0, NO_STEP, 0, {"id": 1, "keys": ["a"]}, 5),
        encode(0, 0, 1.0)[:20] + b"\x05\0\0\0" + encode(0, 0, 1.0)[24:],
    ],
)
def test_what_is_no_single_scalar_record_is_not_taken_for_one(payload):
    assert single(payload) is None


def test_a_single_record_is_known_by_its_prefix():
    assert single(encode(3, 8, 1.0)) == (3, 1, KEYS, 8)
