"""Reads the run store by cursor, for the forwarders. Opens it read-only and never writes.

A page is read inside one short read transaction: the tables are queried one after the other, and between two of
them the writer may commit, so that without the transaction a page could hold id 15 of one table and miss id 11 of
another, which the cursor would then have passed.
"""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from ddplog.core.delivery import Emission, Event, Param, Point, RankPoint, RunInfo, RunStatus, Text
from ddplog.errors import ConfigError, RunNotFoundError
from ddplog.store.schema import (
    FORMAT_VERSION,
    META_FORMAT,
    META_NEXT_ID,
    META_RUN,
    META_STATUS,
    META_STORE_UUID,
    READABLE,
)

_BUSY_S: Final = 5.0

_POINTS: Final = """
    SELECT t.id, k.name, attempt, step, value, n, expected, min, min_rank, max, max_rank, mean, std,
           nan_count, inf_count, bad_rank, revision, time_unix_ns
    FROM {table} AS t JOIN keys AS k USING (key_id) WHERE t.id > ? ORDER BY t.id LIMIT ?
"""
_QUERIES: Final = {
    "points": _POINTS.format(table="points"),
    "superseded": _POINTS.format(table="superseded"),
    "rank_points": """
        SELECT t.id, k.name, attempt, step, rank, value, time_unix_ns
        FROM rank_points AS t JOIN keys AS k USING (key_id) WHERE t.id > ? ORDER BY t.id LIMIT ?
    """,
    "texts": "SELECT id, attempt, rank, key, step, text, time_unix_ns FROM texts WHERE id > ? ORDER BY id LIMIT ?",
    "params": "SELECT id, attempt, rank, name, value, time_unix_ns FROM params WHERE id > ? ORDER BY id LIMIT ?",
    "events": """
        SELECT id, attempt, rank, step, kind, level, message, data, time_unix_ns
        FROM events WHERE id > ? ORDER BY id LIMIT ?
    """,
}


class EmissionReader:
    """Pages the emissions of one run. One thread; every method is one short read and may wait 5 s for a lock.

    Args:
        run_dir: The run's folder.

    Raises:
        RunNotFoundError: From the constructor and from every method, if there is no store (yet, or any more).
        ConfigError: From the constructor, if the store is of a format that is not ours.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "run.db"
        self._inode = -1
        self._db: sqlite3.Connection | None = None
        with self._reading() as db:
            found = _meta(db, META_FORMAT)
            if found not in (None, *READABLE):
                raise ConfigError(
                    "run_id", run_dir.name, f"{self._path}: format {found}; this ddplog reads {FORMAT_VERSION}"
                )
            if _meta(db, META_RUN) is None:
                raise RunNotFoundError(f"{self._path}: the store does not say which run it is (yet)")

    def __repr__(self) -> str:
        return f"EmissionReader({str(self._path)!r})"

    def close(self) -> None:
        """Close the store. Another read opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def page(self, after_id: int, limit: int) -> list[Emission]:
        """Return the first `limit` emissions with id > after_id, of all tables, in id order."""
        with self._reading() as db:
            rows = {table: db.execute(query, (after_id, limit)).fetchall() for table, query in _QUERIES.items()}
        parts = [[_MAKERS[table](row) for row in found] for table, found in rows.items() if found]
        return list(heapq.merge(*parts, key=attrgetter("id")))[:limit]

    def last_id(self) -> int:
        """Return the highest id given out so far; ids may have gaps."""
        with self._reading() as db:
            return int(_meta(db, META_NEXT_ID) or 1) - 1

    def last_step(self, key: str, below_attempt: int) -> int | None:
        """Return the last step of a metric in the attempts below one; None if it has no point there."""
        sql = (
            "SELECT step FROM points JOIN keys USING (key_id) WHERE name = ? AND attempt < ? ORDER BY step DESC LIMIT 1"
        )
        with self._reading() as db:
            row = db.execute(sql, (key, below_attempt)).fetchone()
        return None if row is None else int(row[0])

    def status(self) -> RunStatus:
        """Return how the run stands."""
        with self._reading() as db:
            raw = _meta(db, META_STATUS) or {}
        return RunStatus(status=raw.get("status", "running"), detail=raw.get("detail") or "")

    def run_info(self) -> RunInfo:
        """Return what the run says of itself."""
        with self._reading() as db:
            raw = _meta(db, META_RUN) or {}
        return RunInfo(
            run_id=raw.get("run_id") or self._path.parent.name,
            project=raw.get("project") or "default",
            name=raw.get("name"),
            tags=tuple(raw.get("tags") or ()),
            config=raw.get("config") or {},
            created_unix_ns=raw.get("created_unix_ns") or 0,
        )

    def store_uuid(self) -> str:
        """Return the store's identity: ids of another store mean something else."""
        with self._reading() as db:
            return str(_meta(db, META_STORE_UUID) or "")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        db = self._connection()
        try:
            db.execute("BEGIN")
            yield db
        except sqlite3.OperationalError as exc:
            if "no such table" in str(exc):
                raise RunNotFoundError(f"{self._path}: not a run store (yet)") from exc
            raise
        finally:
            if db.in_transaction:
                db.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        """Open the store, again if its file was replaced by a snapshot or is gone."""
        try:
            inode = self._path.stat().st_ino
        except OSError as exc:
            self.close()
            raise RunNotFoundError(f"{self._path}: {exc.strerror}") from exc
        if self._db is None or inode != self._inode:
            self.close()
            self._db = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S, isolation_level=None
            )
            # A metric's name may carry what was a lone surrogate; one bad name must not stop the run.
            self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")
            self._inode = inode
        return self._db


def _meta(db: sqlite3.Connection, key: str) -> Any:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else json.loads(row[0])


def _point(row: tuple[Any, ...]) -> Emission:
    return Point(
        id=row[0], key=row[1], attempt=row[2], step=row[3], value=row[4], n=row[5], expected=row[6], min=row[7],
        min_rank=row[8], max=row[9], max_rank=row[10], mean=row[11], std=row[12], nan_count=row[13],
        inf_count=row[14], bad_rank=row[15], revision=row[16], time_unix_ns=row[17],
    )  # fmt: skip


def _rank_point(row: tuple[Any, ...]) -> Emission:
    return RankPoint(id=row[0], key=row[1], attempt=row[2], step=row[3], rank=row[4], value=row[5], time_unix_ns=row[6])


def _text(row: tuple[Any, ...]) -> Emission:
    return Text(id=row[0], attempt=row[1], rank=row[2], key=row[3], step=row[4], text=row[5], time_unix_ns=row[6])


def _param(row: tuple[Any, ...]) -> Emission:
    return Param(id=row[0], attempt=row[1], rank=row[2], name=row[3], value=row[4], time_unix_ns=row[5])


def _event(row: tuple[Any, ...]) -> Emission:
    return Event(
        id=row[0], attempt=row[1], rank=row[2], step=row[3], kind=row[4], level=row[5], message=row[6],
        data=json.loads(row[7]), time_unix_ns=row[8],
    )  # fmt: skip


_MAKERS: Final[Mapping[str, Callable[[tuple[Any, ...]], Emission]]] = {
    "points": _point,
    "superseded": _point,
    "rank_points": _rank_point,
    "texts": _text,
    "params": _param,
    "events": _event,
}
