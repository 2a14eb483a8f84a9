"""How far the ranks are, and who is waited for."""

from ddplog.core.watermark import EVERYTHING, NOTHING_YET, Watermark


def test_a_declared_rank_that_has_shown_no_step_holds_everything():
    """Else step 0 would look complete with the first rank's value."""
    mark = Watermark(3, grace_ns=10, now_ns=0)
    mark.advance(0, 100, now_ns=1)
    mark.advance(1, 100, now_ns=1)

    assert mark.value(now_ns=1) == NOTHING_YET


def test_the_watermark_is_below_the_slowest_rank():
    mark = Watermark(2, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=1)
    mark.advance(1, 5, now_ns=1)

    assert mark.value(now_ns=1) == 4


def test_an_earlier_step_is_no_progress():
    mark = Watermark(1, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=1)
    mark.advance(0, 3, now_ns=9)

    assert mark.value(now_ns=9) == 6
    assert mark.moved_ns[0] == 1


def test_a_rank_is_waited_for_until_its_grace_is_over_and_again_when_it_moves():
    mark = Watermark(2, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=20)
    mark.advance(1, 5, now_ns=5)

    assert mark.value(now_ns=15) == 4
    assert mark.value(now_ns=16) == 6
    mark.advance(1, 6, now_ns=16)
    assert mark.value(now_ns=16) == 5


def test_only_a_rank_that_never_showed_a_step_becomes_silent():
    mark = Watermark(2, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=1)

    assert mark.silent(now_ns=10).tolist() == [False, False]
    assert mark.silent(now_ns=1000).tolist() == [False, True]


def test_when_all_have_ended_everything_is_over():
    mark = Watermark(2, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=1)
    mark.end(0)
    mark.end(1)

    assert mark.value(now_ns=1) == EVERYTHING


def test_a_rank_that_joins_again_is_waited_for():
    mark = Watermark(1, grace_ns=10, now_ns=0)
    mark.advance(0, 7, now_ns=1)
    mark.end(0)
    mark.join(0, now_ns=50)

    assert mark.value(now_ns=55) == 6
    assert repr(mark) == "<Watermark ranks=1 shown=1 ended=0 steps=7..7>"


def test_its_repr_says_when_no_rank_has_shown_a_step():
    assert repr(Watermark(2, 1, 0)) == "<Watermark ranks=2 shown=0 ended=0 steps=none>"
