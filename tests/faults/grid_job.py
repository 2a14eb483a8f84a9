"""A job whose every value is known: N steps x K keys on R ranks, paced by the test, and its check in whole columns.

value(rank, step, key) is a whole number, different for every triple, so that a lost, doubled, swapped or mixed value
shows in n, mean, min or max, and every mean is exact. The ranks log only as far as the test has allowed: training
lasts as long as the faults do, however slow the machine is.
"""

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
from system.jobs import Job

RANK_STRIDE, KEY_STRIDE = 3, 40
"""Steps lie KEYS * KEY_STRIDE apart; at most 13 ranks."""

SCRIPT = """
import os, struct, sys, time
import ddplog
rank, num_steps, num_keys = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2])
allowed = os.open("allowed", os.O_RDONLY)
keys = [f"key_{key:03}" for key in range(num_keys)]
offsets = [float(key * 40 + rank * 3) for key in range(num_keys)]
run = ddplog.init()
most = 0
for step in range(num_steps):
    while step >= most:
        (most,) = struct.unpack("<q", os.pread(allowed, 8, 0))
        if step >= most:
            time.sleep(0.002)
    base = float(step * num_keys * 40)
    run.log({key: base + offset for key, offset in zip(keys, offsets)}, step=step)
    time.sleep(0.002)
"""


class Grid:
    """The job's size, and how far its ranks may go.

    Args:
        job: Its folder.
        ranks: R.
        steps: N.
        keys: K.
    """

    def __init__(self, job: Job, *, ranks: int, steps: int, keys: int) -> None:
        self.job, self.ranks, self.steps, self.keys = job, ranks, steps, keys
        self._allowed = job.folder / "allowed"
        self.allow(0)

    @property
    def values(self) -> int:
        return self.ranks * self.steps * self.keys

    @property
    def points(self) -> int:
        return self.steps * self.keys

    def allow(self, part: float) -> None:
        """Let the ranks go on to this part of their steps."""
        descriptor = os.open(self._allowed, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, struct.pack("<q", round(part * self.steps)), 0)
        os.close(descriptor)

    def start(self, **environ: str) -> subprocess.Popen[str]:
        """Start the ranks; however slow the machine is, none is left out of a step, so each is emitted once."""
        words = (self.job.script(SCRIPT), str(self.steps), str(self.keys))
        return self.job.start(*self.job.ranks(self.ranks, *words), DDPLOG_GRACE_S="600", **environ)

    def value(self, rank: int, key: int) -> np.ndarray:
        """Return what a rank logged under a key, [N]."""
        return np.arange(self.steps) * float(self.keys * KEY_STRIDE) + key * KEY_STRIDE + rank * RANK_STRIDE

    def check_store(self, timeout_s: float = 120.0) -> None:
        """The store has every point once, from all ranks, with the exact values, and no other; nothing was dropped."""
        with self.job.open(timeout_s) as run:
            assert run.keys() == tuple(f"key_{key:03}" for key in range(self.keys))
            for key, name in enumerate(run.keys()):
                points = run.metric(name)
                assert np.array_equal(points.step, np.arange(self.steps)), f"{name}: a step is missing, or there twice"
                assert (points.n == self.ranks).all(), f"{name}: n is not {self.ranks} everywhere"
                assert (points.revision == 0).all(), f"{name}: emitted again"
                means = np.mean([self.value(rank, key) for rank in range(self.ranks)], axis=0)
                assert np.array_equal(points.value, means), f"{name}: a wrong value"
                assert np.array_equal(points.min, self.value(0, key)), f"{name}: a wrong minimum"
                assert np.array_equal(points.max, self.value(self.ranks - 1, key)), f"{name}: a wrong maximum"
            assert run.num_points == self.points
            assert run.drops() == ()
            assert (run.status, run.detail) == ("finished", "")
            assert sorted(writer.rank for writer in run.writers()) == list(range(self.ranks))
            assert sum(writer.num_values for writer in run.writers()) == self.values

    def check_jsonl(self) -> None:
        """The JSONL sink's file has every point once, in id order, and with the same values."""
        lines = read_points(self.job.run_dir / "sinks" / "jsonl" / "r1.jsonl")
        assert len(lines["id"]) == self.points, "lost or doubled"
        assert (np.diff(lines["id"]) > 0).all(), "not in id order, or twice"
        assert (lines["n"] == self.ranks).all()
        cells = lines["step"] * self.keys + lines["key"]
        assert np.array_equal(np.sort(cells), np.arange(self.points)), "a point twice, and another one missing"
        means = np.mean([rank * RANK_STRIDE for rank in range(self.ranks)])
        assert np.array_equal(lines["value"], cells * float(KEY_STRIDE) + means), "a wrong value"


def read_points(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a JSONL sink's points: in C, since a million lines take Python 10 s."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.json

    fields = {"type": pa.string(), "id": pa.int64(), "key": pa.string(), "step": pa.int64(), "n": pa.int64(),
              "value": pa.float64(), "revision": pa.int64()}  # fmt: skip
    table = pa.json.read_json(
        path,
        pa.json.ReadOptions(block_size=8 << 20),
        pa.json.ParseOptions(explicit_schema=pa.schema(fields.items()), unexpected_field_behavior="ignore"),
    )
    table = table.filter(pa.compute.equal(table["type"], "point"))
    keys = pa.compute.utf8_slice_codeunits(table["key"], 4).cast(pa.int64()).to_numpy()
    return {"key": keys, **{name: table[name].to_numpy() for name in ("id", "step", "n", "value", "revision")}}
