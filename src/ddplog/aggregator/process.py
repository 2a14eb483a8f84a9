"""The aggregator's process: one per run. Owns the ROUTER, the store's writing side, the control server, the forwarders.

One thread, one loop: take messages, let the pipeline decide, make its effects durable, then answer. gRPC's threads see
only a prepared snapshot, and leave the launcher's word in a queue.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Final

from ddplog import killpoints
from ddplog.aggregator.control import ControlServer
from ddplog.aggregator.forwarders import Forwarders
from ddplog.aggregator.memory import give_back
from ddplog.aggregator.snapshot import Snapshots
from ddplog.aggregator.stacks import StackDesk, requests
from ddplog.core.attempt import Options
from ddplog.core.awake import AwakeTime
from ddplog.core.dedup import Duplicate, Gap
from ddplog.core.effects import RANK, SYSTEM, Effects, Writer, WriterInfo
from ddplog.core.pipeline import Pipeline
from ddplog.errors import RemoteProtocolError
from ddplog.journal.election import ensure_agent
from ddplog.journal.spool import JobInfo, boot_id, read_job, write_atomic
from ddplog.store.rank_log import Position
from ddplog.store.run_store import RunStore, StoreError
from ddplog.v1 import data_pb2 as pb
from ddplog.v1.control_pb2 import FinishReply, FinishRequest
from ddplog.wire import codec
from ddplog.wire.keys import aggregator_keys, allow_list, load_secret
from ddplog.wire.sockets import RouterEndpoint, self_attack

_logger = logging.getLogger("ddplog.aggregator")

_POLL_MS: Final = 50
_COMMIT_NS: Final = 50_000_000
"""A commit is two fdatasync and about 1 ms of CPU: at every 20 ms that was 5 % of a core of a job's own."""
_COMMIT_BYTES: Final = 8 * 1024 * 1024
_LONGEST_NS: Final = 500_000_000
"""So long at most between two commits while a backlog is taken: what one poll gives may take 20 s if the keys change from
record to record, and after 5 s without an acknowledgement the agent sends all of it again."""
_TRIM_NS: Final = 10_000_000_000
_RETRY_S: Final = 1.0
_MAX_NODES: Final = 64
_SILENCE_NS: Final = 120_000_000_000
"""Without a message of any agent for this long it ends: they are all gone, and whoever comes back starts another."""
_AGENT_SILENCE_NS: Final = 2_000_000_000
"""Without a message of any agent for this long it looks whether this node's own still lives; they speak 4 times a second."""
_PATIENCE_NS: Final = 30_000_000_000
"""How long an aggregator of a run that had ended waits for an agent's Hello."""


