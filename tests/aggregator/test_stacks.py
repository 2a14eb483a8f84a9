"""Who asked for which ranks' stacks gets them, or learns in time why not; nobody gets more than a bounded number."""

import threading

from core.test_pipeline import Harness, Rank

from ddplog.aggregator.stacks import MAX_RANKS, StackDesk, requests
from ddplog.v1.control_pb2 import StacksRequest
from ddplog.wire import codec

S = 1_000_000_000


class Caller:
    """A client's call, which waits in a thread of its own as gRPC's do."""

    def __init__(self, desk, *ranks, wait_s=5.0):
        self.reply = None
        self._thread = threading.Thread(target=self._ask, args=(desk, StacksRequest(ranks=ranks, wait_s=wait_s)))
        self._thread.start()
        while desk._queue.empty():
            pass

    def _ask(self, desk, request):
        self.reply = desk.collect(request)

    def done(self):
        self._thread.join()
        return [(stack.rank, stack.text, stack.trouble) for stack in self.reply.stacks]


def make(world=3):
    ranks = [Rank(rank, world, node=str(rank % 2)) for rank in range(world)]
    h = Harness(*ranks)
    for rank in ranks:
        h.send(rank.log(5 if rank.rank else 4, x=1.0))
    return h.pipeline, ranks, h, StackDesk()


def test_every_living_rank_is_asked_and_the_answers_come_together():
    pipeline, ranks, h, desk = make()
    h.end(ranks[2])
    caller = Caller(desk)
    assert desk.hear(pipeline, 0) == [ranks[0].incarnation, ranks[1].incarnation], "the one behind first"
    desk.answered(ranks[1].incarnation, "at b", "", pipeline, 0)
    desk.answered(ranks[2].incarnation, "not asked", "", pipeline, 0)
    desk.answered(ranks[0].incarnation, "", "it is stopped", pipeline, 0)
    assert caller.done() == [(0, "", "it is stopped"), (1, "at b", "")]
    assert [(stack.step, stack.state) for stack in caller.reply.stacks] == [(4, "running"), (5, "running")]
    assert (caller.reply.stacks[1].host, caller.reply.stacks[1].pid) == ("h", 101)
    assert repr(desk) == "<StackDesk asked=0>"


def test_an_agent_that_does_not_answer_in_time_is_named():
    pipeline, ranks, _, desk = make()
    caller = Caller(desk, 0, 1, wait_s=2.0)
    assert len(desk.hear(pipeline, 10 * S)) == 2
    desk.answered(ranks[1].incarnation, "at b", "", pipeline, 11 * S)
    assert desk.hear(pipeline, 12 * S - 1) == []
    assert repr(desk) == "<StackDesk asked=1>"
    assert desk.hear(pipeline, 12 * S) == []
    assert caller.done() == [(0, "", "its node's agent did not answer"), (1, "at b", "")]


def test_a_request_for_nobody_is_answered_at_once():
    pipeline, _, _, desk = make()
    caller = Caller(desk, 7)
    assert desk.hear(pipeline, 0) == []
    assert caller.done() == []


def test_more_ranks_than_one_request_may_ask_for_are_counted():
    pipeline, _, _, desk = make(MAX_RANKS + 10)
    caller = Caller(desk)
    wanted = desk.hear(pipeline, 0)
    assert len(wanted) == MAX_RANKS
    for incarnation in wanted:
        desk.answered(incarnation, "x", "", pipeline, 0)
    assert len(caller.done()) == MAX_RANKS
    assert caller.reply.num_left_out == 10


def test_one_message_goes_to_each_node_that_can_be_reached():
    pipeline, ranks, _, _ = make(5)
    wanted = [rank.incarnation for rank in (*ranks, ranks[0])]
    sent = dict(requests(wanted, pipeline.writers, {"0": b"r0", "7": b"r7"}))
    assert list(sent) == [b"r0"]
    asked = codec.decode(sent[b"r0"]).incarnations
    assert list(asked) == [ranks[0].incarnation, ranks[2].incarnation, ranks[4].incarnation]
