"""Stands in for what is outside the core, the shipper, the aggregator's loop and the store's SQL: files, sockets, clocks,
signals. Everything asks the World of the moment, so that one patch serves many worlds.
"""

import contextlib
import json
import os
import sqlite3
from types import SimpleNamespace

from simulation.sim_plan import EPOCH, MS

import ddplog.agent.shipper as shipper_module
import ddplog.aggregator.process as process_module
import ddplog.store.run_store as run_store_module
from ddplog.core.panel import Panel
from ddplog.core.records import NO_STEP, PREFIX
from ddplog.journal.reader import Chunk
from ddplog.store.emissions import EmissionReader
from ddplog.store.rank_log import Position

ENTRIES_PER_FILE = 8


class Crash(BaseException):
    """The process died here."""


class Now:
    """The world that the stand-ins belong to."""

    world = None


class SimPath:
    """A path to nothing."""

    def __init__(self, name=""):
        self.name = name

    def __truediv__(self, name):
        return SimPath(name)

    def exists(self):
        return True

    def mkdir(self, **_):
        pass

    def unlink(self, **_):
        pass

    def __str__(self):
        return self.name


# -- the journal


class JournalPath(SimPath):
    """A journal's folder; it has all its files."""

    def __init__(self, journal):
        super().__init__(f"{'system-' if journal.of else ''}{journal.rank}.{journal.number}")
        self.journal = journal

    def exists(self):
        return True

    def __truediv__(self, name):
        return self


class JobFolder(SimPath):
    """The job's folder on one node."""

    def __init__(self, world, node):
        super().__init__("job")
        self._world, self._node = world, node

    def iterdir(self):
        return [JournalPath(journal) for journal in self._world.born(self._node)]


class SimReader:
    """As JournalReader, over a Journal of the plan."""

    holder = 0  # whose exit status nobody learns
    is_at_exit = False
    num_unarrived = 0  # nothing waits on a device

    def __init__(self, path):
        self.journal = path.journal
        self.incarnation = self.journal.incarnation
        self.next_seq = 0
        self.last_time_unix_ns = 0
        journal = self.journal
        self.identity = {
            "rank": journal.rank, "world_size": journal.world_size, "local_rank": journal.rank,
            "node_rank": journal.node, "pid": 100 + journal.number, "host": "h", "boot_id": "b",
            "started_unix_ns": journal.born_ns,
        }  # fmt: skip
        if journal.of is not None:
            self.identity |= {"role": "system", "belongs_to": journal.of.incarnation.hex()}
        self.next_seq = journal.oldest_seq

    @property
    def is_alive(self):
        return Now.world.now_ns < self.journal.ends_ns

    @property
    def _visible(self):
        journal, now = self.journal, Now.world.now_ns
        while journal.visible < len(journal.frames) and journal.due_ns[journal.visible] <= now:
            journal.visible += 1
        return journal.visible

    @property
    def step(self):
        visible = self._visible
        step = self.journal.steps[visible - 1] if visible else NO_STEP
        return None if step == NO_STEP else step

    @property
    def has_finished(self):
        return self.journal.has_finished and not self.is_alive

    @property
    def drops(self):
        return {}

    @property
    def acked_seq(self):
        return self.journal.acked_seq

    @property
    def oldest_seq(self):
        return self.journal.oldest_seq

    def set_acked(self, next_seq):
        Now.world.check_acked(self.incarnation, next_seq)
        self.journal.acked_seq = next_seq

    def read(self, max_bytes):
        start, end, size = self.next_seq, self.next_seq, 0
        while end < self._visible and size < max_bytes:
            size += len(self.journal.frames[end])
            end += 1
        if end == start:
            return None
        payload = b"".join(self.journal.frames[start:end])
        self.last_time_unix_ns = PREFIX.unpack_from(self.journal.frames[end - 1])[6]
        self.next_seq = end
        return Chunk(first_seq=start, num_records=end - start, payload=payload, epoch=EPOCH)

    def seek(self, seq):
        self.next_seq = max(self.journal.oldest_seq, min(seq, self._visible))

    def sync(self):
        pass

    def trim(self, acked_seq, keep_bytes):
        if not keep_bytes:
            self.journal.oldest_seq = max(self.journal.oldest_seq, min(acked_seq, self._visible))

    def close(self):
        pass


# -- the store


class SimDatabase(sqlite3.Connection):
    """In memory, so it outlives the process; what was not committed does not."""

    def execute(self, sql, *args):
        if sql == "COMMIT":
            Now.world.may_crash("before the transaction's commit")
            Now.world.may_fail_to_write()
            super().execute(sql, *args)
            Now.world.may_crash("after the transaction's commit")
            return None
        return super().execute(sql, *args)

    def close(self):
        pass


