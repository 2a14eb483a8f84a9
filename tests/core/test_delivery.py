"""Delivery loses nothing, keeps the order, and finds exactly the poisoned emissions, whatever the sink answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddplog.core.delivery import (
    BACKOFF_CAP_NS,
    RETRY_AFTER_CAP_NS,
    Backoff,
    Dead,
    Delivery,
    Idle,
    Limits,
    RunStatus,
    Send,
    Text,
    Wait,
)
from ddplog.errors import LocalProtocolError

S = 1_000_000_000


def texts(*ids):
    return [Text(id=i, attempt=0, rank=0, key="k", step=None, text="", time_unix_ns=0) for i in ids]


def ids(action):
    assert isinstance(action, Send), action
    return [e.id for e in action.batch]


class Answers:
    """A sink's world: what it has, and which answers it gives."""

    def __init__(self, poisoned, answers):
        self.poisoned, self.answers = poisoned, iter(answers)
        self.taken, self.dead, self.offered = [], [], []

    def drive(self, delivery, feed, now_ns=0):
        pending = list(feed)
        while True:
            before = delivery.cursor
            action = delivery.next_action(now_ns)
            if isinstance(action, Idle):
                if not pending:
                    return now_ns
                delivery.feed(pending.pop(0))
            elif isinstance(action, Wait):
                assert action.until_ns > now_ns
                now_ns = action.until_ns
            else:
                self._answer(delivery, action, now_ns)
                assert delivery.cursor >= before

    def _answer(self, delivery, action, now_ns):
        batch = ids(action)
        self.offered.append(batch)
        if next(self.answers, True):
            if self.poisoned & set(batch):
                dead = delivery.failed_permanent("poisoned")
                self.dead += [dead.emission.id] if dead else []
            else:
                self.taken += batch
                delivery.succeeded({"n": len(self.taken)})
        else:
            delivery.failed_retryable(now_ns, 0.5)


@given(
    data=st.data(),
    count=st.integers(0, 60),
    max_items=st.integers(1, 20),
    answers=st.lists(st.booleans(), max_size=60),
    rate=st.one_of(st.none(), st.floats(0.1, 1e6)),
)
def test_nothing_is_lost_and_exactly_the_poisoned_are_dead(data, count, max_items, answers, rate):
    gaps = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    every = [sum(gaps[: i + 1]) for i in range(count)]
    poisoned = set(data.draw(st.lists(st.sampled_from(every), max_size=5))) if every else set()
    parts, left = [], texts(*every)
    while left:
        size = data.draw(st.integers(1, len(left)))
        parts, left = [*parts, left[:size]], left[size:]
    world = Answers(poisoned, answers)
    delivery = Delivery(0, None, Limits(max_items=max_items, rate_per_s=rate))
    world.drive(delivery, parts)
    assert world.taken == [i for i in every if i not in poisoned]
    assert world.dead == [i for i in every if i in poisoned]
    assert delivery.cursor == (every[-1] if every else 0)
    assert delivery.num_dead == len(poisoned)
    assert delivery.num_queued == 0
    assert all(len(batch) <= max_items for batch in world.offered)


