"""Owns the writing side of `run.db` and the rank log: makes the pipeline's effects durable, and restores them.

Guarantees: commit() returns only when everything in the effects is durable, the rank log first, then one SQLite
transaction (WAL, synchronous=FULL); what it raises leaves both as they were. One process writes a store: it holds
`writer.lock` (a POSIX lock) while it lives. A rank log that is shorter than the store says is noticed when the store is
opened, said in an event, and filled again from the ranks' journals as far as those still have it.
Does not guarantee: anything about sinks; they have cursors of their own.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ddplog.core.effects import ENDED, AttemptRow, Effects, KeyRow, Restored, Stale, Writer, WriterInfo
from ddplog.core.panel import Emission
from ddplog.core.records import NO_STEP
from ddplog.errors import ConfigError, DdplogError
from ddplog.killpoints import reach
from ddplog.store import schema
from ddplog.store.rank_log import Position, RankLog, file_numbers, iter_entries, next_seqs, sync_folder, whole_end

_logger = logging.getLogger("ddplog.store")
_INSERT_POINT = (
    f"INSERT INTO points ({', '.join(schema.POINT_FIELDS)}) VALUES ({', '.join('?' * len(schema.POINT_FIELDS))})"
)
_COLUMNS = ", ".join(schema.POINT_FIELDS)


class StoreError(DdplogError):
    """The store could not be written (a full disk, usually); it is as it was before."""


class RunStore:
    """A run's store, opened by the one process that writes it.

    Args:
        run_dir: The run's folder; made if it is not there.
        run: What META_RUN says; kept from the first start.

    Raises:
        ConfigError: If another process writes this run, or the store has a format that is not ours.
    """

    def __init__(self, run_dir: Path, run: Mapping[str, Any]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self._lock = os.open(run_dir / "writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise ConfigError("run_id", run_dir.name, "another aggregator is writing this run") from exc
        try:
            self._open(run)
        except BaseException:
            if hasattr(self, "_db"):
                self._db.close()
            os.close(self._lock)
            raise

    def _open(self, run: Mapping[str, Any]) -> None:
        run_dir = self.run_dir
        is_new = not (run_dir / "run.db").exists()
        self._db = sqlite3.connect(run_dir / "run.db", isolation_level=None)
        os.chmod(run_dir / "run.db", 0o600)
        self._check_format()
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA wal_autocheckpoint=4000")
        self._db.executescript(schema.SCHEMA)
        if self._meta(schema.META_FORMAT) is None:
            self._db.execute("BEGIN IMMEDIATE")
            self._put_meta(schema.META_FORMAT, schema.FORMAT_VERSION)
            self._put_meta(schema.META_RUN, dict(run))
            self._put_meta(schema.META_STORE_UUID, uuid4().hex)
            self._put_meta(schema.META_NEXT_ID, 1)
            self._put_meta(schema.META_STATUS, {"status": "running", "detail": "", "ended_unix_ns": None})
            self._db.execute("COMMIT")
        self._migrate()
        self._begin_life()
        if is_new:
            sync_folder(run_dir)
            sync_folder(run_dir.parent)
        self.uuid = bytes.fromhex(self._meta(schema.META_STORE_UUID))
        self.created_unix_ns = int(self._meta(schema.META_RUN).get("created_unix_ns") or 0)
        """When the run was begun first; a job that continues it has a time of its own."""
        self._check_rank_log()
        self._next_id = int(self._meta(schema.META_NEXT_ID))
        self._num_replaced = int(self._meta(schema.META_REPLACED) or 0)
        self._emitted_to = self._read_emitted_to()
        self._unsettled: list[tuple[int, list[int], list[int]]] = self._meta(schema.META_UNSETTLED) or []
        self._refill = {int(key): int(seq) for key, seq in (self._meta(schema.META_REFILL) or {}).items()}
        places = self._places()
        self.replay_from = places["replay_from"]
        self.rank_log = RankLog(run_dir / "ranks", places["end"])
        self.num_points = self._next_id - 1
        self._has_failed = False
        """Whether a commit has failed and is still to be taken back."""

    def _check_format(self) -> None:
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
            return
        version = self._meta(schema.META_FORMAT)
        if version not in (None, *schema.READABLE):
            what = f"{self.run_dir / 'run.db'}: format {version}; this ddplog reads and writes {schema.FORMAT_VERSION}"
            raise ConfigError("run_id", self.run_dir.name, what)

    def _migrate(self) -> None:
        """Make a store of an older format one of the newest, each format at once or not at all."""
        for version in range(self._meta(schema.META_FORMAT), schema.FORMAT_VERSION):
            self._db.execute("BEGIN IMMEDIATE")
            for statement in schema.MIGRATIONS[version]:
                self._db.execute(statement)
            self._put_meta(schema.META_FORMAT, version + 1)
            self._db.execute("COMMIT")
            _logger.info("%s: format %d is now %d", self.run_dir, version, version + 1)

    def _places(self) -> Mapping[str, Position]:
        places = self._meta(schema.META_RANK_LOG) or {"end": [1, 0], "replay_from": [1, 0]}
        return {name: Position(*place) for name, place in places.items()}

    def _check_rank_log(self) -> None:
        """Take the rank log as it is, if it is shorter than it was: the journals are asked for the rest.

        What it has lost was acknowledged: its points are stored as far as their steps were closed, and so is everything
        else. Only the records themselves are needed again, for open windows and for what is derived later, so each
        writer's next seq goes back, and what comes is not counted twice (META_REFILL).
        """
        folder, places = self.run_dir / "ranks", self._places()
        end = whole_end(folder, places["replay_from"], places["end"])
        if end == places["end"]:
            return
        logged = next_seqs(folder, end)
        left = [number for number in file_numbers(folder) if number <= end.file]
        is_trimmed = left[:1] > [1]  # then a writer without an entry may have had its last one there
        rows = self._db.execute("SELECT writer_id, next_seq FROM writers").fetchall()
        refill = dict(self._meta(schema.META_REFILL) or {})
        for writer_id, next_seq in rows:
            if logged.setdefault(writer_id, next_seq if is_trimmed else 0) < next_seq:
                refill.setdefault(str(writer_id), next_seq)
        lost = f"{folder} ends at {_show(end)}, and {_show(places['end'])} was stored: cut, damaged, or not what was synced"
        message = f"{lost}; the journals of {len(refill)} ranks are asked to fill it again"
        _logger.error("%s", message)
        replay_from = min(places["replay_from"], end)
        event_id = int(self._meta(schema.META_NEXT_ID))
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "UPDATE writers SET next_seq = ?, step = NULL WHERE writer_id = ?",
            [(logged[int(writer_id)], int(writer_id)) for writer_id in refill],
        )
        self._put_meta(schema.META_RANK_LOG, {"end": list(end), "replay_from": list(replay_from)})
        self._put_meta(schema.META_REFILL, refill)
        self._db.execute(
            "INSERT INTO events (id, attempt, rank, step, kind, level, message, time_unix_ns) "
            "SELECT ?, COALESCE(MAX(attempt), 0), NULL, NULL, 'damage', 'error', ?, ? FROM attempts",
            (event_id, message, time.time_ns()),
        )
        self._put_meta(schema.META_NEXT_ID, event_id + 1)
        self._db.execute("COMMIT")

    def _begin_life(self) -> None:
        """Write, and only then read where the rank log ends and cut it there.

        A life that was killed inside COMMIT may have its transaction in the WAL while the shared index does not know of
        it: nobody sees it, until the index is made again from the WAL once the last connection is gone. This
        transaction takes its place, so what we do not see now never comes back.
        """
        self._db.execute("BEGIN IMMEDIATE")
        self._put_meta(schema.META_LIVES, int(self._meta(schema.META_LIVES) or 0) + 1)
        self._db.execute("COMMIT")

    def _read_emitted_to(self) -> dict[tuple[int, int], int]:
        """Return the largest step of each attempt and key.

        A restart waits for it. Of one attempt it is a look-up per key, which the index answers whatever the run's
        length; of several it is a pass over the whole index (0.3 s per million points).
        """
        attempts = self._db.execute("SELECT attempt FROM attempts LIMIT 2").fetchall()
        if len(attempts) == 1:
            sql = f"SELECT {attempts[0][0]}, key_id, (SELECT MAX(step) FROM points p WHERE p.key_id = k.key_id) FROM keys k"
        else:
            sql = "SELECT attempt, key_id, MAX(step) FROM points GROUP BY key_id, attempt"
        rows = self._db.execute(sql).fetchall()
        return {(attempt, key_id): step for attempt, key_id, step in rows if step is not None}

    # -- restart

    def restore(self) -> Restored | None:
        """Return what an earlier life left; None for a new store."""
        attempts = [
            AttemptRow(*row)
            for row in self._db.execute(
                "SELECT attempt, world_size, opened_unix_ns, reason FROM attempts ORDER BY attempt"
            ).fetchall()
        ]
        if not attempts:
            return None
        schemas: dict[int, dict[int, tuple[str, ...]]] = {}
        for writer_id, schema_id, keys in self._db.execute("SELECT writer_id, schema_id, keys FROM schemas").fetchall():
            schemas.setdefault(writer_id, {})[schema_id] = tuple(json.loads(keys))
        drops: dict[int, dict[str, int]] = {}
        for writer_id, reason, count in self._db.execute("SELECT writer_id, reason, count FROM drops").fetchall():
            drops.setdefault(writer_id, {})[reason] = count
        writers = [
            self._writer(row, schemas, drops, self._refill.get(row[0], 0))
            for row in self._db.execute(
                "SELECT writer_id, incarnation, attempt, rank, world_size, local_rank, node_rank, host, pid, boot_id, "
                "started_unix_ns, next_seq, step, state, is_reduced, finish_status, num_values, exit_code, signal, detail, "
                "ended_unix_ns, role FROM writers "
                "ORDER BY writer_id"
            ).fetchall()
        ]
        status, verdict = self.status, self._meta(schema.META_VERDICT)
        return Restored(
            verdict=(str(verdict[0]), str(verdict[1])) if verdict and verdict[0] else None,
            is_closed=status["status"] != "running",
            unsettled=[Stale(attempt, tuple(key_ids), frozenset(steps)) for attempt, key_ids, steps in self._unsettled],
            writers=writers,
            attempts=attempts,
            keys=[
                KeyRow(key_id, name, reduce, bool(replicated))
                for key_id, name, reduce, replicated in self._db.execute(
                    "SELECT key_id, name, reduce, replicated FROM keys ORDER BY key_id"
                ).fetchall()
            ],
            params=dict(self._db.execute("SELECT name, value FROM params ORDER BY id DESC").fetchall()),
            emitted_to=dict(self._emitted_to),
            definitions=[
                tuple(json.loads(data))
                for (data,) in self._db.execute("SELECT data FROM events WHERE kind = 'define' ORDER BY id").fetchall()
            ],
            hangs=self._read_hangs(),
        )

    def _read_hangs(self) -> dict[int, str]:
        """Return the data of each attempt's last `hang` event, unless a `hang_over` followed."""
        sql = "SELECT attempt, kind, data FROM events WHERE kind IN ('hang', 'hang_over') ORDER BY id"
        last = {attempt: (kind, data) for attempt, kind, data in self._db.execute(sql).fetchall()}
        return {attempt: data for attempt, (kind, data) in last.items() if kind == "hang"}

    @staticmethod
    def _writer(
        row: tuple[Any, ...],
        schemas: Mapping[int, dict[int, tuple[str, ...]]],
        drops: Mapping[int, dict[str, int]],
        refill_to: int,
    ) -> Writer:
        (writer_id, incarnation, attempt, rank, world_size, local_rank, node_rank, host, pid, boot, started, next_seq,
         step, state, is_reduced, finish_status, num_values, exit_code, signal, detail, ended, role) = row  # fmt: skip
        has_ended = state in ENDED
        return Writer(
            writer_id=writer_id,
            info=WriterInfo(
                incarnation=incarnation,
                rank=rank,
                world_size=world_size,
                local_rank=local_rank,
                node_rank=node_rank,
                node_id=str(node_rank),
                host=host,
                pid=pid,
                boot_id=boot,
                started_unix_ns=started,
                is_alive=not has_ended,
                role=role,
            ),
            attempt=attempt,
            is_reduced=bool(is_reduced),
            next_seq=next_seq,
            refill_to=refill_to,
            last_seq=max(next_seq, refill_to) if has_ended else None,
            state=state,
            said_finish=bool(finish_status),
            finish_status=finish_status,
            detail=detail,
            exit_code=exit_code,
            signal=signal,
            ended_unix_ns=ended,
            step=NO_STEP if step is None else step,
            schemas=schemas.get(writer_id, {}),
            drops=drops.get(writer_id, {}),
            num_lost=drops.get(writer_id, {}).get("lost_records", 0),
            num_refused=drops.get(writer_id, {}).get("run_key_limit", 0),
            num_values=num_values,
        )

    def entries(self, start: Position | None = None) -> Iterator[tuple[Position, int, int, bytes]]:
        """Yield (position, writer_id, first_seq, payload) of the rank log."""
        for entry in iter_entries(self.run_dir / "ranks", start, self.rank_log.end):
            yield entry.position, entry.writer_id, entry.first_seq, entry.payload

    # -- commit

    def commit(self, effects: Effects, locate: Callable[[list[Position]], Position | None], time_unix_ns: int) -> None:
        """Make the effects durable.

        Args:
            effects: From the pipeline.
            locate: Given the positions of the effects' log entries, in order, returns where a restart has to begin;
                None: at the end of the log.
            time_unix_ns: Now.

        Raises:
            StoreError: Nothing of the effects has been stored.
        """
        before = self.rank_log.end
        next_id, num_points, num_replaced = self._next_id, self.num_points, self._num_replaced
        try:
            if self._has_failed:
                self._roll_back()
            positions = self.rank_log.extend(effects.log)
            if positions:
                reach("aggregator.after_log_append")
                self.rank_log.sync()
                reach("aggregator.after_log_sync")
            self._db.execute("BEGIN IMMEDIATE")
            self._write(effects, time_unix_ns)
            replay_from = locate(positions) or self.rank_log.end
            place = {"end": list(self.rank_log.end), "replay_from": list(replay_from)}
            self._put_meta(schema.META_RANK_LOG, place)
            self._put_meta(schema.META_NEXT_ID, self._next_id)
            if self._num_replaced != num_replaced:
                self._put_meta(schema.META_REPLACED, self._num_replaced)
            rows = [(stale.attempt, list(stale.key_ids), sorted(stale.steps or ())) for stale in effects.unsettled]
            if rows != self._unsettled:
                self._put_meta(schema.META_UNSETTLED, rows)
            refill = {
                writer_id: seq
                for writer_id, seq in self._refill.items()
                if writer_id not in effects.writers or effects.writers[writer_id].next_seq < seq
            }
            if refill != self._refill:
                self._put_meta(schema.META_REFILL, refill)
            reach("aggregator.before_sql_commit")
            self._db.execute("COMMIT")
            self._unsettled, self._refill = rows, refill
        except BaseException as exc:
            self._has_failed = True
            self.rank_log.rewind(before)
            self._next_id, self.num_points, self._num_replaced = next_id, num_points, num_replaced
            with suppress(sqlite3.Error):  # else the next commit begins with it
                self._roll_back()
            if isinstance(exc, (OSError, sqlite3.Error)):
                raise StoreError(f"{self.run_dir}: {exc}") from exc
            raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._emitted_to = self._read_emitted_to()
        self._has_failed = False

    def _write(self, effects: Effects, time_unix_ns: int) -> None:
        db = self._db
        for attempt_row in effects.attempts:
            db.execute("INSERT OR IGNORE INTO attempts VALUES (?, ?, ?, ?)", attempt_row)
        for key in effects.keys:
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?) ON CONFLICT (key_id) DO UPDATE SET "
                "reduce = excluded.reduce, replicated = excluded.replicated",
                (key.key_id, key.name, key.reduce, int(key.replicated)),
            )
        for writer in effects.writers.values():
            self._write_writer(writer)
        for writer_id, schema_id, keys in effects.schemas:
            db.execute("INSERT OR IGNORE INTO schemas VALUES (?, ?, ?)", (writer_id, schema_id, json.dumps(keys)))
        for attempt, emission in effects.emissions:
            self._write_points(attempt, emission)
        for table, rows in (("params", effects.params), ("texts", effects.texts), ("events", effects.events)):
            for row in rows:
                names = ", ".join(("id", *row._fields))
                marks = ", ".join("?" * (len(row) + 1))
                db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", (self._take_ids(1), *row))
        if effects.verdict is not None:
            self._put_meta(schema.META_VERDICT, effects.verdict)
        if effects.status is not None:
            status, detail = effects.status
            ended = None if status == "running" else time_unix_ns
            self._put_meta(schema.META_STATUS, {"status": status, "detail": detail, "ended_unix_ns": ended})

    def _write_writer(self, writer: Writer) -> None:
        info = writer.info
        self._db.execute(
            "INSERT INTO writers (writer_id, incarnation, attempt, rank, world_size, local_rank, node_rank, host, pid, "
            "boot_id, started_unix_ns, next_seq, step, state, is_reduced, finish_status, num_values, exit_code, signal, "
            f"detail, ended_unix_ns, role) VALUES ({', '.join('?' * 22)}) ON CONFLICT (writer_id) DO UPDATE SET "
            "next_seq = excluded.next_seq, step = excluded.step, state = excluded.state, "
            "finish_status = excluded.finish_status, num_values = excluded.num_values, "
            "exit_code = excluded.exit_code, signal = excluded.signal, detail = excluded.detail, "
            "ended_unix_ns = excluded.ended_unix_ns",
            (
                writer.writer_id,
                info.incarnation,
                writer.attempt,
                info.rank,
                info.world_size,
                info.local_rank,
                info.node_rank,
                info.host,
                info.pid,
                info.boot_id,
                info.started_unix_ns,
                writer.next_seq,
                None if writer.step == NO_STEP else writer.step,
                writer.state,
                int(writer.is_reduced),
                writer.finish_status,
                writer.num_values,
                writer.exit_code,
                writer.signal,
                writer.detail,
                writer.ended_unix_ns,
                info.role,
            ),
        )
        for reason, count in writer.drops.items():
            self._db.execute("INSERT OR REPLACE INTO drops VALUES (?, ?, ?)", (writer.writer_id, reason, count))

    def _write_points(self, attempt: int, emission: Emission) -> None:
        exists = emission.block.n > 0
        keys = np.asarray(emission.key_ids)
        steps_at, keys_at = np.nonzero(exists)
        if len(steps_at):
            rows = self._rows(attempt, emission, exists, emission.steps[steps_at], keys[keys_at], steps_at)
            lowest = {key: int(emission.steps[0]) for key in emission.key_ids}
            is_new = all(self._emitted_to.get((attempt, key), NO_STEP) < lowest[key] for key in emission.key_ids)
            if is_new:
                self._db.executemany(_INSERT_POINT, rows)
                self.num_points += len(rows)
            else:
                for row in rows:
                    self._revise(row)
            for column, key in enumerate(emission.key_ids):
                logged = emission.steps[exists[:, column]]
                if len(logged):
                    last = int(logged[-1])
                    self._emitted_to[attempt, key] = max(last, self._emitted_to.get((attempt, key), NO_STEP))
        for key_id, step, rank, value, at in emission.rank_values:
            self._write_rank_point((key_id, step, rank, attempt), value, at)

    def _write_rank_point(self, place: tuple[int, int, int, int], value: float, time_unix_ns: int) -> None:
        where = "WHERE key_id = ? AND step = ? AND rank = ? AND attempt = ?"
        known = self._db.execute(f"SELECT value FROM rank_points {where}", place).fetchone()
        if known is None:
            columns = "key_id, step, rank, attempt, value, time_unix_ns, id"
            new = (*place, value, time_unix_ns, self._take_ids(1))
            self._db.execute(f"INSERT INTO rank_points ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", new)
        elif known[0] != (None if value != value else value):
            changed = (self._take_ids(1), value, time_unix_ns, *place)
            self._db.execute(f"UPDATE rank_points SET id = ?, value = ?, time_unix_ns = ? {where}", changed)
            self._num_replaced += 1

    def _rows(
        self, attempt: int, emission: Emission, exists: Any, steps: Any, keys: Any, steps_at: Any
    ) -> list[tuple[Any, ...]]:
        block = emission.block
        count = len(steps)
        first = self._take_ids(count)
        return list(
            zip(
                range(first, first + count),
                keys.tolist(),
                [attempt] * count,
                steps.tolist(),
                emission.value[exists].tolist(),
                block.n[exists].tolist(),
                emission.expected[exists].tolist(),
                block.min[exists].tolist(),
                _ranks(block.min_rank[exists]),
                block.max[exists].tolist(),
                _ranks(block.max_rank[exists]),
                block.mean[exists].tolist(),
                block.std[exists].tolist(),
                emission.nan_count[exists].tolist(),
                emission.inf_count[exists].tolist(),
                _ranks(emission.bad_rank[exists]),
                [0] * count,
                emission.time_unix_ns[steps_at].tolist(),
                strict=True,
            )
        )

    def _revise(self, row: tuple[Any, ...]) -> None:
        """Insert a point, or supersede the one that is there if it says something else."""
        point_id, key_id, attempt, step, *values, _, at = row
        known = self._db.execute(
            f"SELECT {_COLUMNS} FROM points WHERE key_id = ? AND step = ? AND attempt = ?", (key_id, step, attempt)
        ).fetchone()
        if known is None:
            self._db.execute(_INSERT_POINT, row)
            self.num_points += 1
            return
        values = [None if isinstance(value, float) and value != value else value for value in values]
        old = list(known[4:-2])
        if values[1] < old[1]:  # derived from a rank log whose oldest files are gone
            return
        if values[:1] + values[1:2] + values[3:] == old[:1] + old[1:2] + old[3:]:  # all but `expected`
            return
        values[2] = max(values[2], old[2])
        self._db.execute("DELETE FROM points WHERE id = ?", (known[0],))
        self._db.execute(f"INSERT INTO superseded ({_COLUMNS}) VALUES ({', '.join('?' * len(known))})", known)
        self._db.execute(_INSERT_POINT, (point_id, key_id, attempt, step, *values, known[-2] + 1, at))

    def _take_ids(self, count: int) -> int:
        first = self._next_id
        self._next_id += count
        return first

    # -- meta

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _put_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def put_watermarks(self, watermarks: Mapping[int, int]) -> None:
        """Store each attempt's watermark, for readers."""
        self._put_meta(schema.META_WATERMARK, {str(attempt): step for attempt, step in watermarks.items()})

    @property
    def status(self) -> Mapping[str, Any]:
        """{"status", "detail", "ended_unix_ns"}."""
        value: Mapping[str, Any] = self._meta(schema.META_STATUS)
        return value

    @property
    def last_id(self) -> int:
        """The newest emission id."""
        return self._next_id - 1

    def close(self) -> None:
        """Close the log and the database (which truncates its WAL)."""
        self.rank_log.close()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        os.close(self._lock)

    def __repr__(self) -> str:
        return f"<RunStore {self.run_dir} next_id={self._next_id} {self.rank_log!r}>"


def _show(place: Position) -> str:
    return f"byte {place.offset} of file {place.file}"


def _ranks(column: Any) -> list[int | None]:
    return [None if rank < 0 else rank for rank in column.tolist()]
