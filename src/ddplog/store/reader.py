"""Owns reading a run back: the store's rows as numpy columns and small dataclasses. Never writes.

Each call reads what is committed now. Every query is one page, fetched whole, so that no statement stays open
while the caller works: a reader that sleeps inside a statement keeps the writer's WAL from being reset.

The file is opened read-only. A store in WAL mode needs its `-shm` file even for that; where the folder cannot be
written and there is none (an archived run), it is opened as immutable, which ignores a `-wal` left beside it.

What the store says is "running" is believed only while the aggregator named in control.json lives.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
from dataclasses import fields
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ddplog.core.effects import RANK, SYSTEM
from ddplog.core.records import NO_STEP, SYSTEM_PREFIX
from ddplog.errors import DdplogError, RunNotFoundError
from ddplog.store.columns import (
    Attempt,
    Drop,
    Event,
    Metric,
    MetricColumns,
    Param,
    Point,
    RankColumns,
    RunSummary,
    SinkState,
    Text,
    UnknownMetricError,
    WriterInfo,
    columns_of,
    concatenate,
    floats,
    import_pandas,
    ints,
    no_rank_columns,
)
from ddplog.store.schema import (
    FORMAT_VERSION,
    META_FORMAT,
    META_NEXT_ID,
    META_REPLACED,
    META_RUN,
    META_STATUS,
    META_WATERMARK,
    READABLE,
)
from ddplog.store.sink_states import read_sink_states

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from ddplog.store.rank_log import Entry
    from ddplog.store.rank_values import Source
    from ddplog.store.step_times import RankStepTimes


PAGE_ROWS: Final = 20_000
"""Rows fetched by one statement: about 3 MB, 20 ms, short against the writer's checkpoint interval."""

Found = TypeVar("Found")

BUSY_TIMEOUT_S: Final = 10.0
GONE: Final = "its aggregator is gone; ddplog sync completes it"

_POINTS_PAGE: Final = """
    SELECT step, attempt, value, mean, min, max, std, min_rank, max_rank, n, expected, nan_count, inf_count,
           bad_rank, revision, time_unix_ns
    FROM points WHERE key_id = ? AND (step, attempt) > (?, ?) ORDER BY step, attempt LIMIT ?
"""
_RANK_POINTS_PAGE: Final = """
    SELECT step, rank, attempt, value, time_unix_ns
    FROM rank_points WHERE key_id = ? AND (step, rank, attempt) > (?, ?, ?) ORDER BY step, rank, attempt LIMIT ?
"""


