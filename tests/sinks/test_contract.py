"""Every built-in sink keeps the contract."""

import math

from event_files import read_scalars

from ddplog.sinks.jsonl import JsonlSink
from ddplog.sinks.tensorboard import TensorBoardSink
from ddplog.testing import ENDED, FIRST, RUN, SECOND, MemorySink, SinkContract, read_jsonl


def _number(value):
    return math.nan if value is None else float(value.replace("Infinity", "inf")) if isinstance(value, str) else value


class TestJsonl(SinkContract):
    def make(self):
        return JsonlSink()

    def scalars(self, folder):
        points, lines = {}, read_jsonl(folder / "run-1.jsonl")
        assert len({line["id"] for line in lines}) == len(lines), "a line is doubled"
        for line in lines:
            if line["type"] == "point":
                points[line["key"], line["attempt"], line["step"]] = line
        return [(p["key"], p["step"], _number(p["value"])) for p in points.values()]


class TestTensorBoard(SinkContract):
    def make(self):
        return TensorBoardSink()

    def scalars(self, folder):
        return [(tag, step, value) for tag, points in read_scalars(folder).items() for step, value in points]


class TestMemory:
    """The fake promises the same as what it stands for."""

    def test_a_restart_forgets_what_lies_beyond_the_position(self, tmp_path):
        sink = MemorySink()
        sink.open(RUN, tmp_path, None)
        position = sink.write(FIRST)
        sink.write(SECOND)
        again = MemorySink(sink.stored)
        again.open(RUN, tmp_path, position)
        again.write(SECOND)
        again.close(ENDED)
        assert again.stored == FIRST + SECOND
        assert again.closed is ENDED
