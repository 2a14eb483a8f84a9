"""The JSONL file is valid JSON on every line, and goes on where the cursor stands."""

import math

from ddplog.core.delivery import Event
from ddplog.sinks.jsonl import JsonlSink, as_object
from ddplog.testing import ENDED, EVERY_KIND, FIRST, RUN, make_point, read_jsonl


def deliver(sink, folder, batch):
    folder.mkdir(parents=True, exist_ok=True)
    sink.open(RUN, folder, None)
    sink.write(batch)
    sink.close(ENDED)


def test_every_kind_has_its_type_and_fields(tmp_path):
    folder = tmp_path / "run-1" / "sinks" / "jsonl"
    deliver(JsonlSink(), folder, [make_point(1, "损失", 3, 0.25), *EVERY_KIND])
    lines = read_jsonl(folder / "run-1.jsonl")
    assert [line["type"] for line in lines] == ["point", "rank_point", "rank_point", "text", "param", "event"]
    assert lines[0] == {
        "type": "point", "id": 1, "key": "损失", "attempt": 0, "step": 3, "value": 0.25, "n": 1, "expected": 1,
        "min": 0.25, "min_rank": 0, "max": 0.25, "max_rank": 0, "mean": 0.25, "std": 0.0, "nan_count": 0,
        "inf_count": 0, "bad_rank": None, "revision": 0, "time_unix_ns": RUN.created_unix_ns + 3_000_000,
    }  # fmt: skip


def test_nan_is_null_and_infinity_a_word():
    """Reliability case 19: JSON has neither, and json.dumps would write what no parser takes."""
    assert as_object(make_point(1, "k", 1, math.nan))["value"] is None
    assert as_object(make_point(1, "k", 1, None))["nan_count"] == 1
    assert as_object(make_point(1, "k", 1, math.inf))["max"] == "Infinity"
    event = Event(
        id=1, attempt=0, rank=None, step=None, kind="k", level="info", message="",
        data={"a": [math.nan, (-math.inf,)]}, time_unix_ns=1,
    )  # fmt: skip
    assert as_object(event)["data"] == {"a": [None, ["-Infinity"]]}


def test_a_value_keeps_all_its_digits(tmp_path):
    folder = tmp_path / "run-1" / "sinks" / "jsonl"
    deliver(JsonlSink(), folder, [make_point(1, "k", 1, 0.1 + 0.2)])
    assert read_jsonl(folder / "run-1.jsonl")[0]["value"] == 0.1 + 0.2


def test_a_target_is_a_folder_counted_from_the_runs(tmp_path):
    """Not from the working directory, which a later delivery does not share."""
    folder = tmp_path / "runs" / "run-1" / "sinks" / "jsonl-x"
    deliver(JsonlSink("../../out"), folder, FIRST)
    assert len(read_jsonl(tmp_path / "out" / "run-1.jsonl")) == len(FIRST)
    deliver(JsonlSink(str(tmp_path / "absolute")), folder, FIRST)
    assert len(read_jsonl(tmp_path / "absolute" / "run-1.jsonl")) == len(FIRST)


def test_closing_unopened_is_allowed():
    sink = JsonlSink()
    sink.close(ENDED)
    assert "None" in repr(sink)
