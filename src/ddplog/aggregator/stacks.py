"""Owns who waits for which ranks' stacks: a gRPC thread asks, the loop sends the requests and hands in the answers."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from ddplog.core.effects import Writer
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import NO_STEP
from ddplog.v1.control_pb2 import RankStack, StacksReply, StacksRequest
from ddplog.wire import codec

MAX_RANKS: Final = 64
"""Of one request: 64 KiB each, in the store too. Who wants others names them."""


@dataclass(slots=True)
class _Asked:
    future: Future[StacksReply]
    until_ns: int
    num_left_out: int
    missing: dict[bytes, Writer]
    found: list[RankStack] = field(default_factory=list)


class StackDesk:
    """Requests for stacks, from outside and from the pipeline."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[StacksRequest, Future[StacksReply]]] = queue.SimpleQueue()
        self._asked: list[_Asked] = []

    def collect(self, request: StacksRequest) -> StacksReply:
        """Return the stacks of living ranks. Called by gRPC's threads; waits `wait_s`, and a little."""
        future: Future[StacksReply] = Future()
        self._queue.put((request, future))
        return future.result(timeout=request.wait_s + 2.0)

    def hear(self, pipeline: Pipeline, now_ns: int) -> list[bytes]:
        """Take new requests, end those that waited long enough; return the incarnations that are to be asked."""
        wanted: list[bytes] = []
        while not self._queue.empty():
            request, future = self._queue.get()
            writers, num_left_out = _choose(pipeline, set(request.ranks))
            missing = {writer.info.incarnation: writer for writer in writers}
            self._asked.append(_Asked(future, now_ns + int(request.wait_s * 1e9), num_left_out, missing))
            wanted += missing
        for asked in self._asked:
            if now_ns >= asked.until_ns:
                for incarnation in list(asked.missing):
                    self._put(asked, incarnation, "", "its node's agent did not answer", pipeline, now_ns)
        self._end()
        return wanted

    def answered(self, incarnation: bytes, text: str, trouble: str, pipeline: Pipeline, now_ns: int) -> None:
        """Hand in a rank's stacks to whoever waits for them."""
        for asked in self._asked:
            if incarnation in asked.missing:
                self._put(asked, incarnation, text, trouble, pipeline, now_ns)
        self._end()

    @staticmethod
    def _put(asked: _Asked, incarnation: bytes, text: str, trouble: str, pipeline: Pipeline, now_ns: int) -> None:
        writer = asked.missing.pop(incarnation)
        stack = RankStack(
            rank=writer.info.rank,
            host=writer.info.host,
            pid=writer.info.pid,
            state=pipeline.standing(writer, now_ns),
            text=text,
            trouble=trouble,
        )
        if writer.step != NO_STEP:
            stack.step = writer.step
        asked.found.append(stack)

    def _end(self) -> None:
        for asked in [asked for asked in self._asked if not asked.missing]:
            self._asked.remove(asked)
            stacks = sorted(asked.found, key=lambda stack: stack.rank)
            asked.future.set_result(StacksReply(stacks=stacks, num_left_out=asked.num_left_out))

    def __repr__(self) -> str:
        return f"<StackDesk asked={len(self._asked)}>"


def requests(
    incarnations: Iterable[bytes], writers: Mapping[bytes, Writer], nodes: Mapping[str, bytes]
) -> list[tuple[bytes, bytes]]:
    """Return (routing id, message) for each node that has some of the ranks and can be reached."""
    by_node: dict[str, list[bytes]] = {}
    for incarnation in dict.fromkeys(incarnations):
        by_node.setdefault(writers[incarnation].info.node_id, []).append(incarnation)
    return [(nodes[node], codec.encode_stack_request(found)) for node, found in by_node.items() if node in nodes]


def _choose(pipeline: Pipeline, ranks: set[int]) -> tuple[list[Writer], int]:
    """Return the living holders of the ranks, those behind first, and how many are beyond the limit."""
    if not pipeline.attempts:
        return [], 0
    holders = pipeline.attempts[pipeline.attempt].holders.values()
    living = [w for w in holders if w.state == "running" and (not ranks or w.info.rank in ranks)]
    living.sort(key=lambda writer: (writer.step, writer.info.rank))
    return living[:MAX_RANKS], max(0, len(living) - MAX_RANKS)