class Aggregator:
    """The process's state."""

    def __init__(self, folder: Path, job: JobInfo) -> None:
        self.folder = folder
        self.job = job
        settings = job.settings
        self.store = RunStore(job.run_dir, _run_row(job))
        self._time = AwakeTime(time.monotonic_ns())
        now = self._now_ns()
        options = Options(
            grace_ns=int(settings["grace_s"] * 1e9),
            late_ns=int(settings["late_s"] * 1e9),
            settle_ns=int(settings["settle_s"] * 1e9),
            max_keys=int(settings["max_keys"]),
            hang_ns=int(settings.get("hang_s", 0) * 1e9),
            sample_ns=int(settings.get("sample_s", 0) * 1e9),
        )
        self.pipeline = Pipeline(options, self.store.restore(), now)
        self._positions: deque[tuple[int, Position]] = deque()
        self._replay(now)
        secret = load_secret(folder / "secret")
        self.router = RouterEndpoint(
            host=str(settings["host"]),
            port=int(settings["port"]),
            keys=aggregator_keys(secret),
            nodes=allow_list(secret, map(str, range(_MAX_NODES))),
        )
        self_attack(self.router)
        self.snapshots = Snapshots(job, self.pipeline, self.store)
        self.words: queue.Queue[tuple[FinishRequest, Future[FinishReply]]] = queue.Queue()
        self._heard: list[Future[FinishReply]] = []
        self.stacks = StackDesk()
        self.control = ControlServer(
            folder / "c.sock", self.snapshots.current, self._finish, stacks=self.stacks.collect
        )
        self.forwarders = Forwarders(job.run_dir, job.sinks)
        self.nodes: dict[str, bytes] = {}
        self._due_welcome: dict[bytes, tuple[int, list[Writer]]] = {}
        """(version of the protocol, who is welcome) by connection."""
        self._due_ack: dict[bytes, dict[int, Writer]] = {}
        self._pending_bytes = 0
        self._committed_ns = now
        self._trimmed_ns = now
        self._is_stopping = False
        self._is_heard = False
        """Whether an agent has said all that it has: the run may have ended before, and be about to go on."""
        self._patience_ns = now + _PATIENCE_NS
        self._heard_ns = now
        self._sought_ns = now
        self._announce()

    def _announce(self) -> None:
        control = str(self.folder / "c.sock")
        word = {
            "endpoint": self.router.endpoint,
            "pid": os.getpid(),
            "run_dir": str(self.job.run_dir),
            "control": control,
        }
        write_atomic(self.folder / "aggregator.json", json.dumps(word).encode())
        live = {
            "socket": control,
            "pid": os.getpid(),
            "start_ticks": _start_ticks(),
            "endpoint": self.router.endpoint,
            "boot_id": boot_id(),
        }
        write_atomic(self.job.run_dir / "control.json", json.dumps(live).encode())

    def _replay(self, now: int) -> None:
        for position, writer_id, first_seq, payload in self.store.entries(self.store.replay_from):
            self._positions.append((self.pipeline.num_entries, position))
            self.pipeline.replay(writer_id, first_seq, payload, now)
        killpoints.reach("aggregator.during_replay")
        self.pipeline.end_replay()

    def _now_ns(self) -> int:
        return self._time.at(time.monotonic_ns())

    # -- the loop

    def run(self) -> None:
        """Serve until the run has ended and every forwarder has."""
        signal.signal(signal.SIGTERM, self._stop)
        while True:
            messages = self.router.poll(_POLL_MS)
            now, wall = self._now_ns(), time.time_ns()
            if messages:
                self._heard_ns = now
            began = time.monotonic_ns()
            for received in messages:
                self._handle(received.routing_id, received.node_id, received.data, now, wall)
                if time.monotonic_ns() - began > _LONGEST_NS:
                    self._tick(self._now_ns())
                    began = time.monotonic_ns()
            self._hear()
            now = self._now_ns()
            if self._is_commit_due(now):
                self._tick(now)
            if not self.pipeline.is_closed or self._is_heard:
                self.forwarders.supervise(now, self.store.last_id)
            self.snapshots.refresh(now, self.forwarders)
            self._keep_agent(now)
            is_over = self.pipeline.is_closed and self.forwarders.have_ended
            is_alone = now - self._heard_ns > _SILENCE_NS
            if self._is_stopping or is_alone or (is_over and (self._is_heard or now > self._patience_ns)):
                break
        self.close()
        if not self.pipeline.is_closed:  # 0 tells the agent that the run is over
            sys.exit(128 + signal.SIGTERM if self._is_stopping else os.EX_TEMPFAIL)

    def _tick(self, now: int) -> None:
        self.pipeline.tick(now, time.time_ns())
        self._commit(now)

    def _keep_agent(self, now: int) -> None:
        """Start this node's agent again if it was killed: once its ranks are gone too, nobody else would."""
        if now - max(self._heard_ns, self._sought_ns) > _AGENT_SILENCE_NS and not self.pipeline.is_closed:
            self._sought_ns = now
            ensure_agent(self.folder)

    def _is_commit_due(self, now: int) -> bool:
        if self._due_welcome or self._pending_bytes >= _COMMIT_BYTES:
            return True  # a node waits for it
        return now - self._committed_ns >= _COMMIT_NS

    def _handle(self, routing_id: bytes, node_id: str, data: bytes, now: int, wall: int) -> None:
        self.nodes[node_id] = routing_id
        try:
            message = codec.decode(data)
            if isinstance(message, (pb.Batch, pb.Loss)):
                self._batch(routing_id, node_id, message, now, wall)
            elif isinstance(message, pb.Hello):
                self._hello(routing_id, node_id, message, now, wall)
            elif isinstance(message, pb.Heartbeat):
                self._heartbeat(node_id, message, now)
            elif isinstance(message, pb.Bye):
                # A time of its own: the run's status names the rank whose end is the first.
                self.pipeline.bye(message.incarnation, message.next_seq, now, time.time_ns())
            elif isinstance(message, pb.Stack) and self._is_owner(message.incarnation, node_id):
                self.pipeline.stack(message.incarnation, message.text, message.trouble, wall)
                self.stacks.answered(message.incarnation, message.text, message.trouble, self.pipeline, now)
        except (RemoteProtocolError, ValueError) as exc:
            _logger.warning("dropped a message of node %s: %s", node_id, exc)

    def _hello(self, routing_id: bytes, node_id: str, hello: pb.Hello, now: int, wall: int) -> None:
        if hello.run_id != self.job.run_id or hello.node_id != node_id:
            text = f"this is run {self.job.run_id}, and you are node {node_id}"
            self._reject(routing_id, pb.Reject.WRONG_RUN, b"", 0, text)
            return
        try:
            version = codec.check_version(hello)
        except RemoteProtocolError as exc:
            _logger.error("cannot talk to node %s: it has %s", node_id, exc)
            self._reject(routing_id, pb.Reject.VERSION, b"", 0, f"you have {exc}")
            return
        infos = [_info(writer, node_id) for writer in hello.writers]
        strangers = [info for info in infos if not self._is_owner(info.incarnation, node_id)]
        if strangers:
            self._reject(routing_id, pb.Reject.NOT_YOURS, strangers[0].incarnation, 0, "another node's writer")
            return
        was_closed = self.pipeline.is_closed
        self._due_welcome[routing_id] = version, self.pipeline.hello(infos, now, wall)
        self._is_heard |= not hello.has_more
        if was_closed and not self.pipeline.is_closed:
            self.forwarders.resume()

    def _is_owner(self, incarnation: bytes, node_id: str) -> bool:
        writer = self.pipeline.writers.get(incarnation)
        return writer is None or writer.info.node_id == node_id

    def _batch(self, routing_id: bytes, node_id: str, batch: pb.Batch | pb.Loss, now: int, wall: int) -> None:
        incarnation = batch.incarnation
        if not self._is_owner(incarnation, node_id):
            self._reject(routing_id, pb.Reject.NOT_YOURS, incarnation, 0, "another node's writer")
            return
        payload = b""
        if isinstance(batch, pb.Batch):
            payload = batch.payload
            outcome = self.pipeline.batch(incarnation, batch.first_seq, batch.num_records, payload, now, wall)
        else:
            outcome = self.pipeline.loss(incarnation, batch.first_seq, batch.next_seq, now, wall)
        if outcome is None:
            self._reject(routing_id, pb.Reject.UNKNOWN_WRITER, incarnation, 0, "say Hello first")
        elif isinstance(outcome, Gap):
            self._reject(routing_id, pb.Reject.OUT_OF_ORDER, incarnation, outcome.next_seq, "records are missing")
        else:
            writer = self.pipeline.writers[incarnation]
            self._due_ack.setdefault(routing_id, {})[writer.writer_id] = writer
            if not isinstance(outcome, Duplicate):
                self._pending_bytes += len(payload)

    def _heartbeat(self, node_id: str, heartbeat: pb.Heartbeat, now: int) -> None:
        self.pipeline.node(node_id, heartbeat.is_over, now)
        for progress in heartbeat.progress:
            if self._is_owner(progress.incarnation, node_id):
                self.pipeline.progress(
                    progress.incarnation,
                    progress.step if progress.HasField("step") else None,
                    progress.through_seq,
                    {drop.reason: drop.count for drop in progress.drops},
                    progress.backlog_bytes,
                    now,
                )
                if progress.HasField("exit_status"):
                    self.pipeline.exited(progress.incarnation, progress.exit_status, time.time_ns())

    def _reject(self, routing_id: bytes, reason: pb.Reject.Reason, incarnation: bytes, seq: int, text: str) -> None:
        self.router.send(routing_id, codec.encode_reject(reason, incarnation, seq, text))

    def _ask_for_stacks(self, incarnations: list[bytes]) -> None:
        for routing_id, request in requests(incarnations, self.pipeline.writers, self.nodes):
            self.router.send(routing_id, request)

    # -- durability

    def _commit(self, now: int) -> None:
        effects = self.pipeline.take()
        status, effects.status = effects.status, None
        parts = self.pipeline.take_stale(now, at_once=self.pipeline.is_closed)
        for number, stale in enumerate(parts, 1):
            num_points = sum(emission.num_points for _, emission in effects.emissions)
            if (number == 1 < len(parts) and effects) or num_points >= self.pipeline.options.max_points:
                effects.unsettled = [*self.pipeline.unsettled, *parts[number - 1 :]]
                self._store(effects)
                effects = Effects()
                self._answer()  # whoever waits for what is durable now need not wait for the rest: seconds a part
            entries = chain(
                ((writer_id, first_seq, payload) for _, writer_id, first_seq, payload in self.store.entries()),
                ((entry.writer_id, entry.first_seq, entry.payload) for entry in effects.log),
            )
            emission = self.pipeline.derive(stale, entries)
            if emission is not None:
                effects.emissions.append((stale.attempt, emission))
        effects.unsettled = self.pipeline.unsettled  # a derived point makes the open windows below it unsettled
        effects.status = status
        if effects:
            self._store(effects)
        self._committed_ns = self._now_ns()
        self._pending_bytes = 0
        self._answer()
        if now - self._trimmed_ns > _TRIM_NS:
            self._trimmed_ns = now
            give_back()
            keep_from = self._positions[0][1].file if self._positions else self.store.rank_log.end.file
            self.store.rank_log.trim(int(self.job.settings["rank_log_bytes"]), keep_from)

    def _store(self, effects: Effects) -> None:
        self._make_durable(effects)
        killpoints.reach("aggregator.after_commit")
        self.snapshots.note(effects)
        self._ask_for_stacks(effects.stacks)

    def _make_durable(self, effects: Effects) -> None:
        """Commit, however long the disk stays full: nothing is acknowledged meanwhile, and the journals hold it."""
        base = self.pipeline.num_entries - len(effects.log)
        needed = self.pipeline.oldest_entry_needed
        kept: list[tuple[int, Position]] = []

        def locate(positions: list[Position]) -> Position | None:
            kept[:] = [
                (ordinal, position)
                for ordinal, position in chain(
                    self._positions, zip(range(base, base + len(positions)), positions, strict=True)
                )
                if ordinal >= needed
            ]
            return kept[0][1] if kept else None

        while True:
            try:
                self.store.commit(effects, locate, time.time_ns())
            except StoreError as exc:
                _logger.error("cannot write the store, trying again: %s", exc)
                if self._is_stopping:  # the journals have what is not stored
                    sys.exit(128 + signal.SIGTERM)
                self.snapshots.trouble = str(exc)
                self.snapshots.refresh(self._now_ns(), self.forwarders)
                time.sleep(_RETRY_S)
            else:
                self.snapshots.trouble = ""
                self._positions = deque(kept)
                return

    def _answer(self) -> None:
        created = self.store.created_unix_ns
        for routing_id, (version, writers) in self._due_welcome.items():
            self.router.send(routing_id, codec.encode_welcome(self.store.uuid, map(_cursor, writers), version, created))
        for routing_id, acked in self._due_ack.items():
            self.router.send(routing_id, codec.encode_ack(map(_cursor, acked.values())))
        self._due_welcome.clear()
        self._due_ack.clear()
        for future in self._heard:
            future.set_result(FinishReply(status=(self.pipeline.verdict or ("running", ""))[0]))
        self._heard.clear()

    # -- the control plane

    def _finish(self, request: FinishRequest) -> FinishReply:
        """Called by gRPC's threads."""
        answer: Future[FinishReply] = Future()
        self.words.put((request, answer))
        return answer.result(timeout=30)

    def _hear(self) -> None:
        while not self.words.empty():
            request, answer = self.words.get_nowait()
            wall = time.time_ns()
            for end in request.exits:
                self.pipeline.rank_exit(
                    end.rank,
                    end.pid,
                    end.exit_code if end.HasField("exit_code") else None,
                    end.signal if end.HasField("signal") else None,
                    end.message,
                    wall,
                )
            self.pipeline.finish(request.status, request.detail, self._now_ns())
            self._heard.append(answer)
        self._ask_for_stacks(self.stacks.hear(self.pipeline, self._now_ns()))

    def _stop(self, signum: int, frame: object) -> None:  # noqa: ARG002 - a signal handler's signature
        self._is_stopping = True

    def close(self) -> None:
        """Commit what is there and leave the run readable."""
        self._commit(self._now_ns())
        self.snapshots.refresh(self._now_ns(), self.forwarders, at_once=True)
        self.control.stop(0.5)
        self.forwarders.leave()
        (self.folder / "aggregator.json").unlink(missing_ok=True)
        (self.job.run_dir / "control.json").unlink(missing_ok=True)
        self.router.close()
        self.store.close()

    def __repr__(self) -> str:
        return f"<Aggregator {self.job.run_id} {self.pipeline!r} {self.store!r}>"


