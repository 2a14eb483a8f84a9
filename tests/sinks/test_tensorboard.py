"""TensorBoard's own readers see one series per key: steps strictly rising, nothing doubled, the newest attempt."""

import logging

import pytest
from event_files import read_as_server, read_scalars, read_texts

from ddplog.core.delivery import Event, Param, RankPoint, Text
from ddplog.errors import PermanentSinkError
from ddplog.sinks.tensorboard import TensorBoardSink
from ddplog.testing import ENDED, RUN, make_point


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run-1" / "sinks" / "tensorboard"
    path.mkdir(parents=True)
    return path


def deliver(folder, *batches, position=None, status=ENDED):
    sink = TensorBoardSink()
    sink.open(RUN, folder, position)
    for batch in batches:
        position = sink.write(batch)
    sink.close(status)
    return position


def points(*rows, attempt=0):
    return [make_point(i + 1, key, step, value, attempt=attempt) for i, (key, step, value) in enumerate(rows)]


def text(key, value, step=None, rank=0, attempt=0):
    return Text(id=1, attempt=attempt, rank=rank, key=key, step=step, text=value, time_unix_ns=1)


def both_readers(folder):
    """The scalars, which the classic accumulator and the server's must agree on."""
    classic, server = read_scalars(folder), read_as_server(folder)
    assert {tag: server[tag] for tag in classic} == classic
    return classic


def test_one_file_of_a_name_that_tensorboard_takes(folder):
    deliver(folder, points(("loss", 1, 0.5)))
    assert [path.name for path in folder.iterdir()] == ["events.out.tfevents.1700000000.run-1"]


def test_a_late_lower_step_is_left_out_counted_and_told_at_the_end(folder):
    rows = points(("loss", 1, 1.0), ("loss", 5, 5.0), ("loss", 3, 3.0), ("loss", 5, 6.0), ("loss", 6, 6.0))
    position = deliver(folder, rows)
    assert both_readers(folder) == {"loss": [(1, 1.0), (5, 5.0), (6, 6.0)]}
    assert position["num_skipped"] == 2
    assert read_texts(folder)["ddplog/skipped"] == [(0, "2 late points are in the store only")]
    sink = TensorBoardSink()
    sink.open(RUN, folder, position)
    assert sink.detail.startswith("2 late")
    sink.close(ENDED)


def test_the_order_of_steps_is_kept_across_a_restart(folder):
    """What was written before the restart is read back from the file."""
    position = deliver(folder, points(("loss", 1, 1.0), ("loss", 5, 5.0)))
    deliver(folder, points(("loss", 4, 4.0), ("loss", 6, 6.0)), position=position)
    assert both_readers(folder) == {"loss": [(1, 1.0), (5, 5.0), (6, 6.0)]}


@pytest.mark.parametrize("has_restart", [False, True])
@pytest.mark.parametrize("first", [1, 5, 9, 10, 11, 20])
def test_a_new_attempt_supersedes_from_where_it_rewinds(folder, first, has_restart, caplog):
    """Wherever the checkpoint was: before, at and after the last step that was written."""
    caplog.set_level(logging.CRITICAL)
    old = points(*[("loss", step, 1.0) for step in range(1, 11)])
    new = points(*[("loss", step, 2.0) for step in range(first, first + 4)], attempt=1)
    if has_restart:
        deliver(folder, new[1:], position=deliver(folder, old, new[:1]))
    else:
        deliver(folder, old, new)
    kept = [(step, 1.0) for step in range(1, 11) if step < first]
    assert both_readers(folder) == {"loss": kept + [(step, 2.0) for step in range(first, first + 4)]}


def test_a_rewind_purges_no_other_key(folder):
    """A validation metric counted in epochs must not wipe the training metrics counted in steps."""
    old = points(*[("train", step, 1.0) for step in range(100, 110)], ("val", 1, 1.0), ("val", 2, 1.0))
    new = points(("val", 2, 2.0), ("train", 105, 2.0), ("val", 3, 2.0), attempt=1)
    deliver(folder, old, new)
    assert both_readers(folder) == {
        "train": [(step, 1.0) for step in range(100, 105)] + [(105, 2.0)],
        "val": [(1, 1.0), (2, 2.0), (3, 2.0)],
    }


