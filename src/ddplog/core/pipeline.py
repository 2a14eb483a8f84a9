"""Decides everything the aggregator decides: writers, attempts, dedup, reduction, how the run ended.

Events go in through the methods of Pipeline, each with the time; what is to be done comes out of `take()` as one
Effects, which the process around it makes durable in one transaction before it acknowledges anything.

Attempts: an attempt is one set of ranks that train together. A new one opens when a writer declares another world
size, or a rank whose holder in the current attempt has ended. Reductions never mix attempts. A second living holder
of a rank is stored and not reduced.

System writers, what samplers write, belong to the attempt of the rank they name, and count for nothing but their own
values: they open no attempt, hold no rank, hang in no way and have no say in how the run ended. Their steps are seconds,
so each attempt has a second lane for them, with a watermark and panels of its own. The run waits for their records as for
any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Final

import numpy as np

from ddplog.core.attempt import Attempt, Options
from ddplog.core.batches import Rows, single, split
from ddplog.core.dedup import Accept, Duplicate, Gap, admit
from ddplog.core.effects import (
    ENDED,
    SYSTEM,
    UNKNOWN_DEATH,
    AttemptRow,
    Effects,
    EventRow,
    LogEntry,
    ParamRow,
    Restored,
    Stale,
    TextRow,
    Writer,
    WriterInfo,
)
from ddplog.core.ends import describe_exit, final_state, split_status
from ddplog.core.hang import UNSEEN_NS, Hang, find_hang, is_over, restore_hang, stacks_wanted, standing
from ddplog.core.key_table import Definition, KeyTable
from ddplog.core.panel import Emission
from ddplog.core.records import KIND_SCHEMA, NO_STEP, SYSTEM_PREFIX, Record, scan_payload
from ddplog.core.reduce import is_reduction
from ddplog.core.stacks import place
from ddplog.core.watermark import NOTHING_YET

_HANG_CHECK_NS: Final = 1_000_000_000
_MAX_ENDED_NAMED: Final = 4
_STOPPED_BY: Final = (1, 2, 15)
"""SIGHUP, SIGINT, SIGTERM."""
SILENT_NODE_NS: Final = 30_000_000_000
"""A node without a sign of life for this long, after the launcher's last word, is not waited for."""


