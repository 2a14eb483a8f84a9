from ddplog.core.awake import LONGEST_ROUND_NS, AwakeTime

SECOND = 1_000_000_000


def test_without_a_stall_it_is_monotonic_time():
    awake = AwakeTime(5 * SECOND)
    times = [5 * SECOND + step * LONGEST_ROUND_NS for step in range(10)]
    assert [awake.at(now) for now in times] == times


def test_a_stall_counts_as_the_longest_round_and_is_never_caught_up():
    awake = AwakeTime(0)
    assert awake.at(SECOND // 2) == SECOND // 2
    assert awake.at(SECOND // 2 + 60 * SECOND) == SECOND // 2 + LONGEST_ROUND_NS
    assert awake.at(61 * SECOND) == 2 * SECOND
    assert awake.at(61 * SECOND) == 2 * SECOND
