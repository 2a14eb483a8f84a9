"""Fakes that ship, and the contract that every sink keeps. For tests, of ddplog and of plug-ins; imports no pytest.

A test module subclasses SinkContract, says how to make the sink and how to read it back, and lets pytest collect it:

    class TestMySink(SinkContract):
        def make(self): return MySink()
        def scalars(self, folder): ...
"""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ddplog.core.delivery import Emission, Event, Limits, Param, Point, Position, RankPoint, RunInfo, RunStatus, Text
from ddplog.errors import PermanentSinkError
from ddplog.sinks import Capabilities, Sink

Scalar = tuple[str, int, float]
"""Key, step and value of a point as a sink shows it."""

RUN: Final = RunInfo(run_id="run-1", project="tests", name="a run", created_unix_ns=1_700_000_000_000_000_000)
ENDED: Final = RunStatus(status="finished")


def make_point(id: int, key: str, step: int, value: float | None, *, attempt: int = 0, revision: int = 0) -> Point:  # noqa: A002
    """Make a point as one rank would give it; None is NaN."""
    is_inf = value is not None and math.isinf(value)
    return Point(
        id=id, key=key, attempt=attempt, step=step, value=value, n=1, expected=1, min=value, min_rank=0, max=value,
        max_rank=0, mean=value, std=None if is_inf or value is None else 0.0, nan_count=int(value is None),
        inf_count=int(is_inf), bad_rank=0 if is_inf or value is None else None, revision=revision,
        time_unix_ns=RUN.created_unix_ns + step * 1_000_000,
    )  # fmt: skip


class MemorySink:
    """A sink that keeps what it is given, and fails on demand.

    Args:
        stored: What the tracker has; hand it to the next MemorySink to play a restart.
        failures: Raised by the next calls of `open`, `write` and `close`, one each; None lets a call pass.
        poisoned: Ids that make a batch fail for good.
        limits: As for every sink.
    """

    def __init__(
        self,
        stored: list[Emission] | None = None,
        *,
        failures: Sequence[Exception | None] = (),
        poisoned: frozenset[int] = frozenset(),
        limits: Limits | None = None,
    ) -> None:
        self.stored: list[Emission] = [] if stored is None else stored
        self.failures = deque(failures)
        self.poisoned = poisoned
        self.limits = limits or Limits()
        self.capabilities = Capabilities(can_overwrite=True, promise="exactly once")
        self.detail = ""
        self.batches: list[tuple[Emission, ...]] = []
        """Every batch offered, with those that failed."""
        self.closed: RunStatus | None = None

    def __repr__(self) -> str:
        return f"MemorySink(stored={len(self.stored)}, batches={len(self.batches)}, closed={self.closed})"

    def open(self, run: RunInfo, folder: Path, position: Position | None) -> None:  # noqa: ARG002  # the interface
        """Forget what lies beyond the position."""
        self._fail()
        del self.stored[int(position["num_items"]) if position else 0 :]

    def write(self, batch: Sequence[Emission]) -> Position:
        """Keep the batch, or fail as told."""
        self.batches.append(tuple(batch))
        self._fail()
        if any(emission.id in self.poisoned for emission in batch):
            raise PermanentSinkError("poisoned")
        self.stored += batch
        return {"num_items": len(self.stored)}

    def close(self, status: RunStatus) -> None:
        """Remember the status."""
        self._fail()
        self.closed = status

    def _fail(self) -> None:
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure


