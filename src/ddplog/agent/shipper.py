"""Decides what a node sends: which writers are declared, which records, when a rank is dead and its journal complete.

Go-back-N per writer, resumed from the aggregator's next_seq; the journal is the send buffer, so nothing is copied or
kept in memory. A window of bytes bounds what is under way. Has no socket and no clock: messages come in and go out as
bytes, time is an argument.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddplog.agent.exit_status import Process
from ddplog.agent.stacks import Stacks
from ddplog.errors import RemoteProtocolError
from ddplog.journal.reader import Hole, JournalReader
from ddplog.journal.spool import is_system
from ddplog.killpoints import reach
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

_logger = logging.getLogger("ddplog.agent")

WINDOW_BYTES: Final = 16 * 1024 * 1024
BATCH_BYTES: Final = 256 * 1024
RESEND_NS: Final = 5_000_000_000
HEARTBEAT_NS: Final = 250_000_000
_FULL: Final = frozenset({"disk_full", "spool_full"})
"""Drops that say there is no room: better the next record than a second copy of one that is stored."""
SYNC_NS: Final = 500_000_000
DEATH_CHECK_NS: Final = 20_000_000
"""torchrun looks every 100 ms and then ends the other ranks: who died first must have been seen by then."""


@dataclass(slots=True, eq=False)
class Tracked:
    """A journal and what is known of its delivery."""

    reader: JournalReader
    process: Process
    belongs_to: bytes = b""
    """The incarnation of the rank whose samples it holds; empty: it is a rank's own."""
    is_adopted: bool = False
    """A killed job of the same run left it."""
    is_abandoned: bool = False
    """Its sampler was killed and cannot die: what it has written is all there will be."""
    is_alive: bool = True
    died_ns: int = 0
    """When its death was seen."""
    is_welcome: bool = False
    """The aggregator has said from where to send."""
    acked_seq: int = 0
    in_flight: int = 0
    """Bytes sent and not acknowledged."""
    unacked: deque[tuple[int, int]] = field(default_factory=deque)
    """(next_seq, bytes) of the batches that are under way, oldest first."""
    sent_ns: int = 0
    bye_seq: int | None = None
    """Its length, once it is dead and read to the end."""
    num_unarrived: int = 0
    """Values that it had taken, and that were still on their way from a device when it died."""
    is_done: bool = False
    """Dead, and all of it acknowledged."""
    trimmed: tuple[int, bool] = (0, False)
    """(acked_seq, whether there was no room) when it was trimmed last."""
    shown: tuple[int | None, int] = (None, 0)
    """(ambient step, seq that had been read to the end after the step was read)."""

    def forget(self) -> None:
        """Nothing is under way any more."""
        self.in_flight = 0
        self.unacked.clear()

    @property
    def incarnation(self) -> bytes:
        return bytes(self.reader.incarnation)

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> count: what the rank counted, and what its death left on the device."""
        drops = self.reader.drops
        if self.num_unarrived:
            drops["device_pending"] = drops.get("device_pending", 0) + self.num_unarrived
        return drops

    @property
    def is_system(self) -> bool:
        return self.belongs_to != b""


class Shipper:
    """The journals of one job on one node.

    Args:
        folder: The job's folder.
        run_id: Of the run.
        node_id: Of this node.
        keep_bytes: Acknowledged segments kept per rank, so that a lost store can be refilled.
        adopted: Folders that killed jobs of the same run left behind; see orphans.
    """

    def __init__(self, folder: Path, run_id: str, node_id: str, keep_bytes: int, adopted: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.adopted = tuple(adopted)
        self.run_id = run_id
        self.node_id = node_id
        self.keep_bytes = keep_bytes
        self.tracked: dict[bytes, Tracked] = {}
        self.stacks = Stacks()
        self.version = 0
        """Of the protocol, as the aggregator has it on this connection; 0: it has not said yet."""
        self.created_unix_ns = 0
        """When the run was begun, as its store says; 0: not said yet."""
        self._known: set[str] = set()
        self._troubled: set[str] = set()
        self._is_hello_due = False
        self._hello_ns = 0
        self._heartbeat_ns = 0
        self._sync_ns = 0
        self._death_ns = 0
        self._turn = 0
        self.has_more = False
        """Whether the last round left records behind: send again at once."""

    # -- the node's ranks

    def discover(self) -> None:
        """Look for new journals; a rank's come before those of its samples."""
        for folder in (self.folder, *self.adopted):
            for path in sorted(folder.iterdir(), key=lambda path: is_system(path.name)):
                if str(path) not in self._known and _is_journal(path):
                    self._track(path, is_adopted=folder is not self.folder)

    def _track(self, path: Path, *, is_adopted: bool) -> None:
        try:
            reader = JournalReader(path)
        except OSError as exc:  # a disk, or too many open files: it may go the next time
            if str(path) not in self._troubled:
                self._troubled.add(str(path))
                _logger.error("cannot open the journal %s, trying again: %s", path, exc)
            return
        except (ValueError, RemoteProtocolError) as exc:
            self._known.add(str(path))
            _logger.error("cannot read the journal %s: %s", path, exc)
            return
        belongs_to = bytes.fromhex(reader.identity.get("belongs_to", ""))
        if belongs_to and belongs_to not in self.tracked:  # its rank's journal cannot be read, or not yet
            reader.close()
            return
        self._known.add(str(path))
        reader.sync()  # before anybody is told of it: a power cut must not take a journal that is waited for
        self.tracked[reader.incarnation] = Tracked(
            reader=reader,
            process=Process(lambda: reader.holder),
            belongs_to=belongs_to,
            acked_seq=reader.acked_seq,
            is_adopted=is_adopted,
        )
        self._is_hello_due = True

    @property
    def ranks(self) -> Iterator[Tracked]:
        """The ranks' own journals."""
        return (tracked for tracked in self.tracked.values() if not tracked.is_system)

    @property
    def declared(self) -> Iterator[Tracked]:
        """What the aggregator may be told of: an older one knows nothing of system writers."""
        return self.ranks if self.version < codec.SYSTEM_VERSION else iter(self.tracked.values())

    @property
    def has_rank_zero(self) -> bool:
        """Of this job: the aggregator is this agent's to start."""
        return any(t.reader.identity["rank"] == 0 for t in self.ranks if not t.is_adopted)

    @property
    def is_idle(self) -> bool:
        """Every rank that ever appeared is dead, and all it left is acknowledged, and so are its samples."""
        waited = self.tracked.values() if self.version != 1 else self.ranks
        return bool(self.tracked) and all(tracked.is_done for tracked in waited)

    def abandon(self) -> None:
        """The sampler will write no more, even if the kernel keeps it."""
        self.discover()
        for tracked in self.tracked.values():
            tracked.is_abandoned |= tracked.is_system

    def may_learn(self, now_ns: int) -> bool:
        """Whether the exit status of a rank that has gone is still to come."""
        return any(
            tracked.reader.is_at_exit and tracked.process.may_tell(now_ns - tracked.died_ns)
            for tracked in self.ranks
            if not tracked.is_alive
        )

    def check_deaths(self, now_ns: int) -> None:
        """Look, at most every DEATH_CHECK_NS, which ranks have gone."""
        if now_ns - self._death_ns < DEATH_CHECK_NS:
            return
        self._death_ns = now_ns
        has_died = False
        for tracked in self.tracked.values():
            if tracked.is_alive and (tracked.is_abandoned or not tracked.reader.is_alive):
                tracked.is_alive = False
                tracked.died_ns = now_ns
                self._is_hello_due = has_died = True
        if has_died:
            self.discover()  # what was sampled of it: the run may close once its end is told

    # -- messages in

    def joined(self) -> None:
        """There is a connection, perhaps to another aggregator than before: begin with a Hello."""
        self.version = 0
        for tracked in self.tracked.values():
            tracked.is_welcome = False
            tracked.forget()
        self._is_hello_due = True

    def receive(self, data: bytes, now_ns: int) -> None:
        """Take a message of the aggregator.

        Raises:
            RemoteProtocolError: If it is not one; it is dropped.
        """
        message = codec.decode(data)
        if isinstance(message, pb.Welcome):
            self._is_hello_due |= not self.version and self._is_sampled
            self.version, self.created_unix_ns = message.protocol_version, message.created_unix_ns
            for cursor in message.cursors:
                tracked = self.tracked.get(cursor.incarnation)
                if tracked is not None and tracked.is_welcome:  # it was declared again, because another one changed
                    self._acknowledge(cursor.incarnation, cursor.next_seq, now_ns)
                else:
                    self._resume(cursor.incarnation, cursor.next_seq, now_ns)
        elif isinstance(message, pb.Ack):
            for cursor in message.cursors:
                self._acknowledge(cursor.incarnation, cursor.next_seq, now_ns)
            reach("agent.after_ack")
        elif isinstance(message, pb.Reject):
            _logger.warning("the aggregator refused: %s %s", pb.Reject.Reason.Name(message.reason), message.message)
            if message.reason == pb.Reject.UNKNOWN_WRITER:
                self.joined()
            elif message.reason == pb.Reject.OUT_OF_ORDER:
                self._go_back(message.incarnation, message.next_seq, now_ns)
        elif isinstance(message, pb.StackRequest):
            self._ask_for_stacks(message, now_ns)

    def _ask_for_stacks(self, request: pb.StackRequest, now_ns: int) -> None:
        for incarnation in request.incarnations:
            tracked = self.tracked.get(incarnation)
            self.stacks.ask(incarnation, tracked.reader.folder if tracked is not None else None, now_ns)

    def _go_back(self, incarnation: bytes, next_seq: int, now_ns: int) -> None:
        """Send again from `next_seq`; what is below it has been taken, and is not durable yet: no acknowledgement."""
        tracked = self.tracked.get(incarnation)
        if tracked is not None and tracked.is_welcome:
            tracked.reader.seek(next_seq)
            tracked.forget()
            tracked.sent_ns = now_ns

    def _resume(self, incarnation: bytes, next_seq: int, now_ns: int) -> None:
        tracked = self.tracked.get(incarnation)
        if tracked is None:
            return
        if next_seq != tracked.reader.next_seq or not tracked.is_welcome:
            tracked.reader.seek(next_seq)
        tracked.is_welcome = True
        tracked.forget()
        tracked.is_done = False
        tracked.sent_ns = now_ns
        self._note_acked(tracked, next_seq)

    def _acknowledge(self, incarnation: bytes, next_seq: int, now_ns: int) -> None:
        tracked = self.tracked.get(incarnation)
        if tracked is None or not tracked.is_welcome:
            return
        tracked.sent_ns = now_ns
        self._note_acked(tracked, next_seq)
        while tracked.unacked and tracked.unacked[0][0] <= next_seq:
            tracked.in_flight -= tracked.unacked.popleft()[1]

    def _note_acked(self, tracked: Tracked, next_seq: int) -> None:
        tracked.acked_seq = next_seq
        tracked.reader.set_acked(next_seq)
        if tracked.bye_seq is not None and next_seq >= tracked.bye_seq:
            tracked.is_done = True

    def settle(self) -> None:
        """The aggregator has ended by itself: the run is over, and whoever is dead and acknowledged to the end is done.

        Without it, an agent that was not told so in time would start another aggregator only to hear it again.
        """
        for tracked in self.tracked.values():
            if tracked.is_alive or not tracked.is_welcome or tracked.bye_seq is not None:
                continue
            if tracked.acked_seq == tracked.reader.next_seq and tracked.reader.read(BATCH_BYTES) is None:
                tracked.bye_seq = tracked.acked_seq
                tracked.num_unarrived = tracked.reader.num_unarrived
                tracked.is_done = True

    # -- messages out

    def outgoing(self, now_ns: int) -> Iterator[bytes]:
        """Yield what is to be sent now; a message that could not be sent is regained by the next Welcome."""
        if self.tracked and (self._is_hello_due or self._is_unanswered(now_ns)):
            self._is_hello_due = False
            self._hello_ns = now_ns
            has_more = not self.version and self._is_sampled
            yield codec.encode_hello(self.run_id, self.node_id, [_writer(t) for t in self.declared], has_more=has_more)
        yield from self._batches(now_ns)
        for incarnation, text, trouble in self.stacks.answers(now_ns):
            yield codec.encode_stack(incarnation, text, trouble)

    def _is_unanswered(self, now_ns: int) -> bool:
        """Whether a Hello, or its Welcome, was lost with a full queue: nothing else would ever ask for it again."""
        return now_ns - self._hello_ns > RESEND_NS and not all(t.is_welcome for t in self.declared)

    def _batches(self, now_ns: int) -> Iterator[bytes]:
        ready = [tracked for tracked in self.tracked.values() if tracked.is_welcome and not tracked.is_done]
        total = sum(tracked.in_flight for tracked in ready)
        self._turn += 1
        self.has_more = False
        read: list[Tracked] = []
        for index in range(len(ready)):
            tracked = ready[(index + self._turn) % len(ready)]
            if tracked.in_flight and now_ns - tracked.sent_ns > RESEND_NS:
                total -= tracked.in_flight
                tracked.forget()
                tracked.reader.seek(tracked.acked_seq)
            if total >= WINDOW_BYTES:
                continue
            was_alive = tracked.is_alive
            step = tracked.reader.step  # read before the frames: whatever was logged before it was set is among them
            chunk = tracked.reader.read(BATCH_BYTES)
            if chunk is None:
                tracked.shown = (step, tracked.reader.next_seq)
            if isinstance(chunk, Hole):
                data = codec.encode_loss(tracked.incarnation, chunk.first_seq, chunk.next_seq)
                tracked.in_flight += len(data)
                tracked.unacked.append((chunk.next_seq, len(data)))
                tracked.sent_ns = now_ns
                self.has_more = True
                yield data
            elif chunk is not None:
                tracked.in_flight += len(chunk.payload)
                tracked.unacked.append((tracked.reader.next_seq, len(chunk.payload)))
                self.has_more |= len(chunk.payload) >= BATCH_BYTES
                total += len(chunk.payload)
                tracked.sent_ns = now_ns
                yield codec.encode_batch(
                    tracked.incarnation, chunk.first_seq, chunk.num_records, chunk.payload, chunk.epoch
                )
            elif not was_alive and tracked.bye_seq is None:
                read.append(tracked)
        yield from self._ends(read)

    def _ends(self, read: list[Tracked]) -> Iterator[bytes]:
        """Tell the ends of dead ranks that are read to the end, in the order of the deaths: the run names the first.

        Of deaths that were seen together, in the order of the last records: the others logged on until they missed it.
        """
        unread = [t.died_ns for t in self.ranks if not t.is_alive and t.bye_seq is None and t not in read]
        for tracked in sorted(read, key=lambda t: (t.is_system, t.died_ns, t.reader.last_time_unix_ns)):
            if not tracked.is_system and any(died_ns <= tracked.died_ns for died_ns in unread):
                continue
            tracked.bye_seq = tracked.reader.next_seq
            tracked.num_unarrived = tracked.reader.num_unarrived
            yield self._heartbeat(is_over=False)  # its last drops, before the run may close
            reach("agent.before_bye")
            yield codec.encode_bye(tracked.incarnation, tracked.bye_seq, finished=tracked.reader.has_finished)
            self._note_acked(tracked, tracked.acked_seq)

    def heartbeat(self, now_ns: int, *, is_over: bool) -> bytes | None:
        """Return a Heartbeat if one is due."""
        if now_ns - self._heartbeat_ns < HEARTBEAT_NS:
            return None
        self._heartbeat_ns = now_ns
        return self._heartbeat(is_over=is_over)

    def _heartbeat(self, *, is_over: bool) -> bytes:
        progress = [
            codec.make_progress(
                tracked.incarnation, *tracked.shown, tracked.drops, tracked.in_flight, tracked.process.look()
            )
            for tracked in self.declared
        ]
        return codec.encode_heartbeat(self.node_id, progress, is_over=is_over and self._is_known)

    @property
    def _is_known(self) -> bool:
        """Whether the aggregator knows every writer there is: before that, further ones will come."""
        is_told = self.version > 0 or not self._is_sampled
        return is_told and all(tracked.is_welcome for tracked in self.declared)

    @property
    def _is_sampled(self) -> bool:
        return any(tracked.is_system for tracked in self.tracked.values())

    def byes(self) -> Iterator[bytes]:
        """Yield the ends again, for an aggregator that may have missed them."""
        for tracked in self.tracked.values():
            if tracked.bye_seq is not None and tracked.is_welcome:
                yield codec.encode_bye(tracked.incarnation, tracked.bye_seq, finished=tracked.reader.has_finished)

    # -- upkeep

    def keep_durable(self, now_ns: int) -> None:
        """Make new records durable on this node's disk, at most every SYNC_NS, and delete what is no longer needed."""
        if now_ns - self._sync_ns < SYNC_NS:
            return
        self._sync_ns = now_ns
        for tracked in self.tracked.values():
            tracked.reader.sync()
            due = tracked.acked_seq, not _FULL.isdisjoint(tracked.reader.drops)
            if tracked.trimmed != due:
                tracked.trimmed = due
                self._trim(tracked, keep_bytes=0 if due[1] else self.keep_bytes)

    @staticmethod
    def _trim(tracked: Tracked, keep_bytes: int) -> None:
        try:
            tracked.reader.trim(tracked.acked_seq, keep_bytes)
        except OSError as exc:
            _logger.error("cannot delete what is stored of %s: %s", tracked.reader.folder, exc)

    def close(self) -> None:
        """Close every journal."""
        for tracked in self.tracked.values():
            tracked.reader.close()

    def __repr__(self) -> str:
        done = sum(tracked.is_done for tracked in self.tracked.values())
        return f"<Shipper node={self.node_id} writers={len(self.tracked)} done={done}>"


def _writer(tracked: Tracked) -> pb.Writer:
    identity = tracked.reader.identity
    return pb.Writer(
        incarnation=tracked.incarnation,
        rank=identity["rank"],
        world_size=identity["world_size"],
        local_rank=identity["local_rank"],
        node_rank=identity["node_rank"],
        pid=identity["pid"],
        host=identity["host"],
        boot_id=identity["boot_id"],
        started_unix_ns=identity["started_unix_ns"],
        is_alive=tracked.is_alive,
        oldest_seq=tracked.reader.oldest_seq,
        role=pb.Writer.SYSTEM if tracked.is_system else pb.Writer.RANK,
        belongs_to=tracked.belongs_to,
    )


def _is_journal(path: Path) -> bool:
    return "." in path.name and (path / "head").exists()
