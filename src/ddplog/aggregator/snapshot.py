"""Owns the snapshot of the run that the control plane serves: prepared by the loop, read by gRPC's threads."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Final

from ddplog.aggregator.forwarders import Forwarders
from ddplog.core.effects import Effects, Writer
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import NO_STEP
from ddplog.core.watermark import EVERYTHING, NOTHING_YET
from ddplog.journal.spool import JobInfo
from ddplog.store.run_store import RunStore
from ddplog.store.sink_states import read_sink_states
from ddplog.v1.control_pb2 import DropCount, LastValue, RankStatus, SinkStatus, StatusReply

_INTERVAL_NS: Final = 200_000_000
_MAX_LAST_VALUES: Final = 100
_RATE_NS: Final = 5_000_000_000


class Snapshots:
    """Prepares StatusReply messages.

    Args:
        job: The run.
        pipeline: Read, never changed.
        store: Likewise.
    """

    def __init__(self, job: JobInfo, pipeline: Pipeline, store: RunStore) -> None:
        self._job = job
        self._pipeline = pipeline
        self._store = store
        self._last: dict[int, tuple[int, int, float]] = {}
        self._steps: dict[int, deque[tuple[int, int]]] = {}
        self._refreshed_ns = 0
        self._status = store.status
        self.trouble = ""
        self._reply = StatusReply(run_id=job.run_id, project=job.project, name=job.name or "", status="running")

    def current(self) -> StatusReply:
        """Return the newest snapshot; it is not changed afterwards. Any thread may call it."""
        return self._reply

    def note(self, effects: Effects) -> None:
        """Remember the newest value of each key: that of the highest step of its newest attempt."""
        for attempt, emission in effects.emissions:
            for column, key_id in enumerate(emission.key_ids):
                known = self._last.get(key_id)
                if known is None and len(self._last) >= _MAX_LAST_VALUES:
                    continue
                logged = emission.block.n[:, column].nonzero()[0]
                if not len(logged):
                    continue
                row = logged[-1]
                step = int(emission.steps[row])
                if known is None or (attempt, step) >= known[:2]:  # not a late value's of an earlier step
                    self._last[key_id] = (attempt, step, float(emission.value[row, column]))
        if effects.status is not None:
            self._status = self._store.status

    def refresh(self, now_ns: int, forwarders: Forwarders, *, at_once: bool = False) -> None:
        """Prepare a new snapshot if the last one is old."""
        if now_ns - self._refreshed_ns < _INTERVAL_NS and not at_once:
            return
        self._refreshed_ns = now_ns
        pipeline = self._pipeline
        reply = StatusReply(
            run_id=self._job.run_id,
            project=self._job.project,
            name=self._job.name or "",
            status=self._status["status"],
            status_detail=self.trouble or self._status["detail"],
            attempt=max(0, pipeline.attempt),
            num_points=self._store.num_points,
            num_values=pipeline.num_values,
            time_unix_ns=time.time_ns(),
            is_drained=pipeline.is_closed,
            started_unix_ns=self._job.created_unix_ns,
        )
        if pipeline.attempts:
            attempt = pipeline.attempts[pipeline.attempt]
            reply.world_size = attempt.watermark.world_size
            watermark = attempt.watermark.value(now_ns)
            if watermark not in (NOTHING_YET, EVERYTHING):
                reply.watermark = watermark
            reply.hang = pipeline.hang_words(now_ns)
            others = [writer for writer in attempt.members if not writer.is_reduced]
            shown = [*attempt.holders.values(), *others]
            missing = [RankStatus(rank=r, state="missing") for r in range(reply.world_size) if r not in attempt.holders]
            reply.ranks.extend(sorted([self._rank(w, now_ns) for w in shown] + missing, key=lambda rank: rank.rank))
        for state in read_sink_states(forwarders.run_dir):
            reply.sinks.append(
                SinkStatus(
                    name=state.name,
                    state=state.state,
                    cursor=state.cursor,
                    lag=state.lag,
                    detail=state.detail,
                    num_delivered=state.num_delivered or 0,
                    num_dead=state.num_dead,
                )
            )
        for key_id, (_, step, value) in sorted(self._last.items()):
            reply.last_values.append(LastValue(key=pipeline.keys.names[key_id], step=step, value=value))
        self._reply = reply

    def _rank(self, writer: Writer, now_ns: int) -> RankStatus:
        status = RankStatus(
            rank=writer.info.rank,
            host=writer.info.host,
            pid=writer.info.pid,
            state=self._pipeline.standing(writer, now_ns),
            next_seq=writer.next_seq,
            idle_s=max(0.0, (now_ns - writer.last_moved_ns) / 1e9),
            num_drops=sum(writer.drops.values()),
            backlog_bytes=writer.backlog_bytes,
            num_values=writer.num_values,
            drops=[DropCount(reason=reason, count=count) for reason, count in sorted(writer.drops.items())],
        )
        if writer.step != NO_STEP:
            status.step = writer.step
            status.steps_per_s = self._rate(writer.writer_id, writer.step, now_ns)
        return status

    def _rate(self, writer_id: int, step: int, now_ns: int) -> float:
        seen = self._steps.setdefault(writer_id, deque())
        seen.append((now_ns, step))
        while now_ns - seen[0][0] > _RATE_NS:
            seen.popleft()
        elapsed_s = (now_ns - seen[0][0]) / 1e9
        rate = (step - seen[0][1]) / elapsed_s if elapsed_s > 0 else 0.0
        return rate if math.isfinite(rate) else 0.0
