"""Writes a run as one TensorBoard event file, with TensorBoard's own protos and without TensorFlow.

The file is `events.out.tfevents.<created>.<run_id>` in the sink's folder, or in `<target>/<run_id>/`:
`tensorboard:///shared/logs`. A relative target counts from the run's folder. The name is stable and the file is ours
alone, so a restart goes on in it, at the byte where the cursor stands.

What becomes what:

    point        scalar, tag = key; NaN stays NaN. Revision 0 only: an event file cannot overwrite.
    rank_point   scalar, tag = key/rank<r>
    text         text, tag = key/text_summary (as torch's SummaryWriter names it); rank r > 0: key/rank<r>/...
    param        text, tag = params/text_summary: a table of those not shown before
    event        text, tag = ddplog/events/text_summary

Steps rise strictly within a tag: TensorBoard sorts nothing, and its data server drops a tag's earlier points when
a step comes again. So a point that comes at or below the tag's last step is left out (the store has it) and counted:
`detail` says how many, and so does the text ddplog/skipped at the end. A text is never left out: it takes the next
free step.

A new attempt that rewinds supersedes the tag's points from its first step on. TensorBoard calls those orphaned and
purges them, in one of two ways that the file's version chooses. From version 2 on, a SessionLog START event purges
all tags from its step on; a new attempt that logs {"val/acc": ...}, step=3 (epochs) before train/loss at step 4000
would wipe 4000 steps of train/loss. Version 1 purges by tag when a step goes back, which is also what the data
server does, whatever the version. We write version 1, and before each rewound point an empty summary just above the
tag's last step: both Python accumulators compare with the step of the event before, not with the tag's.
A reader that does not purge (purge_orphaned_data=False) shows both attempts.

A SessionLog in the file (message "attempt <n>") says to which attempt the events after it belong. So on restart the
state, each tag's last attempt and step, is read back from the file itself and needs no place in the cursor.
Source: tensorboard/backend/event_processing/event_accumulator.py, plugin_event_accumulator.py,
_MaybePurgeOrphanedData in both (2.21).
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from ddplog.core.delivery import Emission, Event, Limits, Param, Point, Position, RankPoint, RunInfo, RunStatus, Text
from ddplog.errors import PermanentSinkError, RetryableSinkError
from ddplog.sinks import Capabilities
from ddplog.sinks.owned_file import OwnedFile

_FILE_VERSION: Final = "brain.Event:1"
_ATTEMPT: Final = "attempt "
_LENGTH = struct.Struct("<Q")

Series = tuple[int, int]
"""The attempt and step of a tag's last point."""


