"""Every seq once, in order."""

from hypothesis import given
from hypothesis import strategies as st

from ddplog.core.dedup import Accept, Duplicate, Gap, admit


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=60))
def test_whatever_comes_every_seq_is_taken_once_in_order(batches):
    taken = []
    for first, count in batches:
        decision = admit(len(taken), first, count)
        if isinstance(decision, Accept):
            new = range(first + decision.skip, first + count)
            assert len(new) > 0
            taken.extend(new)
        elif isinstance(decision, Gap):
            assert first > len(taken)
            assert decision.next_seq == len(taken)
        else:
            assert isinstance(decision, Duplicate)
            assert first + count <= len(taken)

    assert taken == list(range(len(taken)))
