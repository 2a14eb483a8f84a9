"""Planted protocol bugs: each must be caught, which shows that the simulator can see its kind."""

import contextlib

import numpy as np
from simulation.sim_edges import SimRankLog

import ddplog.core.pipeline as pipeline_module
from ddplog.agent.shipper import Shipper
from ddplog.aggregator.process import Aggregator
from ddplog.core.awake import AwakeTime
from ddplog.core.dedup import Accept
from ddplog.core.delivery import Delivery
from ddplog.core.panel import Panel
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import NO_STEP
from ddplog.core.watermark import Watermark
from ddplog.store.run_store import RunStore

_batch = Pipeline.batch


def _from(move):
    """Let batch() take what admit() would refuse or trim: the check that seqs follow on is fooled, too."""

    def batch(self, incarnation, first_seq, num_records, payload, now_ns, time_unix_ns):
        writer = self.writers.get(incarnation)
        if writer is not None and move(writer.next_seq, first_seq, first_seq + num_records):
            writer.next_seq = first_seq
        return _batch(self, incarnation, first_seq, num_records, payload, now_ns, time_unix_ns)

    return batch


accepts_gaps = _from(lambda known, first, end: first > known)
takes_duplicates = _from(lambda known, first, end: end <= known)
trims_nothing = _from(lambda known, first, end: first < known < end)


def admits_any(next_seq, first_seq, num_records):
    return Accept(skip=0)


_make_durable, _answer = Aggregator._make_durable, Aggregator._answer


def answers_before_commit(self, effects):
    _answer(self)
    _make_durable(self, effects)


_restore = RunStore.restore


def restores_no_cursor(self):
    restored = _restore(self)
    for writer in restored.writers if restored else ():
        writer.next_seq = 0
    return restored


def restores_no_stale(self):
    restored = _restore(self)
    return restored and restored._replace(unsettled=())


def restores_no_ends(self):
    restored = _restore(self)
    return restored and restored._replace(
        is_closed=False, writers=[w for w in restored.writers if w.state == "running"]
    )


def skips_replay(self, now):
    self.pipeline.end_replay()


def mixes_attempts(self, info, now_ns, time_unix_ns):
    if not self.attempts:
        return self._open_attempt(info, now_ns, time_unix_ns, "start"), True
    return self.attempts[self.attempt], True


_ends = Shipper._ends


def drops_last_batch(self, read):
    for tracked in self.tracked.values():
        if not tracked.is_alive and tracked.bye_seq is None and tracked.in_flight:
            tracked.bye_seq = tracked.acked_seq
            tracked.is_done = True
    yield from _ends(self, read)


_resume = Shipper._resume


def ignores_welcome(self, incarnation, next_seq, now_ns):
    tracked = self.tracked.get(incarnation)
    if tracked is not None and tracked.reader.next_seq:
        next_seq = max(next_seq, tracked.reader.next_seq)
    _resume(self, incarnation, next_seq, now_ns)


_batches = Shipper._batches


def never_resends(self, now_ns):
    for tracked in self.tracked.values():
        tracked.sent_ns = now_ns
    yield from _batches(self, now_ns)


def forgets_in_flight(self, now_ns):
    for tracked in self.tracked.values():
        if tracked.in_flight and now_ns - tracked.sent_ns > 100_000_000:
            tracked.forget()
    yield from _batches(self, now_ns)


_retryable = Delivery.failed_retryable


def cursor_before_answer(self, now_ns, jitter, retry_after_s=None):
    self.succeeded(self.position)
    return now_ns + 1


def other_bounds(self, now_ns, jitter, retry_after_s=None):
    self._sizes.clear()
    return _retryable(self, now_ns, jitter, retry_after_s)


def buries_whole_batch(self, reason):
    size = self._answered()
    for _ in range(size):
        self.cursor = self._queue.popleft().id


def ignores_unseen(self, now_ns):
    shown = self.progress[self.progress != NO_STEP]
    return int(shown.min()) - 1 if len(shown) else NO_STEP


_put = Panel._put


def overwrites(self, rank, row, slots, rows, columns):
    cells = np.ix_([row], slots, range(len(self.key_ids)) if columns is None else list(columns))
    self._value[cells], self._count[cells] = np.nan, 0
    _put(self, rank, row, slots, rows, columns)


_slot = Panel._slot


def discards_late(self, step, late_to, now_ns):
    slot = self._slots.get(step)
    if slot is None and self._evicted_to is not None and step <= self._evicted_to:
        return -1
    return _slot(self, step, late_to, now_ns)


_locate_from_end = RunStore.commit


def replays_from_end(self, effects, locate, time_unix_ns):
    _locate_from_end(self, effects, lambda positions: locate(positions) and None, time_unix_ns)


def syncs_no_log(self):
    pass


_derive = Pipeline.derive


def derives_without_this_commit(self, stale, entries):
    entries = list(entries)
    return _derive(self, stale, entries[:-1])


def bye_ends_at_once(self, incarnation, next_seq, now_ns, time_unix_ns):
    writer = self.writers.get(incarnation)
    if writer is not None:
        writer.last_seq = writer.next_seq
        self._settle_end(writer, time_unix_ns)


MUTANTS = {
    "gaps accepted": (Pipeline, "batch", accepts_gaps),
    "duplicates taken": (Pipeline, "batch", takes_duplicates),
    "overlaps not trimmed": (Pipeline, "batch", trims_nothing),
    "admit() admits anything": (pipeline_module, "admit", admits_any),
    "acknowledges before the commit": (Aggregator, "_make_durable", answers_before_commit),
    "cursors are not restored": (RunStore, "restore", restores_no_cursor),
    "stale set lost on restart": (RunStore, "restore", restores_no_stale),
    "ended writers lost on restart": (RunStore, "restore", restores_no_ends),
    "replay skipped": (Aggregator, "_replay", skips_replay),
    "replay begins at the end": (RunStore, "commit", replays_from_end),
    "rank log not synced": (SimRankLog, "sync", syncs_no_log),
    "attempts are mixed": (Pipeline, "_choose_attempt", mixes_attempts),
    "last batch dropped before Bye": (Shipper, "_ends", drops_last_batch),
    "Bye believed without the records": (Pipeline, "bye", bye_ends_at_once),
    "Welcome does not rewind": (Shipper, "_resume", ignores_welcome),
    "never resends": (Shipper, "_batches", never_resends),
    "in-flight forgotten without resend": (Shipper, "_batches", forgets_in_flight),
    "sink cursor moves before the answer": (Delivery, "failed_retryable", cursor_before_answer),
    "retry with other bounds": (Delivery, "failed_retryable", other_bounds),
    "batch with a poison is dropped": (Delivery, "failed_permanent", buries_whole_batch),
    "late value overwrites": (Panel, "_put", overwrites),
    "late value discarded": (Panel, "_slot", discards_late),
    "derive() misses the last entry": (Pipeline, "derive", derives_without_this_commit),
    "its own stall taken for silence": (AwakeTime, "at", lambda self, now_ns: now_ns),
    "watermark ignores unseen ranks": (Watermark, "value", ignores_unseen),
}


@contextlib.contextmanager
def planted(name):
    """Plant one bug."""
    owner, attribute, mutant = MUTANTS[name]
    original = owner.__dict__[attribute]
    setattr(owner, attribute, mutant)
    try:
        yield
    finally:
        setattr(owner, attribute, original)