class TensorBoardSink:
    """One event file.

    Guarantees: exactly once; each tag's steps rise strictly, but for a new attempt's rewind, which readers purge.

    Does not guarantee: late values and revisions, which an event file cannot show. Values are float32, as in every
    event file.
    """

    capabilities = Capabilities(
        can_overwrite=False, promise="exactly once", on_rewind="TensorBoard drops what it showed of a tag from there on"
    )
    limits = Limits(max_items=2000)

    def __init__(self, target: str = "") -> None:
        self._target = target
        self._file: OwnedFile | None = None
        self._created_s = 0.0
        self._series: dict[str, Series] = {}
        self._attempt = -1
        self._num_skipped = 0
        self._params: frozenset[int] = frozenset()

    def __repr__(self) -> str:
        return (
            f"TensorBoardSink({self._target!r}, {self._file}, series={len(self._series)}, skipped={self._num_skipped})"
        )

    @property
    def detail(self) -> str:
        """How many points came too late to be shown."""
        return f"{self._num_skipped} late points are in the store only" if self._num_skipped else ""

    def open(self, run: RunInfo, folder: Path, position: Position | None) -> None:
        """Open the file, cut back to the position, and read the state back."""
        base = folder.parent.parent / self._target / run.run_id if self._target else folder
        stored = position or {}
        self._created_s = run.created_unix_ns / 1e9
        name = f"events.out.tfevents.{int(self._created_s):010d}.{run.run_id}"
        self._file = OwnedFile(base / name, int(stored.get("num_bytes", 0)))
        self._num_skipped = int(stored.get("num_skipped", 0))
        self._params = frozenset(stored.get("params", ()))
        self._series, self._attempt = _read_state(self._file)

    def write(self, batch: Sequence[Emission]) -> Position:
        """Append the batch; durable on return."""
        assert self._file is not None  # write comes after open
        encoder = _Encoder(self._series, self._attempt, self._params)
        if self._file.num_bytes == 0:
            encoder.begin(self._created_s)
        for emission in batch:
            encoder.add(emission)
        data = encoder.finish()
        num_bytes = self._file.append(data)
        # Only now: a batch that failed is written again from the same state.
        self._series.update(encoder.changed)
        self._attempt, self._params = encoder.attempt, encoder.params
        self._num_skipped += encoder.num_skipped
        return {"num_bytes": num_bytes, "num_skipped": self._num_skipped, "params": sorted(self._params)}

    def close(self, status: RunStatus) -> None:
        """Close the file; at the run's end, say in it what was left out."""
        if self._file is None:
            return
        if status.is_ended and self._num_skipped:
            # Beyond the position: another start cuts it off, and its end writes it again.
            encoder = _Encoder(self._series, self._attempt, self._params)
            encoder.add_text("ddplog/skipped", self.detail, None, max(self._attempt, 0), self._created_s)
            self._file.append(encoder.finish())
        self._file.close()
        self._file = None