def _start_ticks() -> int:
    """Return when this process started, clock ticks since boot: a pid alone may be another process's by now, or be one
    of another PID namespace, where every container has the same small numbers.
    """
    text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    return int(text[text.rindex(")") + 2 :].split()[19])


def _run_row(job: JobInfo) -> dict[str, object]:
    row = asdict(job)
    return {name: row[name] for name in ("run_id", "project", "name", "tags", "config", "created_unix_ns", "sinks")}


def _info(writer: pb.Writer, node_id: str) -> WriterInfo:
    return WriterInfo(
        incarnation=writer.incarnation,
        rank=writer.rank,
        world_size=writer.world_size,
        local_rank=writer.local_rank,
        node_rank=writer.node_rank,
        node_id=node_id,
        host=writer.host,
        pid=writer.pid,
        boot_id=writer.boot_id,
        started_unix_ns=writer.started_unix_ns,
        is_alive=writer.is_alive,
        oldest_seq=writer.oldest_seq,
        role=SYSTEM if writer.role == pb.Writer.SYSTEM else RANK,
        belongs_to=writer.belongs_to,
    )


def _cursor(writer: Writer) -> codec.Cursor:
    return writer.info.incarnation, writer.next_seq, writer.attempt


def main() -> None:
    """Run the aggregator of the job folder in argv[1]."""
    folder = Path(sys.argv[1])
    killpoints.arm(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s aggregator %(process)d %(levelname)s %(message)s")
    aggregator = Aggregator(folder, read_job(folder))
    _logger.info("aggregator of run %s at %s", aggregator.job.run_id, aggregator.router.endpoint)
    aggregator.run()
    _logger.info("done: %r", aggregator)


if __name__ == "__main__":
    main()