class Run:
    """A run on disk, live or finished. Made by `open_run`. One thread at a time.

    A context manager; `close` is not needed for correctness.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, is_immutable: bool) -> None:
        self.path: Final = path
        self.is_immutable: Final = is_immutable
        """Whether the folder could not be written, so that commits still in the `-wal` file are not seen."""
        self._connection = connection
        meta = self._meta()
        self._format = meta.get(META_FORMAT)
        if self._format not in READABLE or META_RUN not in meta:
            raise RunNotFoundError(f"{path}: its store has format {self._format!r}, this ddplog reads {FORMAT_VERSION}")
        self._run: Mapping[str, Any] = meta[META_RUN]

    def __repr__(self) -> str:
        try:
            state = self.status
        except DdplogError as exc:
            state = f"unreadable: {exc}"
        return f"<ddplog.Run {self.run_id} {state} at {self.path}>"

    def __enter__(self) -> Run:  # noqa: PYI034  # typing has no Self on Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store. Further reads raise DdplogError."""
        self._connection.close()

    # What the run is.

    @property
    def run_id(self) -> str:
        return str(self._run["run_id"])

    @property
    def project(self) -> str:
        return str(self._run.get("project") or "default")

    @property
    def name(self) -> str:
        return str(self._run.get("name") or self.run_id)

    @property
    def config(self) -> Mapping[str, Any]:
        config = self._run.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(map(str, self._run.get("tags") or ()))

    @property
    def sinks(self) -> tuple[str, ...]:
        """The sinks the run was started with, as `name` or `name://target`."""
        return tuple(map(str, self._run.get("sinks") or ()))

    @property
    def created(self) -> datetime:
        return _datetime(int(self._run.get("created_unix_ns") or 0))

    @property
    def ended(self) -> datetime | None:
        return self._status()[2]

    @property
    def status(self) -> str:
        """running, finished, failed, killed, preempted or unknown."""
        return self._status()[0]

    @property
    def detail(self) -> str:
        """What is known beyond the status: the rank and its exit code, for one."""
        return self._status()[1]

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        rows = self._rows("SELECT attempt, world_size, opened_unix_ns, reason FROM attempts ORDER BY attempt")
        return tuple(Attempt(attempt=a, world_size=w, opened_unix_ns=o, reason=r) for a, w, o, r in rows)

    @property
    def num_points(self) -> int:
        return int(self._rows("SELECT count(*) FROM points")[0][0])

    @property
    def watermark(self) -> int | None:
        """The newest attempt's watermark; None before the first."""
        marks = self._meta().get(META_WATERMARK)
        return int(marks[max(marks, key=int)]) if marks else None

    def is_live(self) -> bool:
        """Whether the run's aggregator lives on this machine."""
        return self.control_socket() is not None

    def control_socket(self) -> str | None:
        """Return the living aggregator's control socket, if there is one."""
        try:
            control = json.loads((self.path / "control.json").read_text(encoding="utf-8"))
            pid, socket = int(control["pid"]), str(control["socket"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return socket if _is_alive(pid, control.get("start_ticks")) else None

    def _status(self) -> tuple[str, str, datetime | None]:
        said = self._meta().get(META_STATUS) or {}
        status, detail = str(said.get("status", "unknown")), str(said.get("detail") or "")
        if status == "running" and not self.is_live():
            return "unknown", GONE, None
        ended = said.get("ended_unix_ns")
        return status, detail, _datetime(int(ended)) if ended else None

    # Metrics.

    def keys(self) -> tuple[str, ...]:
        """Return the metrics' names, sorted."""
        return tuple(sorted(name for (name,) in self._rows("SELECT name FROM keys")))

    def metric(self, key: str, attempt: int | None = None) -> MetricColumns:
        """Return a metric's points.

        Args:
            key: The metric's name.
            attempt: Only this attempt's; None: of several attempts that hold a step, the highest wins.

        Raises:
            UnknownMetricError: Naming close matches.
        """
        return concatenate(list(self.metric_pages(key, attempt)))

    def metric_pages(
        self, key: str, attempt: int | None = None, *, every_attempt: bool = False, limit: int = PAGE_ROWS
    ) -> Iterator[MetricColumns]:
        """Yield a metric's points page by page, ascending by step; no statement is open between two pages.

        Args:
            key: The metric's name.
            attempt: As for `metric`.
            every_attempt: Yield the points of all attempts, by step, then attempt.
            limit: Rows read at once.

        Raises:
            UnknownMetricError: Naming close matches.
        """
        key_id = self._key_id(key)
        held: list[Sequence[Any]] = []  # the last step of a page, whose later attempts may be on the next
        after = (-(1 << 63), -1)
        while rows := self._rows(_POINTS_PAGE, (key_id, *after, limit)):
            after = (rows[-1][0], rows[-1][1])
            if attempt is not None:
                rows = [row for row in rows if row[1] == attempt]
            if not every_attempt:
                rows = held + rows
                held = rows[-1:]
                rows = [row for row, later in pairwise(rows) if row[0] != later[0]]
            if rows:
                yield columns_of(rows)
        if held:
            yield columns_of(held)

    def rank_metric(self, key: str, attempt: int | None = None) -> RankColumns:
        """Return the values of a key declared with `reduce="none"`, one row per step and rank.

        Raises:
            UnknownMetricError: Naming close matches.
        """
        key_id = self._key_id(key)
        pages = []
        after = (-(1 << 63), -1, -1)
        while rows := self._rows(_RANK_POINTS_PAGE, (key_id, *after, PAGE_ROWS)):
            after = tuple(rows[-1][:3])
            step, rank, attempts, value, times = zip(*rows, strict=True)
            pages.append((ints(step), ints(rank), ints(attempts), floats(value), ints(times)))
        columns: list[NDArray[Any]] = [np.concatenate(column) for column in zip(*pages, strict=True)] if pages else []
        columns = columns or [ints(())] * 5
        if attempt is not None:
            columns = [column[columns[2] == attempt] for column in columns]
        # Sorted by step, rank and attempt: the last of each step and rank is the highest attempt's.
        is_last = np.ones(len(columns[0]), dtype=bool)
        is_last[:-1] = (np.diff(columns[0]) != 0) | (np.diff(columns[1]) != 0)
        columns = [column[is_last] for column in columns]
        return RankColumns(
            step=columns[0],
            rank=columns[1],
            attempt=columns[2],
            value=columns[3].astype(np.float64),
            time_unix_ns=columns[4],
        )

    def rank_values(self, key: str, attempt: int | None = None, *, from_step: int | None = None) -> RankColumns:
        """Return the values of every rank of any metric, one row per step and rank, from the rank log.

        Empty where the rank log is gone. Reads all of it: for a long run, name the first step that is wanted.

        Args:
            key: The metric's name.
            attempt: Only this attempt's; None: where a rank has a step in several, the highest wins.
            from_step: Only steps from here on.

        Raises:
            UnknownMetricError: Naming close matches.
        """
        from ddplog.store.rank_values import collect_rank_values

        reduce = self._rows("SELECT reduce FROM keys WHERE key_id = ?", (self._key_id(key),))[0][0]
        sources = self._sources(key, attempt)
        first = NO_STEP if from_step is None else from_step
        return self._over_rank_log(
            lambda entries: collect_rank_values(entries, sources, reduce, first), no_rank_columns()
        )

    def _sources(self, key: str, attempt: int | None) -> dict[int, Source]:
        from ddplog.store.rank_values import Source

        columns: dict[int, dict[int, int]] = {}
        for writer_id, schema_id, text in self._rows("SELECT writer_id, schema_id, keys FROM schemas"):
            keys = json.loads(text)
            if key in keys:
                columns.setdefault(writer_id, {})[schema_id] = keys.index(key)
        rows = self._rows("SELECT writer_id, rank, attempt FROM writers WHERE is_reduced")
        return {
            writer_id: Source(rank=rank, attempt=its, columns=columns[writer_id])
            for writer_id, rank, its in rows
            if writer_id in columns and attempt in (None, its)
        }

    def _over_rank_log(self, collect: Callable[[Iterator[Entry]], Found], nothing: Found) -> Found:
        from ddplog.store.rank_log import iter_entries

        for _ in range(3):
            try:
                return collect(iter_entries(self.path / "ranks"))
            except FileNotFoundError:  # the oldest file was deleted to bound the log: begin behind it
                continue
        return nothing

    def metrics(self) -> tuple[Metric, ...]:
        """Return every key with its newest point, sorted by name. Costs one pass over an index of `points`."""
        counts: dict[int, int] = dict(self._rows("SELECT key_id, count(*) FROM points GROUP BY key_id"))
        for key_id, count in self._rows("SELECT key_id, count(*) FROM rank_points GROUP BY key_id"):
            counts.setdefault(key_id, count)
        attempts = [row[0] for row in self._rows("SELECT attempt FROM attempts ORDER BY attempt DESC")]
        found = []
        for key_id, name, reduce, replicated in self._rows("SELECT key_id, name, reduce, replicated FROM keys"):
            last = self._last(key_id, attempts)
            found.append(
                Metric(
                    key=name,
                    reduce=reduce,
                    is_replicated=bool(replicated),
                    num_points=counts.get(key_id, 0),
                    last=last,
                )
            )
        return tuple(sorted(found, key=lambda metric: metric.key))

    def points(self, after_id: int = 0, limit: int = PAGE_ROWS) -> list[Point]:
        """Return up to `limit` points with an id above `after_id`, by id.

        A point that a late value changes takes a new id, so a reader of a live run can meet it twice, the second
        time with a higher revision. `metric_pages` shows each once.
        """
        rows = self._rows(
            """SELECT p.id, k.name, p.attempt, p.step, p.value, p.n, p.expected, p.min, p.min_rank, p.max,
                      p.max_rank, p.mean, p.std, p.nan_count, p.inf_count, p.bad_rank, p.revision, p.time_unix_ns
               FROM points p JOIN keys k ON k.key_id = p.key_id WHERE p.id > ? ORDER BY p.id LIMIT ?""",
            (after_id, limit),
        )
        names = [f.name for f in fields(Point)]
        return [Point(**dict(zip(names, row, strict=True))) for row in rows]

    def to_pandas(self) -> Any:
        """Return a DataFrame of every metric's value: one row per step, one column per key.

        Without what was sampled, the keys below `sys/`: their steps are seconds. metric() has them.

        Raises:
            DdplogError: If pandas is not installed.
        """
        pandas = import_pandas()
        columns = {}
        for key in self.keys():
            if key.startswith(SYSTEM_PREFIX):
                continue
            found = self.metric(key)
            columns[key] = pandas.Series(found.value, index=pandas.Index(found.step, name="step"), dtype="float64")
        return pandas.DataFrame(columns).sort_index().rename_axis(index="step")

    def rank_step_times(self, attempt: int | None = None) -> RankStepTimes:
        """Return how long each rank took for its steps, from the rank log; empty where that is gone.

        Args:
            attempt: Only this attempt's; None: where several passed a step, the highest wins.
        """
        from ddplog.store.step_times import EMPTY, collect_step_times

        samplers = {writer.writer_id for writer in self.writers(SYSTEM)}
        return self._over_rank_log(
            lambda entries: collect_step_times((e for e in entries if e.writer_id not in samplers), attempt), EMPTY
        )

    # Everything else that was recorded.

    def params(self) -> tuple[Param, ...]:
        """Return the logged parameters in order; of one name logged twice the last one holds."""
        rows = self._paged("params", "attempt, rank, name, value, time_unix_ns")
        return tuple(
            Param(id=i, attempt=a, rank=r, name=n, value=_json(v), time_unix_ns=t) for i, a, r, n, v, t in rows
        )

    def texts(self) -> tuple[Text, ...]:
        """Return the logged texts in order."""
        rows = self._paged("texts", "attempt, rank, key, step, text, time_unix_ns")
        return tuple(
            Text(id=i, attempt=a, rank=r, key=k, step=s, text=x, time_unix_ns=t) for i, a, r, k, s, x, t in rows
        )

    def events(self) -> tuple[Event, ...]:
        """Return what happened, in order."""
        rows = self._paged("events", "attempt, rank, step, kind, level, message, data, time_unix_ns")
        return tuple(
            Event(
                id=i, attempt=a, rank=r, step=s, kind=k, level=v, message=m, data=_json_object(d), time_unix_ns=t
            )
            for i, a, r, s, k, v, m, d, t in rows
        )  # fmt: skip

    def drops(self, role: str = RANK) -> tuple[Drop, ...]:
        """Return what was accepted by a rank and is not in the store, per rank and reason.

        Args:
            role: `rank`, or `system`: what its samplers could not write.
        """
        rows = self._rows(
            f"""SELECT d.writer_id, coalesce(w.rank, -1), coalesce(w.attempt, 0), d.reason, d.count
                FROM drops d LEFT JOIN writers w ON w.writer_id = d.writer_id
                WHERE d.count > 0 AND coalesce({self._role}, '{RANK}') = ? ORDER BY 2, 3, 4""",
            (role,),
        )
        return tuple(Drop(writer_id=i, rank=r, attempt=a, reason=x, count=c) for i, r, a, x, c in rows)

    def writers(self, role: str = RANK) -> tuple[WriterInfo, ...]:
        """Return every life of every rank, by attempt and rank.

        Args:
            role: `rank`, or `system`: what sampled the ranks.
        """
        names = [f.name for f in fields(WriterInfo)]
        rows = self._rows(
            f"SELECT {', '.join(names)} FROM writers w WHERE {self._role} = ? ORDER BY attempt, rank, writer_id",
            (role,),
        )
        return tuple(WriterInfo(**dict(zip(names, row, strict=True))) for row in rows)

    @property
    def _role(self) -> str:
        """The role of the writer `w`, in SQL."""
        return f"'{RANK}'" if self._format == 1 else "w.role"

    @property
    def last_id(self) -> int:
        """The highest id given to an emission; ids may have gaps."""
        return int(self._meta().get(META_NEXT_ID) or 1) - 1

    def num_emissions(self, after_id: int, last_id: int) -> int:
        """Return how many emissions have an id above `after_id`, `last_id` at most: what a sink at that cursor lacks."""
        tables = ("points", "superseded", "rank_points", "texts", "params", "events")
        counts = " + ".join(f"(SELECT count(*) FROM {table} WHERE id > :after AND id <= :last)" for table in tables)
        return int(self._rows(f"SELECT {counts}", {"after": after_id, "last": last_id})[0][0])

    @property
    def num_replaced(self) -> int:
        """Values kept per rank that a late value replaced: emissions, too, and perhaps delivered before."""
        return int(self._meta().get(META_REPLACED) or 0)

    def sink_states(self) -> tuple[SinkState, ...]:
        """Return what each sink's forwarder last said of itself, by name."""
        return read_sink_states(self.path)

    # Statements.

    def _meta(self) -> dict[str, Any]:
        return {key: _json(value) for key, value in self._rows("SELECT key, value FROM meta")}

    def _key_id(self, key: str) -> int:
        rows = self._rows("SELECT key_id FROM keys WHERE name = ?", (key,))
        if rows:
            return int(rows[0][0])
        names = self.keys()
        close = difflib.get_close_matches(str(key), names, n=4, cutoff=0.4)
        close = close or [name for name in names if str(key).lower() in name.lower()][:4]
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else f"; it has {len(names)} metrics"
        raise UnknownMetricError(f"run {self.run_id} has no metric {key!r}{hint}")

    def _last(self, key_id: int, attempts: Sequence[int]) -> MetricColumns:
        for attempt in attempts:
            rows = self._rows(
                """SELECT step, attempt, value, mean, min, max, std, min_rank, max_rank, n, expected, nan_count,
                          inf_count, bad_rank, revision, time_unix_ns
                   FROM points WHERE key_id = ? AND attempt = ? ORDER BY step DESC LIMIT 1""",
                (key_id, attempt),
            )
            if rows:
                return columns_of(rows)
        return columns_of([])

    def _paged(self, table: str, columns: str) -> Iterator[Sequence[Any]]:
        after = -1
        query = f"SELECT id, {columns} FROM {table} WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._rows(query, (after, PAGE_ROWS)):
            after = rows[-1][0]
            yield from rows

    def _rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as exc:
            raise DdplogError(f"{self.path / 'run.db'}: {exc}") from exc


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run for reading, live or finished.

    Args:
        path: The run's folder, or its run.db.

    Raises:
        RunNotFoundError: If there is no run, naming what was looked for and the nearest runs that exist.
    """
    given = Path(path)
    folder = given.parent if given.name == "run.db" else given
    store = folder / "run.db"
    if not store.is_file():
        raise RunNotFoundError(_not_found(folder))
    try:
        connection, is_immutable = _connect(store)
    except sqlite3.Error as exc:
        raise RunNotFoundError(f"{store} cannot be read as a run's store: {exc}") from exc
    try:
        return Run(folder, connection, is_immutable=is_immutable)
    except RunNotFoundError:
        connection.close()
        raise
    except DdplogError as exc:
        connection.close()
        raise RunNotFoundError(f"{store} cannot be read as a run's store: {exc}") from exc


def list_runs(dir: str | os.PathLike[str]) -> list[RunSummary]:  # noqa: A002
    """Return the runs in a folder of runs, newest first; what cannot be read is listed with status "unreadable"."""
    folder = Path(dir)
    if not folder.is_dir():
        return []
    found = [_summarise(entry) for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."]
    return sorted(found, key=lambda run: (run.started is not None, run.started or 0, run.run_id), reverse=True)


def _summarise(folder: Path) -> RunSummary:
    try:
        with open_run(folder) as run:
            attempts = run.attempts
            return RunSummary(
                run_id=run.run_id,
                path=folder,
                name=run.name,
                project=run.project,
                status=run.status,
                detail=run.detail,
                started=run.created,
                ended=run.ended,
                world_size=attempts[-1].world_size if attempts else 0,
                num_points=run.num_points,
            )
    except (DdplogError, OSError, ValueError, TypeError, KeyError, OverflowError) as exc:
        detail = str(exc) if (folder / "run.db").exists() else "not a run: it has no run.db"
        return RunSummary(
            run_id=folder.name,
            path=folder,
            name=folder.name,
            project="",
            status="unreadable",
            detail=detail,
            started=None,
            ended=None,
            world_size=0,
            num_points=0,
        )


def _connect(store: Path) -> tuple[sqlite3.Connection, bool]:
    uri = f"file:{quote(str(store.absolute()))}?mode=ro"
    for suffix, is_immutable in (("", False), ("&immutable=1", True)):
        connection = sqlite3.connect(uri + suffix, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            connection.execute("SELECT 1 FROM meta LIMIT 1").fetchall()
        except sqlite3.OperationalError as exc:
            connection.close()
            if is_immutable or ("open database" not in str(exc) and "readonly" not in str(exc)):
                raise
        except sqlite3.Error:
            connection.close()
            raise
        else:
            return connection, is_immutable
    raise AssertionError("unreachable")


def _not_found(folder: Path) -> str:
    looked = f"no run at {folder}: looked for {folder / 'run.db'}"
    parents = [folder, folder.parent, folder.parent / "runs", Path("runs")]
    names = {str(entry.parent): entry.parent for parent in parents for entry in sorted(parent.glob("*/run.db"))}
    if not names:
        return f"{looked}, and found no run near it"
    close = difflib.get_close_matches(folder.name, [path.name for path in names.values()], n=3, cutoff=0.5)
    near = [shown for shown, path in names.items() if path.name in close] or sorted(names)[-3:]
    return f"{looked}; near it: {', '.join(near)}"


def _is_alive(pid: int, start_ticks: int | None) -> bool:
    """Tell whether a process runs: one that is dead and not waited for does not, and another of that pid is not it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0] not in ("Z", "X") and start_ticks in (None, int(fields[19]))


def _datetime(time_unix_ns: int) -> datetime:
    return datetime.fromtimestamp(time_unix_ns / 1e9, tz=timezone.utc)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return text


def _json_object(text: str) -> Mapping[str, Any]:
    value = _json(text)
    return value if isinstance(value, dict) else {}