class SinkContract:
    """What every sink keeps. Methods that start with test take a fresh folder, which pytest's tmp_path gives."""

    def make(self) -> Sink:
        """Make the sink, as a restarted process would."""
        raise NotImplementedError

    def scalars(self, folder: Path) -> list[Scalar]:
        """Read the points back from the sink's folder, in order; NaN as nan."""
        raise NotImplementedError

    def test_two_batches_arrive_once_and_in_order(self, tmp_path: Path) -> None:
        """The plain path."""
        folder = self._folder(tmp_path)
        self._deliver(folder, None, FIRST, SECOND)
        self._expect(folder, FIRST + SECOND)

    def test_a_restart_goes_on_at_the_position(self, tmp_path: Path) -> None:
        """Stopping between two batches must not show."""
        folder = self._folder(tmp_path)
        position = self._deliver(folder, None, FIRST)
        self._deliver(folder, position, SECOND)
        self._expect(folder, FIRST + SECOND)

    def test_a_crash_before_the_cursor_was_stored_doubles_nothing(self, tmp_path: Path) -> None:
        """The write happened, all or part of it, but the position it returned is lost: cut at every byte."""
        before, after = tmp_path / "before", tmp_path / "after"
        position = self._deliver(self._folder(before), None, FIRST)
        shutil.copytree(before, after)
        self._deliver(self._folder(after), position, SECOND)
        full = {path.relative_to(after): path.read_bytes() for path in after.rglob("*") if path.is_file()}
        for path, data in full.items():
            old = before / path
            start = old.stat().st_size if old.exists() else 0
            for cut in range(start, len(data) + 1):
                crashed = tmp_path / "crashed"
                shutil.copytree(after, crashed)
                (crashed / path).write_bytes(data[:cut])
                self._deliver(self._folder(crashed), position, SECOND)
                _check((crashed / path).read_bytes() == data, f"{path} cut at {cut} did not become what it was")
                shutil.rmtree(crashed)

    def test_a_crash_before_the_first_cursor_doubles_nothing(self, tmp_path: Path) -> None:
        """No position at all, but a file that has something in it."""
        folder = self._folder(tmp_path)
        self._deliver(folder, None, FIRST)
        self._deliver(folder, None, FIRST, SECOND)
        self._expect(folder, FIRST + SECOND)

    def test_closing_at_the_end_and_delivering_more_later_doubles_nothing(self, tmp_path: Path) -> None:
        """A run may be continued after it ended; the sink is then opened at the old position again."""
        folder = self._folder(tmp_path)
        position = self._deliver(folder, None, FIRST, status=ENDED)
        self._deliver(folder, position, SECOND, status=ENDED)
        self._expect(folder, FIRST + SECOND)

    def test_nan_and_infinity_fail_no_batch(self, tmp_path: Path) -> None:
        """A diverged loss is when the tracker is looked at most."""
        folder = self._folder(tmp_path)
        values = [None, math.nan, math.inf, -math.inf, 1e300, 5e-324]
        batch = [make_point(i + 1, "loss", i, value) for i, value in enumerate(values)]
        self._deliver(folder, None, batch)
        found = self.scalars(folder)
        _check(len(found) == len(values), f"{len(found)} of {len(values)} arrived")
        _check(math.isnan(found[0][2]) and math.isnan(found[1][2]), "NaN did not stay NaN")
        _check([value for _, _, value in found[2:4]] == [math.inf, -math.inf], "infinity did not stay infinity")

    def test_any_text_is_taken(self, tmp_path: Path) -> None:
        """Names and texts are the user's: other scripts, line breaks, markup, a lone surrogate."""
        folder = self._folder(tmp_path)
        odd = ["損失/訓練", "naïve 😀", "a\nb\u2028c", "| * <b>", "\ud800", "", " "]
        batch: list[Emission] = [make_point(i + 1, f"k{word}", 0, 1.0) for i, word in enumerate(odd)]
        batch += [_text(100 + i, word) for i, word in enumerate(odd)]
        batch += [
            Param(id=200 + i, attempt=0, rank=0, name=word, value=word, time_unix_ns=1) for i, word in enumerate(odd)
        ]
        self._deliver(folder, None, batch)
        _check([key for key, _, _ in self.scalars(folder)][:2] == ["k損失/訓練", "knaïve 😀"], "a name changed")

    def test_every_kind_of_emission_is_taken(self, tmp_path: Path) -> None:
        """A kind that a sink has no place for is left out, never an error."""
        folder = self._folder(tmp_path)
        self._deliver(folder, None, [*EVERY_KIND, make_point(50, "loss", 1, 2.0)])
        _check(("loss", 1, 2.0) in self.scalars(folder), "the point after the other kinds is missing")

    def test_a_revision_replaces_or_is_left_out(self, tmp_path: Path) -> None:
        """As `can_overwrite` says: the newest value, or the first one, never two values in one series."""
        folder = self._folder(tmp_path)
        late = make_point(9, "loss", 1, 7.0, revision=1)
        self._deliver(folder, None, [make_point(1, "loss", 1, 2.0), make_point(2, "loss", 2, 3.0)], [late])
        wanted = 7.0 if self.make().capabilities.can_overwrite else 2.0
        _check({(s, v) for _, s, v in self.scalars(folder)} == {(1, wanted), (2, 3.0)}, str(self.scalars(folder)))

    def test_the_position_is_json_and_says_what_it_promises(self, tmp_path: Path) -> None:
        """The position is stored as JSON beside the cursor."""
        position = self._deliver(self._folder(tmp_path), None, FIRST)
        _check(json.loads(json.dumps(position)) == position, "the position does not survive JSON")
        _check(bool(self.make().capabilities.promise), "no promise")

    def _folder(self, base: Path) -> Path:
        folder = base / "run-1" / "sinks" / "it"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _deliver(
        self,
        folder: Path,
        position: Position | None,
        *batches: Sequence[Emission],
        status: RunStatus = RunStatus(status="running"),  # noqa: B008  # frozen
    ) -> Position | None:
        sink = self.make()
        sink.open(RUN, folder, position)
        for batch in batches:
            position = sink.write(batch)
        sink.close(status)
        return position

    def _expect(self, folder: Path, emissions: Sequence[Emission]) -> None:
        wanted = [(e.key, e.step, e.value) for e in emissions if isinstance(e, Point)]
        _check(sorted(self.scalars(folder)) == sorted(wanted), f"{self.scalars(folder)} is not {wanted}")


def _check(is_kept: bool, message: str) -> None:
    if not is_kept:
        raise AssertionError(message)


def _text(id: int, text: str) -> Text:  # noqa: A002
    return Text(id=id, attempt=0, rank=0, key=f"t{text}", step=None, text=text, time_unix_ns=1)


FIRST: Final[list[Emission]] = [make_point(1, "loss", 1, 0.5), make_point(2, "acc", 1, 0.25), _text(3, "first")]
SECOND: Final[list[Emission]] = [make_point(5, "loss", 2, 1.5), _text(6, "second"), make_point(8, "acc", 2, 0.75)]
EVERY_KIND: Final[list[Emission]] = [
    RankPoint(id=1, key="gpu", attempt=0, step=1, rank=3, value=0.5, time_unix_ns=1),
    RankPoint(id=2, key="gpu", attempt=0, step=1, rank=4, value=None, time_unix_ns=1),
    replace(_text(3, "hello"), rank=2, step=4),
    Param(id=4, attempt=0, rank=0, name="lr", value="0.1", time_unix_ns=1),
    Event(
        id=5, attempt=0, rank=None, step=None, kind="alert", level="warning", message="hot",
        data={"at": [math.nan, math.inf]}, time_unix_ns=1,
    ),
]  # fmt: skip


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of the JSONL sink; strict: NaN and the like are errors."""

    def refuse(word: str) -> None:
        raise ValueError(f"{path}: {word} is not JSON")

    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line, parse_constant=refuse) for line in lines if line]
