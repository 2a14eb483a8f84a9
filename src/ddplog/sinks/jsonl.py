"""Writes a run as JSON lines: one append-only file, one object a line, in emission order. Needs nothing installed.

The file is `<run_id>.jsonl` in the sink's folder, or in the target folder: `jsonl:///shared/runs`. A relative target
counts from the run's folder, so that a later delivery from another working directory goes on with the same file.

Every line has "type" and "id" (rising, with gaps) and then the fields of that emission (`ddplog.core.delivery`):

    {"type": "point", "id": 7, "key": "loss", "attempt": 0, "step": 3, "value": 0.25, "n": 8, "expected": 8,
     "min": ..., "min_rank": ..., "max": ..., "max_rank": ..., "mean": ..., "std": ..., "nan_count": 0,
     "inf_count": 0, "bad_rank": null, "revision": 0, "time_unix_ns": ...}
    {"type": "rank_point", ...}  {"type": "text", ...}  {"type": "param", ...}  {"type": "event", ...}

JSON has no NaN and no infinity: NaN is null (nan_count says so), infinity is "Infinity" or "-Infinity". A point with
revision > 0 replaces the earlier line of the same key, attempt and step: the last one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from ddplog.core.delivery import Emission, Event, Limits, Param, Point, Position, RankPoint, RunInfo, RunStatus, Text
from ddplog.sinks import Capabilities
from ddplog.sinks.owned_file import OwnedFile

_TYPES: Final[Mapping[type[Emission], str]] = {
    Point: "point",
    RankPoint: "rank_point",
    Text: "text",
    Param: "param",
    Event: "event",
}
_FIELDS: Final = {kind: tuple(f.name for f in fields(kind)) for kind in _TYPES}
_PLAIN: Final = frozenset({int, str, bool, type(None)})
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
"""Made once: json.dumps() makes one a line."""


class JsonlSink:
    """One file of JSON lines.

    Guarantees: exactly once, in id order; every byte below the position is durable.

    Does not guarantee: that a reader of the live file sees whole lines; the last one may be under way, or go again.
    """

    capabilities = Capabilities(
        can_overwrite=True,
        promise="exactly once",
        on_rewind="further lines with their attempt, of which the highest counts",
    )
    limits = Limits(max_items=2000)
    detail = ""

    def __init__(self, target: str = "") -> None:
        self._target = target
        self._file: OwnedFile | None = None

    def __repr__(self) -> str:
        return f"JsonlSink({self._target!r}, {self._file})"

    def open(self, run: RunInfo, folder: Path, position: Position | None) -> None:
        """Open the file, cut back to the position."""
        base = folder.parent.parent / self._target if self._target else folder
        self._file = OwnedFile(base / f"{run.run_id}.jsonl", int(position["num_bytes"]) if position else 0)

    def write(self, batch: Sequence[Emission]) -> Position:
        """Append the batch; durable on return."""
        assert self._file is not None  # write comes after open
        return {"num_bytes": self._file.append(b"".join(as_line(emission) for emission in batch))}

    def close(self, status: RunStatus) -> None:  # noqa: ARG002  # the status is in the run's store
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def as_object(emission: Emission) -> dict[str, Any]:
    """Return an emission as the JSON object described above."""
    kind = type(emission)
    return {"type": _TYPES[kind], **{name: _plain(getattr(emission, name)) for name in _FIELDS[kind]}}


def as_line(emission: Emission) -> bytes:
    """Return an emission as one line of UTF-8."""
    return encode_line(as_object(emission))


def encode_line(value: Mapping[str, Any]) -> bytes:
    """Return an object as one line of UTF-8; a lone surrogate, which UTF-8 does not have, becomes '?'."""
    return _ENCODER.encode(value).encode("utf-8", "replace") + b"\n"


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
