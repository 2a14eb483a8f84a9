"""A job whose every value is known: N steps of numbered keys on R ranks, paced by the test, checked in whole columns.

value(rank, step, number) is a whole number, different for every triple, and every mean and sum of them is exact: what
is lost, doubled, swapped or mixed shows in n, value, min or max. Keys with an odd number are sums, so that a record
that is taken twice shows too. Step s has the keys of family s // B % F. The ranks log only as far as the test has allowed:
training lasts as long as the faults do, however slow the machine is.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from system.jobs import Job

CELLS = 100
"""Numbers are below it: a step and a number make a cell."""
RANK_STRIDE, KEY_STRIDE = 3, 40
"""At most 13 ranks."""

SCRIPT = """
import json, os, struct, sys, time
import ddplog
rank, allowed = int(os.environ["RANK"]), os.open("allowed", os.O_RDONLY)
num_steps, block, pause_s, patience_s, families = json.loads(sys.argv[1])
keys = [[f"{'sum' if number % 2 else 'key'}_{number:03}" for number in family] for family in families]
offsets = [[float(number * 40 + rank * 3) for number in family] for family in families]
run = ddplog.init()
run.define_metric("sum_*", reduce="sum")
most = 0
for step in range(num_steps):
    until = None
    while step >= most:
        (most,) = struct.unpack("<q", os.pread(allowed, 8, 0))
        if step >= most:
            until = until or time.monotonic() + patience_s
            if patience_s and time.monotonic() > until:
                break
            time.sleep(0.002)
    base, family = float(step * 4000), step // block % len(families)
    run.log({key: base + offset for key, offset in zip(keys[family], offsets[family])}, step=step)
    if pause_s:
        time.sleep(pause_s)
"""


class Grid:
    """The job's size, and how far its ranks may go.

    Args:
        job: Its folder.
        ranks: R.
        steps: N.
        families: F lists of numbers below CELLS, each in one of them only.
        block: B, how many steps have the same keys.
        pause_s: After every step, seconds.
        patience_s: A rank that has waited so long logs a step all the same, as training does: it is log() that looks
            after the agent. 0: it waits.
    """

    def __init__(
        self,
        job: Job,
        *,
        ranks: int,
        steps: int,
        families: Sequence[Sequence[int]],
        block: int = 1,
        pause_s: float = 0.002,
        patience_s: float = 0.0,
    ) -> None:
        self.job, self.ranks, self.steps, self.families = job, ranks, steps, families
        self._block, self._pause_s, self._patience_s = block, pause_s, patience_s
        self._allowed = job.folder / "allowed"
        self.allow(0)

    @property
    def records(self) -> int:
        return self.ranks * self.steps

    @property
    def points(self) -> int:
        return sum(len(self._steps(index)) * len(family) for index, family in enumerate(self.families))

    @property
    def values(self) -> int:
        return self.ranks * self.points

    def _steps(self, family: int) -> np.ndarray:
        steps = np.arange(self.steps)
        return np.asarray(steps[steps // self._block % len(self.families) == family])

    def allow(self, steps: float) -> None:
        """Let the ranks go on to this step."""
        descriptor = os.open(self._allowed, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, struct.pack("<q", min(round(steps), self.steps)), 0)
        os.close(descriptor)

    def start(self, **environ: str) -> subprocess.Popen[str]:
        """Start the ranks; however slow the machine is, none is left out of a step, so each is emitted once."""
        words = json.dumps((self.steps, self._block, self._pause_s, self._patience_s, self.families))
        command = self.job.ranks(self.ranks, self.job.script(SCRIPT), words)
        return self.job.start(*command, DDPLOG_GRACE_S="3600", **environ)

    def reduced(self, cells: np.ndarray) -> np.ndarray:
        """Return the value that the points of these cells, step * CELLS + number, must have."""
        means = cells * float(KEY_STRIDE) + RANK_STRIDE * (self.ranks - 1) / 2
        return np.asarray(means * np.where(cells % 2, self.ranks, 1))

    def check_store(self, timeout_s: float) -> None:
        """The store has every point once, from all ranks, with the exact values, and no other; nothing was dropped."""
        with self.job.open(timeout_s) as run:
            numbers = sorted(number for family in self.families for number in family)
            assert set(run.keys()) == set(map(name_of, numbers))
            for index, family in enumerate(self.families):
                steps = self._steps(index)
                for number in family:
                    points, cells, name = run.metric(name_of(number)), steps * CELLS + number, name_of(number)
                    assert np.array_equal(points.step, steps), f"{name}: a step is missing, or there twice"
                    assert (points.n == self.ranks).all(), f"{name}: n is not {self.ranks} everywhere"
                    assert (points.revision == 0).all(), f"{name}: emitted again"
                    assert np.array_equal(points.value, self.reduced(cells)), f"{name}: a wrong value"
                    lowest = cells * float(KEY_STRIDE)
                    assert np.array_equal(points.min, lowest), f"{name}: a wrong minimum"
                    highest = lowest + RANK_STRIDE * (self.ranks - 1)
                    assert np.array_equal(points.max, highest), f"{name}: a wrong maximum"
            assert run.num_points == self.points
            assert run.drops() == ()
            assert (run.status, run.detail) == ("finished", "")
            assert sorted(writer.rank for writer in run.writers()) == list(range(self.ranks))
            definitions = self.ranks
            assert sum(writer.num_values for writer in run.writers()) == self.values + definitions

    def check_jsonl(self) -> None:
        """The JSONL sink's file has every point once, in the order of ids, and with the same values."""
        lines = read_points(self.job.run_dir / "sinks" / "jsonl" / "r1.jsonl")
        assert (np.diff(lines["id"]) > 0).all(), "not in the order of ids, or one twice"
        self.check_cells(lines["step"] * CELLS + lines["number"], lines["n"], lines["value"])

    def check_cells(self, cells: np.ndarray, counts: np.ndarray, values: np.ndarray) -> None:
        """What a sink has is every point once, with its value."""
        wanted = [self._steps(i) * CELLS + number for i, family in enumerate(self.families) for number in family]
        assert len(cells) == self.points, "lost or doubled"
        assert np.array_equal(np.sort(cells), np.sort(np.concatenate(wanted))), "a point twice, and another one missing"
        assert (counts == self.ranks).all()
        assert np.array_equal(values, self.reduced(cells)), "a wrong value"


def name_of(number: int) -> str:
    """Return a key's name."""
    return f"{'sum' if number % 2 else 'key'}_{number:03}"


def read_points(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a JSONL sink's points: in C, since a million lines take Python 10 s."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.json

    fields = {"type": pa.string(), "id": pa.int64(), "key": pa.string(), "step": pa.int64(), "n": pa.int64(),
              "value": pa.float64()}  # fmt: skip
    table = pa.json.read_json(
        path,
        pa.json.ReadOptions(block_size=8 << 20),
        pa.json.ParseOptions(explicit_schema=pa.schema(fields.items()), unexpected_field_behavior="ignore"),
    )
    table = table.filter(pa.compute.equal(table["type"], "point"))
    numbers = pa.compute.utf8_slice_codeunits(table["key"], 4).cast(pa.int64()).to_numpy()
    return {"number": numbers, **{name: table[name].to_numpy() for name in ("id", "step", "n", "value")}}