class Pipeline:
    """The aggregator's decisions.

    Args:
        options: See Options.
        restored: What an earlier life left in the store, if there was one.
        now_ns: Monotonic time.
    """

    def __init__(self, options: Options, restored: Restored | None = None, now_ns: int = 0) -> None:
        self.options = options
        self.writers: dict[bytes, Writer] = {}
        self.attempts: dict[int, Attempt] = {}
        self.system: dict[int, Attempt] = {}
        """The same attempts' lanes for system writers."""
        self.keys = KeyTable(options.max_keys)
        self.params: dict[str, tuple[str, int]] = {}
        self.nodes_over: dict[str, bool] = {}
        self.node_seen_ns: dict[str, int] = {}
        self.verdict: tuple[str, str] | None = None
        self.verdict_ns = 0
        self.is_closed = False
        self.num_values = 0
        self.num_entries = 0
        self._by_id: dict[int, Writer] = {}
        self._names_of: dict[tuple[str, ...], tuple[str, ...]] = {}
        """Every set of names once: each segment of each journal declares them anew, under other ids."""
        self._redefined: set[int] = set()
        self._nonfinite_keys: set[int] = set()
        self._early_exits: list[tuple[int, int, int | None, int | None, str]] = []
        """(rank, pid, exit code, signal, message) of ranks that no agent has declared yet."""
        self._restored_stale: list[Stale] = []
        self._hang_due_ns = 0
        self._effects = Effects()
        if restored is not None:
            self._restore(restored, now_ns)

    def take(self) -> Effects:
        """Return what has accumulated, and begin anew."""
        for lane in self._lanes:
            lane.flush()
        effects, self._effects = self._effects, Effects()
        effects.keys = self.keys.take_changed()
        return effects

    @property
    def attempt(self) -> int:
        """The current attempt; -1 before the first."""
        return max(self.attempts, default=-1)

    # -- writers and attempts

    def hello(self, infos: Iterable[WriterInfo], now_ns: int, time_unix_ns: int) -> list[Writer]:
        """A node declares writers, or says more of known ones.

        Returns:
            The writers. Without system writers whose rank is unknown: they are not welcome before it is.
        """
        result = []
        for info in sorted(infos, key=lambda info: (info.role == SYSTEM, info.started_unix_ns, info.rank)):
            if info.role == SYSTEM:
                rank = self.writers.get(info.belongs_to)
                if rank is None or rank.is_system or rank.info.node_id != info.node_id:
                    continue
                info = replace(info, rank=rank.info.rank, world_size=rank.info.world_size)
            self.node_seen_ns[info.node_id] = now_ns
            self.nodes_over[info.node_id] = False
            writer = self.writers.get(info.incarnation)
            if writer is None:
                writer = self._admit_writer(info, now_ns, time_unix_ns)
            writer.info = info
            _see(writer, now_ns)
            if info.oldest_seq > writer.next_seq:
                self._lose(writer, info.oldest_seq, "its journal was trimmed, and the store is new", time_unix_ns)
            result.append(writer)
        return result

    def loss(
        self, incarnation: bytes, first_seq: int, next_seq: int, now_ns: int, time_unix_ns: int
    ) -> Accept | Duplicate | Gap | None:
        """A writer's journal says that records are gone for good: a power cut came before they were on the disk.

        Returns:
            As batch() does.
        """
        writer = self.writers.get(incarnation)
        if writer is None:
            return None
        _see(writer, now_ns)
        decision = admit(writer.next_seq, first_seq, next_seq - first_seq)
        if isinstance(decision, Accept):
            self._lose(writer, next_seq, "they were not on its node's disk when that went down", time_unix_ns)
            self._reach_pending(writer, now_ns)
            self._settle_end(writer, time_unix_ns)
        return decision

    def _lose(self, writer: Writer, next_seq: int, why: str, time_unix_ns: int) -> None:
        """Close a gap that nothing can fill: without it, the writer would be asked for it for ever."""
        first_seq = max(writer.next_seq, writer.refill_to)
        if first_seq < next_seq:
            self._note_lost(writer, first_seq, next_seq - first_seq, why, time_unix_ns)
        writer.next_seq = next_seq
        self._effects.writers[writer.writer_id] = writer

    def _note_lost(self, writer: Writer, first_seq: int, count: int, why: str, time_unix_ns: int) -> None:
        message = f"rank {writer.info.rank}: {count} records, seq {first_seq} to {first_seq + count - 1}, are lost"
        self._event(writer, time_unix_ns, "loss", "error", f"{message}: {why}")
        writer.num_lost += count
        writer.drops["lost_records"] = writer.num_lost
        self._effects.writers[writer.writer_id] = writer

    def _admit_writer(self, info: WriterInfo, now_ns: int, time_unix_ns: int) -> Writer:
        if info.role == SYSTEM:
            attempt, is_reduced = self.system[self.writers[info.belongs_to].attempt], True
        else:
            attempt, is_reduced = self._choose_attempt(info, now_ns, time_unix_ns)
        writer = Writer(
            writer_id=len(self.writers) + 1,
            info=info,
            attempt=attempt.number,
            is_reduced=is_reduced,
            last_seen_ns=now_ns,
            last_moved_ns=now_ns,
            watched_ns=now_ns,
        )
        self.writers[info.incarnation] = self._by_id[writer.writer_id] = writer
        attempt.members.append(writer)
        if is_reduced:
            attempt.holders[info.rank] = writer
            attempt.watermark.join(info.rank, now_ns)
        else:
            writer.state = "duplicate"
            self._event(
                writer,
                time_unix_ns,
                "duplicate_rank",
                "error",
                f"a second process (pid {info.pid} on {info.host}) says it is rank {info.rank}; it is stored, not reduced",
            )
        self._effects.writers[writer.writer_id] = writer
        if self.is_closed:
            self.is_closed = False
            self._effects.status = ("running", "")
            if not writer.is_system:  # a rank has come back; a sampler's last words change nothing
                self.verdict = None
                self._effects.verdict = ("", "")
        if not writer.is_system:
            self._apply_early_exits(writer, time_unix_ns)
        return writer

    def _apply_early_exits(self, writer: Writer, time_unix_ns: int) -> None:
        """Take what the launcher said of a rank before anybody had declared it."""
        known = [e for e in self._early_exits if e[0] == writer.info.rank and e[1] in (0, writer.info.pid)]
        for early in known:
            self._early_exits.remove(early)
            self._exited(writer, *early[2:], time_unix_ns)

    def _choose_attempt(self, info: WriterInfo, now_ns: int, time_unix_ns: int) -> tuple[Attempt, bool]:
        if not self.attempts:
            return self._open_attempt(info, now_ns, time_unix_ns, "start"), True
        earlier = self._earlier_attempt(info)
        if earlier is not None:
            return earlier, True
        current = self.attempts[self.attempt]
        if info.world_size != current.watermark.world_size:
            reason = f"world size {current.watermark.world_size} -> {info.world_size}"
            return self._open_attempt(info, now_ns, time_unix_ns, reason), True
        holder = current.holders.get(info.rank)
        if holder is None:
            return current, True
        if holder.state != "running" or not holder.info.is_alive:
            return self._open_attempt(info, now_ns, time_unix_ns, f"rank {info.rank} restarted"), True
        return current, False

    def _earlier_attempt(self, info: WriterInfo) -> Attempt | None:
        """Return the attempt a writer trained in that is first heard of after a later one opened; else None."""
        began = {n: min(w.info.started_unix_ns for w in attempt.members) for n, attempt in self.attempts.items()}
        if info.started_unix_ns >= began[self.attempt]:
            return None
        free = [
            attempt
            for number, attempt in sorted(self.attempts.items(), reverse=True)
            if number != self.attempt
            and attempt.watermark.world_size == info.world_size
            and info.rank not in attempt.holders
        ]
        return next((a for a in free if began[a.number] <= info.started_unix_ns), free[-1] if free else None)

    def _open_attempt(self, info: WriterInfo, now_ns: int, time_unix_ns: int, reason: str) -> Attempt:
        number = self.attempt + 1
        attempt = self._make_attempt(number, info.world_size, time_unix_ns, {}, now_ns)
        self._effects.attempts.append(AttemptRow(number, info.world_size, time_unix_ns, reason))
        if number:
            self._effects.events.append(
                EventRow(number, None, None, "restart", "warning", f"attempt {number}: {reason}", "{}", time_unix_ns)
            )
        return attempt

    # -- records

    def batch(
        self, incarnation: bytes, first_seq: int, num_records: int, payload: bytes, now_ns: int, time_unix_ns: int
    ) -> Accept | Duplicate | Gap | None:
        """Take a batch.

        Returns:
            What became of it; None if the writer is unknown. After Accept, and only once the effects are durable,
            the writer's next_seq may be acknowledged.

        Raises:
            ValueError: If the payload is not what it says; nothing of it is taken.
        """
        writer = self.writers.get(incarnation)
        if writer is None:
            return None
        _see(writer, now_ns)
        decision = admit(writer.next_seq, first_seq, num_records)
        if not isinstance(decision, Accept):
            return decision
        if decision.skip:
            payload = payload[scan_payload(payload)[decision.skip][0] :]
        count, old_step = num_records - decision.skip, writer.step
        if writer.next_seq < writer.refill_to:
            num_known = writer.refill_to - writer.next_seq
            if num_known < count:  # the others are asked for again, to come by themselves
                decision = Gap(next_seq=writer.refill_to)
                count, payload = num_known, payload[: scan_payload(payload)[num_known][0]]
            self._take_again(writer, payload, now_ns)
        elif count != 1 or not self._single(writer, payload, now_ns):
            self._records(writer, count, payload, now_ns, time_unix_ns)
        self._effects.log.append(
            LogEntry(writer.writer_id, writer.attempt, writer.info.rank, incarnation, writer.next_seq, count, payload)
        )
        self.num_entries += 1
        writer.next_seq += count
        writer.move(old_step, now_ns)
        self._effects.writers[writer.writer_id] = writer
        self._reach_pending(writer, now_ns)
        self._settle_end(writer, time_unix_ns)
        return decision

    def _records(self, writer: Writer, num_records: int, payload: bytes, now_ns: int, time_unix_ns: int) -> None:
        count, items = split(payload, writer.next_seq)
        if count != num_records:
            raise ValueError(f"{count} records in a batch of {num_records}")
        _check_schemas(writer, items)
        seq = writer.next_seq
        for item in items:
            if isinstance(item, Record):
                self._message(writer, item, time_unix_ns)
                seq += 1
                continue
            if item.schema_id in writer.schemas:
                self._scalars(writer, item, now_ns)
            else:  # behind a hole in the journal: numbers without names
                self._note_lost(writer, seq, len(item.steps), "the record of their keys is", time_unix_ns)
            seq += len(item.steps)

    def _take_again(self, writer: Writer, payload: bytes, now_ns: int) -> None:
        """Take records that the store knows and the rank log has lost: all that is missing is the log itself, and what
        windows that were open would have had of it.
        """
        for item in split(payload, writer.next_seq)[1]:
            if isinstance(item, Record) or item.schema_id not in writer.schemas:
                continue
            if writer.is_reduced:
                attempt = self._lane(writer)
                attempt.add(writer, item, max(attempt.closed_to, writer.step - 1), now_ns, self.num_entries)
                attempt.watermark.advance(writer.info.rank, int(item.steps.max()), now_ns)
            writer.step = max(writer.step, int(item.steps.max()))

    def _single(self, writer: Writer, payload: bytes, now_ns: int) -> bool:
        """Take a batch of one record whose keys are a panel's, without making arrays of it; False: it is another.

        This is every batch of a rank that logs once a step: _records() takes 15 us for what takes 3 here.
        """
        record = single(payload)
        if record is None or record.seq != writer.next_seq:
            return False
        keys = writer.schemas.get(record.schema_id, ())
        if not keys or len(keys) != record.num_keys:
            return False
        if writer.is_reduced:
            attempt = self._lane(writer)
            panel = attempt.whole_panel(keys)
            if panel is None:
                return False
            late_to = max(attempt.closed_to, writer.step - 1)
            panel.put_off(writer.info.rank, payload, late_to, now_ns, self.num_entries)
            attempt.watermark.advance(writer.info.rank, record.step, now_ns)
        writer.step = max(writer.step, record.step)
        writer.first_step = min(writer.first_step, record.step)
        writer.num_values += record.num_keys
        self._effects.num_values += record.num_keys
        self.num_values += record.num_keys
        return True

    def _scalars(self, writer: Writer, rows: Rows, now_ns: int) -> None:
        step, num_refused = int(rows.steps.max()), 0
        if writer.is_reduced:
            attempt = self._lane(writer)
            late_to = max(attempt.closed_to, writer.step - 1)
            num_refused = attempt.add(writer, rows, late_to, now_ns, self.num_entries)
            attempt.watermark.advance(writer.info.rank, step, now_ns)
        num_taken = rows.values.size - num_refused
        writer.num_values += num_taken
        self._effects.num_values += num_taken
        self.num_values += num_taken
        if num_refused:
            self._refuse(writer, num_refused, int(rows.times.max()))
        writer.step = max(writer.step, step)
        writer.first_step = min(writer.first_step, int(rows.steps.min()))

    def _refuse(self, writer: Writer, num_values: int, time_unix_ns: int) -> None:
        if not any(w.num_refused for w in self.writers.values()):
            limit = self.options.max_keys
            message = f"the run has {limit} names (max_keys): values under others are dropped, first of rank"
            self._event(writer, time_unix_ns, "key_limit", "warning", f"{message} {writer.info.rank}")
        writer.num_refused += num_values
        writer.drops["run_key_limit"] = writer.num_refused
        self._effects.writers[writer.writer_id] = writer

    # -- messages

    def _message(self, writer: Writer, record: Record, time_unix_ns: int) -> None:
        message = record.message or {}
        if record.kind == KIND_SCHEMA:
            keys = tuple(str(key) for key in message["keys"])
            keys = self._names_of.setdefault(keys, keys)
            writer.schemas[int(message["id"])] = keys
            self._effects.schemas.append((writer.writer_id, int(message["id"]), keys))
            return
        step = None if record.step == NO_STEP else record.step
        kind = message.get("type")
        writer.num_values += kind != "finish"
        try:
            self._take_message(writer, kind, message, record, step)
        except (KeyError, TypeError, AttributeError) as exc:
            self._event(writer, time_unix_ns, "unknown_message", "warning", f"a malformed {kind!r} record: {exc!r}")

    def _take_message(
        self, writer: Writer, kind: Any, message: Mapping[str, Any], record: Record, step: int | None
    ) -> None:
        at = record.time_unix_ns
        if kind == "define":
            definition = Definition(str(message["pattern"]), str(message["reduce"]), bool(message["replicated"]))
            self._define(definition, writer, at)
        elif kind == "params":
            self._params(writer, message["values"], at)
        elif kind == "text":
            self._effects.texts.append(
                TextRow(writer.attempt, writer.info.rank, str(message["key"]), step, str(message["text"]), at)
            )
        elif kind == "alert":
            text = f"{message['title']}: {message['text']}" if message.get("text") else str(message["title"])
            self._event(writer, at, "alert", str(message["level"]), text, step=step)
        elif kind == "finish":
            writer.said_finish = True
            writer.finish_status = str(message.get("status", "finished"))
            writer.detail = str(message.get("detail", ""))
            writer.last_seq = record.seq + 1
            writer.ended_unix_ns = at
        else:
            self._event(writer, at, "unknown_message", "warning", f"a record of unknown type {kind!r}")

    def _define(self, definition: Definition, writer: Writer, time_unix_ns: int) -> None:
        known = self.keys.definition(definition.pattern)
        if known == definition:
            return
        if known is not None or not is_reduction(definition.reduce):
            why = f"rank {writer.info.rank} defines {definition.pattern!r} as {definition.reduce}"
            stands = tuple(known) if known is not None else "unknown reduction"
            self._event(writer, time_unix_ns, "disagreement", "warning", f"{why}; {stands} stands")
            return
        data, message = json.dumps(definition), f"{definition.pattern}: {definition.reduce}"
        self._effects.events.append(
            EventRow(writer.attempt, writer.info.rank, None, "define", "info", message, data, time_unix_ns)
        )
        for row in self.keys.define(definition):
            changed = [lane.redefine(row) for lane in self._lanes]
            if any(changed):
                self._redefined.add(row.key_id)

    def _params(self, writer: Writer, values: Mapping[str, Any], time_unix_ns: int) -> None:
        for name, value in values.items():
            text = json.dumps(value, default=str)
            known = self.params.get(name)
            if known is None:
                self.params[name] = (text, writer.info.rank)
                self._effects.params.append(ParamRow(writer.attempt, writer.info.rank, name, text, time_unix_ns))
            elif known[0] != text:
                self._event(
                    writer,
                    time_unix_ns,
                    "disagreement",
                    "warning",
                    f"param {name}: rank {writer.info.rank} has {text}, rank {known[1]} had {known[0]}",
                )

    # -- progress and ends

    def progress(
        self,
        incarnation: bytes,
        step: int | None,
        through_seq: int,
        drops: Mapping[str, int],
        backlog_bytes: int,
        now_ns: int,
    ) -> None:
        """An agent says what it sees of a rank: its ambient step, its drops, what is still to send."""
        writer = self.writers.get(incarnation)
        if writer is None:
            return
        _see(writer, now_ns)
        self.node_seen_ns[writer.info.node_id] = now_ns
        writer.backlog_bytes = backlog_bytes
        known = dict(drops)
        if writer.num_lost:
            known["lost_records"] = writer.num_lost
        if writer.num_refused:
            known["run_key_limit"] = writer.num_refused
        if known != writer.drops:
            writer.drops = known
            self._effects.writers[writer.writer_id] = writer
        if step is not None:
            writer.pending_step = (step, through_seq)
            self._reach_pending(writer, now_ns)

    def _reach_pending(self, writer: Writer, now_ns: int) -> None:
        if writer.pending_step is not None and writer.pending_step[1] <= writer.next_seq:
            step = writer.pending_step[0]
            writer.pending_step = None
            if step > writer.step:
                old_step, writer.step = writer.step, step
                writer.first_step = min(writer.first_step, step)
                writer.move(old_step, now_ns)
            if writer.is_reduced:
                self._lane(writer).watermark.advance(writer.info.rank, step, now_ns)

    def bye(self, incarnation: bytes, next_seq: int, now_ns: int, time_unix_ns: int) -> None:
        """A writer's process is gone; seqs below `next_seq` exist."""
        writer = self.writers.get(incarnation)
        if writer is None or writer.state in ENDED:
            return
        writer.last_seen_ns = now_ns
        writer.last_seq = next_seq
        self._settle_end(writer, time_unix_ns)

    def _settle_end(self, writer: Writer, time_unix_ns: int) -> None:
        if not writer.has_ended or writer.state in ENDED:
            return
        writer.state = final_state(writer)
        writer.ended_unix_ns = writer.ended_unix_ns or time_unix_ns
        if writer.state == "died" or writer.exit_code or writer.signal:
            writer.detail = writer.detail or describe_exit(writer.exit_code, writer.signal)
        self._note_end(writer, time_unix_ns)
        if writer.is_reduced:
            attempt = self._lane(writer)
            if attempt.holders.get(writer.info.rank) is writer:
                attempt.watermark.end(writer.info.rank, finished=writer.state == "finished")
        self._effects.writers[writer.writer_id] = writer

    def _note_end(self, writer: Writer, time_unix_ns: int) -> None:
        """Put an end that was none to wish for on the run; that of a sampler, its node's agent does."""
        if writer.is_system:
            return
        kind = "death" if writer.state == "died" else "failure" if writer.finish_status == "failed" else "exit"
        if kind != "exit" or (writer.finish_status == "finished" and writer.state != "finished"):
            self._event(writer, time_unix_ns, kind, "error", f"rank {writer.info.rank}: {writer.detail}")

    def node(self, node_id: str, is_over: bool, now_ns: int) -> None:
        """A node's sign of life; `is_over`: no further writer will come from it."""
        self.node_seen_ns[node_id] = now_ns
        self.nodes_over[node_id] = is_over

    def rank_exit(
        self, rank: int, pid: int, exit_code: int | None, signal: int | None, message: str, time_unix_ns: int
    ) -> None:
        """The launcher says how a rank of the current attempt ended."""
        ranks = [writer for writer in self.writers.values() if not writer.is_system]
        candidates = [w for w in ranks if w.info.rank == rank and pid in (0, w.info.pid)]
        if candidates:
            self._exited(candidates[-1], exit_code, signal, message, time_unix_ns)
        else:  # the launcher was faster than the agent's Hello
            self._early_exits.append((rank, pid, exit_code, signal, message))

    def exited(self, incarnation: bytes, status: int, time_unix_ns: int) -> None:
        """The agent has learned the wait(2) status of a writer's process. It says so again and again."""
        writer = self.writers.get(incarnation)
        if writer is not None and not writer.is_system and writer.exit_code is None and writer.signal is None:
            self._exited(writer, *split_status(status), "", time_unix_ns)

    def _exited(
        self, writer: Writer, exit_code: int | None, signal: int | None, message: str, time_unix_ns: int
    ) -> None:
        detail = writer.detail
        writer.exit_code, writer.signal = exit_code, signal
        self._effects.writers[writer.writer_id] = writer
        if writer.state in ENDED:  # else its end, which is still to come, will say it
            writer.state = final_state(writer)
            if detail in ("", UNKNOWN_DEATH):
                writer.detail = describe_exit(exit_code, signal)
        writer.detail = message or writer.detail
        if writer.detail not in ("", detail):
            self._event(writer, time_unix_ns, "exit", "error", f"rank {writer.info.rank}: {writer.detail}")

    def finish(self, status: str, detail: str, now_ns: int) -> None:
        """The launcher's verdict; it becomes the run's status once every record is stored."""
        self.verdict = self._effects.verdict = (status, detail)
        self.verdict_ns = now_ns

    @property
    def is_drained(self) -> bool:
        """Every declared writer has ended and all it left is here."""
        return all(writer.has_ended for writer in self.writers.values())

    def tick(self, now_ns: int, time_unix_ns: int) -> None:
        """Close what is due; decide whether the run is over."""
        for lane in self._lanes:
            self._close(lane, now_ns, time_unix_ns)
        self._watch_for_hangs(now_ns, time_unix_ns)
        self._decide_end(now_ns, time_unix_ns)

    def _watch_for_hangs(self, now_ns: int, time_unix_ns: int) -> None:
        hang_ns = self.options.hang_ns
        if hang_ns <= 0 or now_ns < self._hang_due_ns:
            return
        self._hang_due_ns = now_ns + min(_HANG_CHECK_NS, hang_ns // 8)
        for attempt in self.attempts.values():
            if attempt.hang is not None and is_over(attempt.hang, attempt.holders.values()):
                self._end_hang(attempt, attempt.hang, time_unix_ns)
            if attempt.hang is None and attempt.number == self.attempt:
                writers = [writer for _, writer in sorted(attempt.holders.items())]
                attempt.hang = find_hang(writers, hang_ns, now_ns)
                if attempt.hang is not None:
                    self._begin_hang(attempt, attempt.hang, writers, now_ns, time_unix_ns)

    def _begin_hang(
        self, attempt: Attempt, hang: Hang, writers: Sequence[Writer], now_ns: int, time_unix_ns: int
    ) -> None:
        attempt.hung_unix_ns = time_unix_ns - (now_ns - hang.since_ns)
        rank = hang.ranks[0] if len(hang.ranks) == 1 else None
        data = hang.data(attempt.hung_unix_ns)
        self._effects.events.append(
            EventRow(attempt.number, rank, hang.step, "hang", "warning", hang.message(now_ns), data, time_unix_ns)
        )
        self._effects.stacks += stacks_wanted(hang, writers, self.options.hang_ns, now_ns)

    def _end_hang(self, attempt: Attempt, hang: Hang, time_unix_ns: int) -> None:
        attempt.hang = None
        writers = [attempt.holders[rank] for rank in hang.ranks]
        has_moved = any(writer.step > old for writer, old in zip(writers, hang.steps, strict=True))
        ended = [f"rank {w.info.rank}: {w.state}" for w in writers if w.state != "running"]
        rank = hang.ranks[0] if len(hang.ranks) == 1 else None
        for_s = max(0, time_unix_ns - attempt.hung_unix_ns) / 1e9
        what = f"it moved again after {for_s:.1f} s" if has_moved or not ended else f"over after {for_s:.1f} s"
        message = "; ".join([what, *ended[:_MAX_ENDED_NAMED]])
        step = min(writer.step for writer in writers)
        self._effects.events.append(
            EventRow(attempt.number, rank, step, "hang_over", "info", message, "{}", time_unix_ns)
        )

    def standing(self, writer: Writer, now_ns: int) -> str:
        """Say in a word how a writer stands; see core/hang.py."""
        attempt = self.attempts[writer.attempt]
        reached = int(attempt.watermark.progress.max())
        return standing(writer, attempt.hang, reached, self.options.grace_ns, now_ns)

    def hang_words(self, now_ns: int) -> str:
        """Say how the current attempt hangs; empty: it does not."""
        hang = self.attempts[self.attempt].hang if self.attempts else None
        return hang.message(now_ns) if hang is not None else ""

    def stack(self, incarnation: bytes, text: str, trouble: str, time_unix_ns: int) -> None:
        """An agent has collected a rank's Python stacks, or says why it could not."""
        writer = self.writers.get(incarnation)
        if writer is None:
            return
        rank, step = writer.info.rank, None if writer.step == NO_STEP else writer.step
        message = f"no stack of rank {rank}: {trouble}" if trouble else f"rank {rank} is in {place(text)}"
        data = json.dumps({"text": text})
        level = "warning" if trouble else "info"
        self._effects.events.append(EventRow(writer.attempt, rank, step, "stack", level, message, data, time_unix_ns))

    def _close(self, attempt: Attempt, now_ns: int, time_unix_ns: int, *, at_once: bool = False) -> None:
        for emission in attempt.close(now_ns, at_once=at_once, is_past=attempt.number != self.attempt):
            self._effects.emissions.append((attempt.number, emission))
            self._note_nonfinite(attempt, emission, time_unix_ns)
            for key_id, step in emission.disagreements:
                message = f"{self.keys.names[key_id]} is declared replicated, but ranks differ at step {step}"
                self._effects.events.append(
                    EventRow(attempt.number, None, step, "disagreement", "warning", message, "{}", time_unix_ns)
                )

    def _note_nonfinite(self, attempt: Attempt, emission: Emission, time_unix_ns: int) -> None:
        """Put an event on the run for the first NaN or Inf of each key."""
        for s, k in np.argwhere(emission.bad_rank >= 0).tolist():
            key_id = emission.key_ids[k]
            if key_id in self._nonfinite_keys:
                continue
            self._nonfinite_keys.add(key_id)
            rank, step = int(emission.bad_rank[s, k]), int(emission.steps[s])
            what = "NaN" if emission.nan_count[s, k] else "Inf"
            message = f"{self.keys.names[key_id]}: the first {what}, at step {step} on rank {rank}"
            self._effects.events.append(
                EventRow(attempt.number, rank, step, "nonfinite", "warning", message, "{}", time_unix_ns)
            )

    def _decide_end(self, now_ns: int, time_unix_ns: int) -> None:
        if self.is_closed or not self.writers:
            return
        verdict = self.verdict
        if verdict is None:
            if not self.nodes_over or not all(self.nodes_over.values()) or not self.is_drained:
                return
            verdict = self._own_verdict()
        elif not self.is_drained:
            silent = [w for w in self.writers.values() if not w.has_ended]
            if any(now_ns - max(w.last_seen_ns, self.verdict_ns) < SILENT_NODE_NS for w in silent):
                return
        for lane in self._lanes:
            self._close(lane, now_ns, time_unix_ns, at_once=True)
        if any(lane.has_open for lane in self._lanes):
            return  # the rest with the next commit
        self.is_closed = True
        self.verdict = self._effects.status = verdict

    def _own_verdict(self) -> tuple[str, str]:
        """Say how the run ended when no launcher does: from what the ranks of the last attempt said."""
        members = self.attempts[self.attempt].members
        died = [w for w in members if w.state == "died"]
        failed = [w for w in members if w.state == "failed" or (w.state == "killed" and w.finish_status == "finished")]
        # The exception of a rank whose peer was killed is a consequence; so is a death by what launchers stop ranks with.
        causes = failed + [w for w in died if w.signal is not None and w.signal not in _STOPPED_BY]
        if causes:
            first = min(causes, key=lambda w: w.ended_unix_ns or 0)
            return "failed", f"rank {first.info.rank}: {first.detail}"
        if died:
            first = min(died, key=lambda w: w.ended_unix_ns or 0)
            return "failed", f"rank {first.info.rank}: {first.detail}"
        others = {w.state for w in members} - {"finished"}
        return (others.pop(), "") if others else ("finished", "")

    # -- stale points

    @property
    def unsettled(self) -> list[Stale]:
        """Points that may be stored and are still to change."""
        return self._restored_stale + [stale for lane in self._lanes for stale in lane.unsettled]

    def take_stale(self, now_ns: int, *, at_once: bool = False) -> list[Stale]:
        """Return the points whose values changed after their windows were gone; the caller derives them again."""
        result, self._restored_stale = self._restored_stale, []
        for lane in self._lanes:
            result += lane.take_stale(now_ns, at_once=at_once)
            redefined = tuple(key_id for key_id in self._redefined if lane.has(key_id))
            if redefined:
                result.append(Stale(lane.number, redefined, None))
        self._redefined.clear()
        return result

    # -- restart

    def _restore(self, restored: Restored, now_ns: int) -> None:
        self.keys.restore(restored.keys, restored.definitions)
        self.params = {name: (value, -1) for name, value in restored.params.items()}
        self.verdict = restored.verdict
        self.verdict_ns = now_ns
        self.is_closed = restored.is_closed
        self._restored_stale = list(restored.unsettled)
        for row in restored.attempts:
            emitted_to = {key: step for (number, key), step in restored.emitted_to.items() if number == row.attempt}
            self._make_attempt(row.attempt, row.world_size, row.opened_unix_ns, emitted_to, now_ns)
        for lane in self._lanes:
            lane.is_replaying = True
        for number, data in restored.hangs.items():
            attempt = self.attempts[number]
            attempt.hang, attempt.hung_unix_ns = restore_hang(data, now_ns)
        for writer in restored.writers:
            writer.last_seen_ns = writer.last_moved_ns = writer.watched_ns = now_ns
            writer.first_step = min(writer.step, 0)  # whether its steps went on is not stored: they did
            self.writers[writer.info.incarnation] = self._by_id[writer.writer_id] = writer
            attempt = self._lane(writer)
            attempt.members.append(writer)
            if writer.is_reduced:
                attempt.holders[writer.info.rank] = writer
                if writer.step != NO_STEP:
                    attempt.watermark.advance(writer.info.rank, writer.step, now_ns)
                if writer.state in ENDED:
                    attempt.watermark.end(writer.info.rank, finished=writer.state == "finished")

    def replay(self, writer_id: int, first_seq: int, payload: bytes, now_ns: int) -> None:
        """Rebuild open windows from an entry of the rank log: its scalars only, everything else is in the store.

        Steps that the store has already are passed over: what was still to change of them is in `unsettled`.
        """
        writer = self._by_id[writer_id]
        attempt = self._lane(writer)
        for item in split(payload, first_seq)[1]:
            if isinstance(item, Rows) and writer.is_reduced and item.schema_id in writer.schemas:
                attempt.add(writer, item, NOTHING_YET, now_ns, self.num_entries)
        self.num_entries += 1

    def end_replay(self) -> None:
        """From now on records are new."""
        for lane in self._lanes:
            lane.end_replay()

    def derive(self, stale: Stale, entries: Iterable[tuple[int, int, bytes]]) -> Emission | None:
        """Reduce points again from the rank log; see Attempt.derive()."""
        is_system = self.keys.names[stale.key_ids[0]].startswith(SYSTEM_PREFIX)  # all of them are of one lane
        lane = (self.system if is_system else self.attempts)[stale.attempt]
        return lane.derive(stale, self._by_id, entries)

    @property
    def oldest_entry_needed(self) -> int:
        """Number of the first rank log entry that an open window was made from: a restart replays from there."""
        oldest = [lane.oldest_open for lane in self._lanes]
        return min((entry for entry in oldest if entry is not None), default=self.num_entries)

    # -- helpers

    @property
    def _lanes(self) -> Iterator[Attempt]:
        """What reduces: the lanes of all attempts."""
        return chain(self.attempts.values(), self.system.values())

    def _lane(self, writer: Writer) -> Attempt:
        return (self.system if writer.is_system else self.attempts)[writer.attempt]

    def _make_attempt(
        self, number: int, world_size: int, opened_unix_ns: int, emitted_to: Mapping[int, int], now_ns: int
    ) -> Attempt:
        """Make both lanes of an attempt, and return that of its ranks."""
        options = self.options
        calm = replace(options, grace_ns=options.grace_ns + 2 * options.sample_ns)  # a step comes once in sample_ns
        for lanes, its in ((self.attempts, options), (self.system, calm)):
            lanes[number] = Attempt(number, world_size, opened_unix_ns, its, self.keys, emitted_to, now_ns)
        return self.attempts[number]

    def _event(
        self, writer: Writer, time_unix_ns: int, kind: str, level: str, message: str, *, step: int | None = None
    ) -> None:
        self._effects.events.append(
            EventRow(writer.attempt, writer.info.rank, step, kind, level, message, "{}", time_unix_ns)
        )

    def __repr__(self) -> str:
        ended = sum(writer.has_ended for writer in self.writers.values())
        return (
            f"<Pipeline attempt={self.attempt} writers={len(self.writers)} ended={ended} keys={len(self.keys)} "
            f"values={self.num_values} verdict={self.verdict}>"
        )


def _see(writer: Writer, now_ns: int) -> None:
    """Note a sign of life of the writer's node; after a gap nothing is known of what the rank did in it."""
    if now_ns - writer.last_seen_ns > UNSEEN_NS:
        writer.watched_ns = now_ns
    writer.last_seen_ns = now_ns


def _check_schemas(writer: Writer, items: Iterable[Rows | Record]) -> None:
    """Raise ValueError unless every run of scalars fits its schema, if that came before it."""
    known = {schema_id: len(keys) for schema_id, keys in writer.schemas.items()}
    for item in items:
        if isinstance(item, Rows):
            if known.get(item.schema_id, item.values.shape[1]) != item.values.shape[1]:
                raise ValueError(f"writer {writer.writer_id}: schema {item.schema_id} is not that of these records")
        elif item.kind == KIND_SCHEMA:
            message = item.message or {}
            if not isinstance(message.get("keys"), list) or not isinstance(message.get("id"), int):
                raise ValueError(f"writer {writer.writer_id}: a malformed schema record")
            known[message["id"]] = len(message["keys"])