class _Encoder:
    """Encodes one batch on top of the state so far, which it does not change."""

    def __init__(self, series: dict[str, Series], attempt: int, params: frozenset[int]) -> None:
        self.changed: dict[str, Series] = {}
        self.attempt = attempt
        self.params = params
        self.num_skipped = 0
        self._series = ChainMap(self.changed, series)
        self._buffer = io.BytesIO()
        self._writer = RecordWriter(self._buffer)
        self._open: Any = None  # the event that further scalars of the same attempt and step may join
        self._new_params: list[Param] = []

    def begin(self, time_s: float) -> None:
        """Write what a file begins with."""
        self._write(event_pb2.Event(wall_time=time_s, file_version=_FILE_VERSION))

    def add(self, emission: Emission) -> None:
        """Encode one emission."""
        if isinstance(emission, Param):
            self._add_param(emission)
            return
        time_s = emission.time_unix_ns / 1e9
        if isinstance(emission, Point):
            if emission.revision == 0:
                self._add_scalar(_clean(emission.key), emission, time_s)
        elif isinstance(emission, RankPoint):
            self._add_scalar(_clean(f"{emission.key}/rank{emission.rank}"), emission, time_s)
        elif isinstance(emission, Text):
            tag = emission.key if emission.rank == 0 else f"{emission.key}/rank{emission.rank}"
            self.add_text(tag, emission.text, emission.step, emission.attempt, time_s)
        elif isinstance(emission, Event):
            self.add_text("ddplog/events", _describe(emission), emission.step, emission.attempt, time_s)

    def add_text(self, tag: str, text: str, step: int | None, attempt: int, time_s: float) -> None:
        """Encode a text at its step, or at the tag's next free one."""
        tag = _clean(f"{tag}/text_summary")
        last = self._series.get(tag)
        if last is None:
            step = 0 if step is None else step
        elif step is None or (step <= last[1] and attempt <= last[0]):
            step, attempt = last[1] + 1, max(attempt, last[0])
        self._end_event()
        self._place(tag, attempt, step)
        event = event_pb2.Event(wall_time=time_s, step=step)
        metadata = summary_pb2.SummaryMetadata(plugin_data={"plugin_name": "text"})
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[{"size": 1}]),
            string_val=[text.encode("utf-8", "replace")],
        )
        event.summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
        self._write(event)

    def finish(self) -> bytes:
        """Return the batch's bytes."""
        if self._new_params:
            first = self._new_params[0]
            self.add_text("params", _table(self._new_params), None, first.attempt, first.time_unix_ns / 1e9)
        self._end_event()
        return self._buffer.getvalue()

    def _add_scalar(self, tag: str, point: Point | RankPoint, time_s: float) -> None:
        last = self._series.get(tag)
        if last is not None and (point.attempt < last[0] or (point.attempt == last[0] and point.step <= last[1])):
            self.num_skipped += 1
            return
        is_rewind = last is not None and point.step <= last[1]
        if is_rewind or self._open is None or point.attempt != self.attempt or point.step != self._open.step:
            self._end_event()
            self._place(tag, point.attempt, point.step)
            self._open = event_pb2.Event(wall_time=time_s, step=point.step)
        self.changed[tag] = (point.attempt, point.step)
        self._open.summary.value.add(tag=tag, simple_value=math.nan if point.value is None else point.value)

    def _add_param(self, param: Param) -> None:
        # A checksum is enough: two different pairs that share one hide a table row, with odds of 1 to 4e9 a pair.
        mark = crc32(f"{param.name}\0{param.value}".encode("utf-8", "replace"))
        if mark not in self.params:
            self.params |= {mark}
            self._new_params.append(param)

    def _place(self, tag: str, attempt: int, step: int) -> None:
        """Write what must stand before an event: its attempt if that changes, the mark of a rewind if it is one."""
        last = self._series.get(tag)
        if attempt != self.attempt:
            self.attempt = attempt
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START, msg=f"{_ATTEMPT}{attempt}")
            self._write(event_pb2.Event(step=step, session_log=session))
        if last is not None and step <= last[1]:
            self._write(event_pb2.Event(step=last[1] + 1, summary=summary_pb2.Summary()))
        self.changed[tag] = (attempt, step)

    def _end_event(self) -> None:
        if self._open is not None:
            self._write(self._open)
            self._open = None

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _read_state(file: OwnedFile) -> tuple[dict[str, Series], int]:
    series: dict[str, Series] = {}
    attempt = -1
    for event in _events(file):
        if event.session_log.msg.startswith(_ATTEMPT):
            attempt = int(event.session_log.msg.removeprefix(_ATTEMPT))
        for value in event.summary.value:
            series[value.tag] = (attempt, event.step)
    return series, attempt


def _events(file: OwnedFile) -> Iterator[Any]:
    # Framing: length, its checksum (4 bytes), the event, its checksum (4 bytes). All of it was durable when it was
    # stored, so the checksums (slow in Python) are left to TensorBoard.
    try:
        with file.path.open("rb") as stream:
            while stream.tell() < file.num_bytes:
                (length,) = _LENGTH.unpack(stream.read(12)[:8])
                # Bounded: in a file that is not ours the length may be any number. A short event does not parse, or
                # leaves the loop at a wrong place, which the next length shows.
                length = min(length, file.num_bytes - stream.tell())
                yield event_pb2.Event.FromString(stream.read(length))
                stream.seek(4, io.SEEK_CUR)
    except (struct.error, ValueError, DecodeError) as exc:
        raise PermanentSinkError(f"{file.path}: not the event file that was delivered: {exc}") from exc
    except OSError as exc:
        raise RetryableSinkError(f"{file.path}: {exc.strerror}") from exc


def _clean(text: str) -> str:
    """A proto string takes no lone surrogate."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _describe(event: Event) -> str:
    rank = "" if event.rank is None else f" rank {event.rank}"
    data = f"\n\n    {json.dumps(event.data, ensure_ascii=False)}" if event.data else ""
    return f"**{event.level}** {event.kind}{rank}: {event.message}{data}"


def _table(params: Sequence[Param]) -> str:
    lines = ["| name | value |", "|---|---|"]
    lines += [f"| {_cell(param.name)} | {_cell(param.value)} |" for param in params]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