class SimRankLog:
    """As RankLog; the entries are the world's. What was not synced may be lost in a crash."""

    def __init__(self, folder, end):
        self._entries = Now.world.rank_log
        count = _ordinal(end)
        Now.world.check(count <= len(self._entries), f"the rank log has {len(self._entries)} entries, not {count}")
        del self._entries[count:]

    @property
    def end(self):
        return _position(len(self._entries))

    def extend(self, entries):
        positions = []
        for entry in entries:
            Now.world.may_fail_to_write()
            positions.append(self.end)
            self._entries.append(entry)
            Now.world.may_crash("amid the rank log's append")
        return positions

    def sync(self):
        Now.world.may_crash("before the rank log's sync")
        Now.world.num_synced = len(self._entries)

    def rewind(self, end):
        if not Now.world.is_crashing:
            del self._entries[_ordinal(end) :]

    def trim(self, max_bytes, keep_from):
        return []

    def close(self):
        pass


def _position(count):
    return Position(1 + count // ENTRIES_PER_FILE, count % ENTRIES_PER_FILE)


def _ordinal(position):
    return (position.file - 1) * ENTRIES_PER_FILE + position.offset


def iter_entries(folder, start=None, end=None):
    entries = Now.world.rank_log
    first = 0 if start is None else _ordinal(start)
    for ordinal in range(first, _ordinal(end)):
        entry = entries[ordinal]
        yield SimpleNamespace(
            position=_position(ordinal), writer_id=entry[0], first_seq=entry[4], payload=entry[6], num_records=entry[5]
        )


class SimEmissions(EmissionReader):
    """Reads the world's database."""

    def __init__(self, database):
        self._db = database

    def _connection(self):
        return self._db

    @contextlib.contextmanager
    def _reading(self):
        yield self._db


# -- the aggregator's surroundings


class SimRouter:
    """As RouterEndpoint: poll() is where the world goes on."""

    endpoint = "sim"

    def __init__(self, **_):
        Now.world.listen()

    def poll(self, timeout_ms):
        return Now.world.poll(timeout_ms)

    def send(self, routing_id, data):
        Now.world.may_crash("before an answer")
        Now.world.answer(routing_id, data)
        return True

    def close(self):
        pass


class SimSnapshots:
    trouble = ""

    def __init__(self, *_):
        self.current = None

    def note(self, effects):
        pass

    def refresh(self, *_, **__):
        pass


class SimForwarders:
    have_ended = True

    def __init__(self, *_):
        pass

    def supervise(self, now, last_id):
        pass

    def resume(self):
        pass

    def leave(self):
        pass


class SimControl:
    def __init__(self, *_, **__):
        pass

    def stop(self, grace):
        """Let the agents hear the last answers before the router closes, as gRPC's stop does."""
        Now.world.sleep(150 * MS)


class Over:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def _nothing(*_, **__):
    return None


_TIME = SimpleNamespace(
    monotonic_ns=lambda: Now.world.now_ns,
    time_ns=lambda: Now.world.now_ns,
    sleep=lambda seconds: Now.world.sleep(int(seconds * 1e9)),
)
_PATCHES = (
    (process_module, {
        "RouterEndpoint": SimRouter, "Snapshots": SimSnapshots, "Forwarders": SimForwarders, "ControlServer": SimControl,
        "load_secret": _nothing, "aggregator_keys": _nothing, "allow_list": _nothing, "self_attack": _nothing,
        "_POLL_MS": 100, "write_atomic": _nothing, "_start_ticks": lambda: 0, "time": _TIME, "ensure_agent": _nothing,
        "signal": SimpleNamespace(signal=_nothing, SIGTERM=15),
    }),
    (run_store_module, {
        "os": Over(os, open=lambda *_: -1, close=_nothing, chmod=_nothing),
        "fcntl": SimpleNamespace(lockf=_nothing, LOCK_EX=0, LOCK_NB=0),
        "sqlite3": Over(sqlite3, connect=lambda *_, **__: Now.world.database),
        "RankLog": SimRankLog, "iter_entries": iter_entries, "whole_end": lambda folder, start, end: end,
    }),
    (shipper_module, {
        "JournalReader": SimReader, "BATCH_BYTES": 300, "WINDOW_BYTES": 1200, "RESEND_NS": 400 * MS,
    }),
)  # fmt: skip


@contextlib.contextmanager
def edges():
    """Put the stand-ins in place."""
    with contextlib.ExitStack() as stack:
        for module, names in _PATCHES:
            for name, value in names.items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        defaults = Panel.__init__.__kwdefaults__
        stack.callback(defaults.__setitem__, "keep_closed", defaults["keep_closed"])
        defaults["keep_closed"] = 2
        yield


def stored_meta(database, key):
    row = sqlite3.Connection.execute(database, "SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else json.loads(row[0])