def test_many_keys_rewind_together(folder):
    keys = [f"k{i}" for i in range(5)]
    old = points(*[(key, step, 1.0) for step in range(4) for key in keys])
    new = points(*[(key, step, 2.0) for step in range(2, 6) for key in keys], attempt=1)
    deliver(folder, old, new)
    wanted = [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert both_readers(folder) == dict.fromkeys(keys, wanted)


def test_the_old_attempts_late_values_are_left_out(folder):
    """The highest attempt wins for each key."""
    position = deliver(folder, points(("a", 1, 1.0), ("b", 1, 1.0)), points(("a", 1, 2.0), attempt=1))
    deliver(folder, points(("a", 7, 1.0), ("b", 7, 1.0)), position=position)
    assert both_readers(folder) == {"a": [(1, 2.0)], "b": [(1, 1.0), (7, 1.0)]}


def test_a_metric_kept_per_rank_is_a_series_per_rank(folder):
    batch = [
        RankPoint(id=r, key="gpu", attempt=0, step=s, rank=r, value=float(r), time_unix_ns=1)
        for s in (1, 2)
        for r in (0, 1)
    ]
    deliver(folder, batch)
    assert both_readers(folder) == {"gpu/rank0": [(1, 0.0), (2, 0.0)], "gpu/rank1": [(1, 1.0), (2, 1.0)]}


def test_no_text_is_left_out(folder):
    """Several at one step, at none, and late: each takes a step of its own."""
    position = deliver(folder, points(("loss", 50, 1.0)), [text("t", "a", 5), text("t", "b", 5), text("t", "c")])
    deliver(folder, [text("t", "d", 3), text("t", "e", 9), text("t", "f", 9, rank=2)], position=position)
    assert read_texts(folder) == {
        "t": [(5, "a"), (6, "b"), (7, "c"), (8, "d"), (9, "e")],
        "t/rank2": [(9, "f")],
    }


def test_a_text_and_a_metric_of_one_name_do_not_meet(folder):
    deliver(folder, [*points(("x", 1, 0.5)), text("x", "hello", 1)])
    assert both_readers(folder)["x"] == [(1, 0.5)]
    assert read_texts(folder)["x"] == [(1, "hello")]


def test_params_are_shown_once_also_when_every_rank_logs_them(folder):
    def params(rank, **values):
        return [
            Param(id=1, attempt=0, rank=rank, name=name, value=value, time_unix_ns=1) for name, value in values.items()
        ]

    position = deliver(folder, params(0, lr="0.1", note="a|b\nc") + params(1, lr="0.1"))
    deliver(folder, params(2, lr="0.1"), params(0, extra="7"), position=position)
    assert read_texts(folder)["params"] == [
        (0, "| name | value |\n|---|---|\n| lr | 0.1 |\n| note | a\\|b c |"),
        (1, "| name | value |\n|---|---|\n| extra | 7 |"),
    ]


def test_an_event_is_shown_as_text(folder):
    event = Event(
        id=1, attempt=0, rank=3, step=4, kind="alert", level="warning", message="hot", data={"t": 91}, time_unix_ns=1
    )
    deliver(folder, [event])
    assert read_texts(folder) == {"ddplog/events": [(4, '**warning** alert rank 3: hot\n\n    {"t": 91}')]}


def test_a_failed_write_changes_nothing(folder, monkeypatch):
    """The same batch goes again; it must give the same bytes."""
    from ddplog.errors import RetryableSinkError
    from ddplog.sinks import owned_file

    sink = TensorBoardSink()
    sink.open(RUN, folder, None)
    sink.write(points(("loss", 1, 1.0)))

    def broken(descriptor):
        raise OSError(28, "No space left on device")

    batch = [*points(("loss", 1, 1.5), ("loss", 2, 2.0)), text("t", "a")]
    with monkeypatch.context() as patch:
        patch.setattr(owned_file.os, "fsync", broken)
        with pytest.raises(RetryableSinkError):
            sink.write(batch)
    assert sink.write(batch)["num_skipped"] == 1
    sink.close(ENDED)
    assert both_readers(folder) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_a_target_gets_a_folder_per_run(tmp_path, folder):
    sink = TensorBoardSink(str(tmp_path / "logs"))
    sink.open(RUN, folder, None)
    sink.write(points(("loss", 1, 1.0)))
    sink.close(ENDED)
    assert both_readers(tmp_path / "logs" / "run-1") == {"loss": [(1, 1.0)]}


def test_a_file_that_is_not_ours_is_refused(folder):
    position = deliver(folder, points(("loss", 1, 1.0)))
    path = next(folder.iterdir())
    path.write_bytes(b"\x07" * path.stat().st_size)
    with pytest.raises(PermanentSinkError):
        deliver(folder, position=position)
