"""`ddplog export`: writes a run's points as CSV, JSON lines or Parquet, page by page.

One row per point, metric by metric, ascending by step and attempt; every attempt's points are written. NaN is an empty
field in CSV, null in JSON lines and in Parquet, where nan_count tells it from nothing; infinity is "inf" and "-inf" in
CSV, "Infinity" and "-Infinity" in JSON lines.
"""

from __future__ import annotations

import csv
import json
import math
import os
import secrets
import sys
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

import click

from ddplog.cli.output import plain_float
from ddplog.cli.progress import progress
from ddplog.cli.target import find, run_argument
from ddplog.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ddplog.store.columns import MetricColumns
    from ddplog.store.reader import Run

COLUMNS: Final = (
    "key", "step", "attempt", "value", "n", "expected", "min", "min_rank", "max", "max_rank", "mean", "std", "nan_count",
    "inf_count", "bad_rank", "revision", "time_unix_ns",
)  # fmt: skip
_RANKS: Final = ("min_rank", "max_rank", "bad_rank")
_FLOATS: Final = ("value", "min", "max", "mean", "std")


@click.command("export")
@run_argument
@click.option("--format", "kind", type=click.Choice(["csv", "jsonl", "parquet"]), required=True)
@click.option("-o", "--output", "file", metavar="FILE", default="-", help="The file; stdout if not given, or `-`.")
@click.option(
    "--keys", "globs", metavar="GLOB", multiple=True, help="Only these metrics, `train/*` for one; repeatable."
)
def command(run: str, folder: str | None, kind: str, file: str, globs: tuple[str, ...]) -> None:
    """Write a run's points as CSV, JSON lines or Parquet.

    RUN is a run's folder, a run id, or `latest`, which is also the default.
    """
    from ddplog.store.reader import open_run

    if kind == "parquet":
        _need_pyarrow()
    with open_run(find(run, folder)) as opened:
        keys = _chosen(opened, globs)
        with _target(file) as stream, progress("metrics") as advance:
            writer = _writer(kind, stream)
            for i, key in enumerate(keys):
                for page in opened.metric_pages(key, every_attempt=True):
                    writer.write(key, page)
                advance(i + 1, len(keys))
            writer.close()


def _chosen(run: Run, globs: Sequence[str]) -> list[str]:
    keys = run.keys()
    chosen = [key for key in keys if not globs or any(fnmatchcase(key, glob) for glob in globs)]
    if globs and not chosen:
        raise UsageError(
            f"--keys {' '.join(globs)}: fits none of the run's {len(keys)} metrics; ddplog show lists them"
        )
    return chosen


class _Writer(Protocol):
    def write(self, key: str, page: MetricColumns) -> None: ...
    def close(self) -> None: ...


class _CsvWriter:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._rows = csv.writer(_Encoder(stream), lineterminator="\n")
        self._rows.writerow(COLUMNS)

    def write(self, key: str, page: MetricColumns) -> None:
        for row in _rows(key, page):
            self._rows.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])

    def close(self) -> None:
        self._stream.flush()


class _JsonlWriter:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, key: str, page: MetricColumns) -> None:
        for row in _rows(key, page):
            plain = [plain_float(value) if isinstance(value, float) else value for value in row]
            line = json.dumps(dict(zip(COLUMNS, plain, strict=True)), separators=(",", ":"), allow_nan=False)
            self._stream.write(line.encode() + b"\n")

    def close(self) -> None:
        self._stream.flush()


class _ParquetWriter:
    """One row group per about a page, so that memory stays bounded."""

    ROWS: Final = 100_000

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {"key": pa.dictionary(pa.int32(), pa.string()), **dict.fromkeys(_FLOATS, pa.float64())}
        self._schema = pa.schema([(name, types.get(name, pa.int64())) for name in COLUMNS])
        self._file = parquet.ParquetWriter(stream, self._schema, compression="zstd")
        self._held: list[Any] = []
        self._num_held = 0

    def write(self, key: str, page: MetricColumns) -> None:
        import pyarrow as pa

        arrays = [pa.array([key] * len(page), type=self._schema.field("key").type)]
        for name in COLUMNS[1:]:
            column = getattr(page, name)
            missing = column < 0 if name in _RANKS else None
            arrays.append(pa.array(column, mask=missing, from_pandas=name in _FLOATS))  # from_pandas: NaN is null
        self._held.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._num_held += len(page)
        if self._num_held >= self.ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._held:
            self._file.write_table(pa.concat_tables(self._held).unify_dictionaries())
        self._held, self._num_held = [], 0


def _writer(kind: str, stream: IO[bytes]) -> _Writer:
    if kind == "parquet":
        return _ParquetWriter(stream)
    return _CsvWriter(stream) if kind == "csv" else _JsonlWriter(stream)


def _rows(key: str, page: MetricColumns) -> Iterator[list[Any]]:
    lists = []
    for name in COLUMNS[1:]:
        values = getattr(page, name).tolist()
        lists.append([None if rank < 0 else rank for rank in values] if name in _RANKS else values)
    for row in zip(*lists, strict=True):
        yield [key, *row]


class _Encoder:
    """A text file over a binary one, as csv wants it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.encode("utf-8", "replace"))


@contextmanager
def _target(file: str) -> Iterator[IO[bytes]]:
    """Open the output: stdout, or a file that appears only when it is whole."""
    if file == "-":
        yield sys.stdout.buffer
        return
    path = Path(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
        temporary.replace(path)
    except OSError as exc:
        raise ConfigError("output", file, f"cannot be written: {exc.strerror}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _need_pyarrow() -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as exc:
        raise UsageError("--format parquet needs pyarrow, which is not installed: pip install ddplog[parquet]") from exc