@given(answers=st.lists(st.booleans(), min_size=1, max_size=30), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_a_batch_is_sent_again_with_the_same_bounds_until_a_definite_answer(answers, sizes):
    """Also when more has been fed meanwhile: a tracker deduplicates whole requests."""
    delivery = Delivery(0, None, Limits(max_items=5))
    last, now_ns, unanswered = 0, 0, None
    for is_definite in answers:
        size = sizes[last % len(sizes)]
        delivery.feed(texts(*range(last + 1, last + size + 1)))
        last += size
        batch = ids(delivery.next_action(now_ns))
        assert unanswered in (None, batch)
        if is_definite:
            delivery.succeeded(None)
            unanswered = None
        else:
            now_ns = delivery.failed_retryable(now_ns, 1.0)
            unanswered = batch


def test_a_poisoned_batch_is_halved_down_to_the_single_one():
    """Reliability case 12: one record that the tracker never takes does not block the others for ever."""
    world = Answers({6}, [])
    world.drive(Delivery(0, None, Limits(max_items=8)), [texts(*range(1, 9))])
    assert world.offered == [[*range(1, 9)], [1, 2, 3, 4], [5, 6, 7, 8], [5, 6], [5], [6], [7, 8]]
    assert world.dead == [6]


def test_the_halves_stay_settled_through_an_outage():
    world = Answers({2}, [True, False, False, True])
    world.drive(Delivery(0, None, Limits(max_items=4)), [texts(1, 2, 3, 4)])
    assert world.offered == [[1, 2, 3, 4], [1, 2], [1, 2], [1, 2], [1], [2], [3, 4]]


def test_a_dead_emission_carries_the_reason_and_the_cursor_has_passed_it():
    delivery = Delivery(0, {"old": 1}, Limits())
    delivery.feed(texts(4))
    delivery.next_action(0)
    assert delivery.failed_permanent("no") == Dead(texts(4)[0], "no")
    assert (delivery.cursor, delivery.position) == (4, {"old": 1})


def test_cursor_and_position_move_only_with_an_answer():
    delivery = Delivery(7, {"n": 1}, Limits())
    delivery.feed(texts(8, 12))
    assert delivery.last_id == 12
    delivery.next_action(0)
    until_ns = delivery.failed_retryable(0, 1.0)
    assert (delivery.cursor, delivery.position) == (7, {"n": 1})
    assert ids(delivery.next_action(until_ns)) == [8, 12]
    delivery.succeeded({"n": 2})
    assert (delivery.cursor, delivery.position) == (12, {"n": 2})


def test_the_backoff_doubles_to_a_minute_and_never_gives_up():
    backoff = Backoff()
    waits = [backoff.failed(0, 1.0) / S for _ in range(200)]
    assert waits[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert set(waits[6:]) == {60}
    backoff.answered()
    assert backoff.failed(5, 1.0) == 5 + S


@given(failures=st.integers(0, 100), jitter=st.floats(0, 1))
def test_the_jitter_is_full(failures, jitter):
    """From zero on: clients that failed together come back spread out."""
    backoff = Backoff()
    backoff.num_failures = failures
    assert 0 <= backoff.failed(0, jitter) <= min(BACKOFF_CAP_NS, S * 2**failures)
    assert backoff.failed(0, 0.0) == 0


@pytest.mark.parametrize(
    ("wish_s", "wait_ns"),
    [(30.0, 30 * S), (7200.0, RETRY_AFTER_CAP_NS), (float("inf"), RETRY_AFTER_CAP_NS), (-5.0, 0), (0.0, 0)],
)
def test_the_trackers_own_wish_is_honoured_up_to_an_hour(wish_s, wait_ns):
    assert Backoff().failed(0, 0.0, wish_s) == wait_ns


def test_a_definite_answer_ends_the_backoff():
    delivery = Delivery(0, None, Limits(max_items=1))
    delivery.feed(texts(1, 2))
    delivery.next_action(0)
    until_ns = delivery.failed_retryable(0, 1.0, 10.0)
    assert delivery.next_action(until_ns - 1) == Wait(until_ns)
    assert ids(delivery.next_action(until_ns)) == [1]
    delivery.failed_permanent("no")
    assert ids(delivery.next_action(until_ns)) == [2]


@given(
    rate=st.floats(1, 1000),
    max_items=st.integers(1, 50),
    burst=st.integers(0, 100),
    pauses=st.lists(st.floats(0, 3), max_size=40),
)
def test_the_rate_is_never_exceeded(rate, max_items, burst, pauses):
    """In every window of any length: at most the burst and what the rate allows in it."""
    delivery = Delivery(0, None, Limits(max_items=max_items, rate_per_s=rate, burst_items=burst))
    delivery.feed(texts(*range(1, 5000)))
    now_ns, sent = 0, []
    for pause in pauses:
        now_ns += int(pause * S)
        action = delivery.next_action(now_ns)
        if isinstance(action, Wait):
            now_ns = action.until_ns
            action = delivery.next_action(now_ns)
        if isinstance(action, Idle):
            break
        sent.append((now_ns, len(action.batch)))
        delivery.succeeded(None)
    for i in range(len(sent)):
        for j in range(i, len(sent)):
            items = sum(size for _, size in sent[i : j + 1])
            window_s = (sent[j][0] - sent[i][0]) / S
            assert items <= max(burst, max_items) + window_s * rate + 1e-3


def test_sending_again_counts_against_the_rate():
    delivery = Delivery(0, None, Limits(max_items=10, rate_per_s=10.0))
    delivery.feed(texts(*range(1, 11)))
    delivery.next_action(0)
    delivery.failed_retryable(0, 0.0)
    assert delivery.next_action(0) == Wait(S)


def test_misuse_is_a_bug_and_says_so():
    delivery = Delivery(5, None, Limits())
    with pytest.raises(LocalProtocolError):
        delivery.feed(texts(5))
    with pytest.raises(LocalProtocolError):
        delivery.succeeded(None)
    delivery.feed(texts(6))
    delivery.next_action(0)
    with pytest.raises(LocalProtocolError):
        delivery.next_action(0)
    assert "in_flight=True" in repr(delivery)


@pytest.mark.parametrize("status", ["finished", "failed", "killed", "preempted", "unknown"])
def test_every_status_but_running_is_an_end(status):
    assert RunStatus(status=status).is_ended
    assert not RunStatus(status="running").is_ended
