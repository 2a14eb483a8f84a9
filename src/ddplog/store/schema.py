"""Specifies the run store, `run.db`: SQLite, WAL, synchronous=FULL.

One emission counter, `id`, numbers the rows of points, rank_points, texts, params and events together:
a sink's cursor is one integer, and reading all tables for ids above it, merged by id, replays the run.

`points` holds the newest emission of each (key, step, attempt). When a late value changes a point, the old
row moves to `superseded` (same id as before) and the new one takes a new id and the next revision, so a sink
that cannot overwrite takes the rows with revision 0 of both tables.

NaN is NULL. Times are wall clock, nanoseconds since 1970, and are payload only.

Formats, of which each is read; a store of an older one becomes one of the newest when it is opened for writing, and one
of a newer format is refused before anything is written to it:

    1  the first that was released
    2  writers.role: `rank`, or `system` for a sampler's journal of GPU and host metrics (core/pipeline.py)
"""

from __future__ import annotations

from typing import Final

FORMAT_VERSION: Final = 2
READABLE: Final = (1, 2)
MIGRATIONS: Final = {1: ("ALTER TABLE writers ADD COLUMN role TEXT NOT NULL DEFAULT 'rank'",)}
"""Format -> the statements that make the next one of it."""

_POINT_COLUMNS: Final = """
    id INTEGER PRIMARY KEY,
    key_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    value REAL,
    n INTEGER NOT NULL,
    expected INTEGER NOT NULL,
    min REAL,
    min_rank INTEGER,
    max REAL,
    max_rank INTEGER,
    mean REAL,
    std REAL,
    nan_count INTEGER NOT NULL,
    inf_count INTEGER NOT NULL,
    bad_rank INTEGER,
    revision INTEGER NOT NULL,
    time_unix_ns INTEGER NOT NULL
"""

SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY, world_size INTEGER NOT NULL, opened_unix_ns INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS writers (
    writer_id INTEGER PRIMARY KEY,
    incarnation BLOB NOT NULL UNIQUE,
    attempt INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    world_size INTEGER NOT NULL,
    local_rank INTEGER NOT NULL,
    node_rank INTEGER NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    boot_id TEXT NOT NULL,
    started_unix_ns INTEGER NOT NULL,
    next_seq INTEGER NOT NULL DEFAULT 0,
    step INTEGER,
    state TEXT NOT NULL DEFAULT 'running',
    is_reduced INTEGER NOT NULL DEFAULT 1,
    finish_status TEXT NOT NULL DEFAULT '',
    num_values INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    signal INTEGER,
    detail TEXT NOT NULL DEFAULT '',
    ended_unix_ns INTEGER,
    role TEXT NOT NULL DEFAULT 'rank'
);
CREATE TABLE IF NOT EXISTS schemas (
    writer_id INTEGER NOT NULL, schema_id INTEGER NOT NULL, keys TEXT NOT NULL, PRIMARY KEY (writer_id, schema_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (
    key_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, reduce TEXT NOT NULL, replicated INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS points ({_POINT_COLUMNS}, UNIQUE (key_id, step, attempt));
CREATE TABLE IF NOT EXISTS superseded ({_POINT_COLUMNS});
CREATE TABLE IF NOT EXISTS rank_points (
    id INTEGER PRIMARY KEY,
    key_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    value REAL,
    time_unix_ns INTEGER NOT NULL,
    UNIQUE (key_id, step, rank, attempt)
);
CREATE TABLE IF NOT EXISTS params (
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, rank INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    time_unix_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS texts (
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, rank INTEGER NOT NULL, key TEXT NOT NULL, step INTEGER,
    text TEXT NOT NULL, time_unix_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, rank INTEGER, step INTEGER, kind TEXT NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL DEFAULT '{{}}', time_unix_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS drops (
    writer_id INTEGER NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (writer_id, reason)
) WITHOUT ROWID;
"""

POINT_FIELDS: Final = (
    "id", "key_id", "attempt", "step", "value", "n", "expected", "min", "min_rank", "max", "max_rank", "mean", "std",
    "nan_count", "inf_count", "bad_rank", "revision", "time_unix_ns",
)  # fmt: skip
"""Columns of points and superseded, in order."""

# Keys of `meta`. Values are JSON.
META_FORMAT: Final = "format"  # FORMAT_VERSION
META_RUN: Final = "run"  # {"run_id", "project", "name", "tags", "config", "created_unix_ns", "sinks"}
META_STORE_UUID: Final = "store_uuid"  # hex
META_LIVES: Final = "lives"  # how many aggregators have written it, one after the other
META_NEXT_ID: Final = "next_id"  # the next emission id
META_REPLACED: Final = "replaced"  # rank_points that a late value replaced: emissions whose id is in no table any more
META_STATUS: Final = "status"  # {"status", "detail", "ended_unix_ns"}
META_VERDICT: Final = "verdict"  # [status, detail] the launcher gave; the status once everything is stored
META_UNSETTLED: Final = "unsettled"  # [[attempt, [key_id], [step]]]: points that were about to change
META_RANK_LOG: Final = "rank_log"  # {"end": [file_no, offset], "replay_from": [file_no, offset]}
META_REFILL: Final = (
    "refill"  # {writer_id: seq}: those below it, from next_seq on, are to be logged again (rank log cut)
)
META_WATERMARK: Final = "watermark"  # {attempt: step}
