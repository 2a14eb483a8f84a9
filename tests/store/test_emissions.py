"""The store is read by cursor: everything, once, in id order, in short reads."""

import sqlite3

import pytest
from emission_store import StoreMaker

from ddplog.core.delivery import Event, Param, Point, RankPoint, Text
from ddplog.errors import RunNotFoundError
from ddplog.store.emissions import EmissionReader


@pytest.fixture
def store(tmp_path):
    return StoreMaker(tmp_path / "run-1")


@pytest.fixture
def reader(store):
    reader = EmissionReader(store.run_dir)
    yield reader
    reader.close()


def test_all_tables_are_merged_by_id(store, reader):
    store.add_points([("loss", 1, 0.5)])
    store.add_others()
    store.add_points([("loss", 2, None)])
    page = reader.page(0, 100)
    assert [type(e) for e in page] == [Point, RankPoint, Text, Param, Event, Point]
    assert [e.id for e in page] == [1, 2, 3, 4, 5, 6]
    assert page[0].key == "loss"
    assert page[5].value is None
    assert page[2].text == "hällo"
    assert page[4].data == {"t": 91}


def test_a_superseded_point_keeps_its_place(store, reader):
    store.add_points([("loss", 1, 0.5), ("loss", 2, 0.25)])
    store.revise("loss", 1, 9.0)
    page = reader.page(0, 100)
    assert [(e.id, e.step, e.value, e.revision) for e in page] == [(1, 1, 0.5, 0), (2, 2, 0.25, 0), (3, 1, 9.0, 1)]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_pages_of_any_size_give_every_emission_once(store, reader, limit):
    store.add_points([("a", s, 1.0) for s in range(5)])
    store.add_others()
    store.skip_ids(10)
    store.revise("a", 2, 3.0)
    seen, cursor = [], 0
    while page := reader.page(cursor, limit):
        assert len(page) <= limit
        seen += [e.id for e in page]
        cursor = seen[-1]
    assert seen == [e.id for e in reader.page(0, 1000)] == sorted(set(seen))
    assert len(seen) == 10
    assert reader.last_id() == cursor


def test_an_open_reader_sees_what_is_committed_later(store, reader):
    assert reader.page(0, 10) == []
    store.add_points([("loss", 1, 0.5)])
    assert len(reader.page(0, 10)) == 1


def test_no_read_is_left_open(store, reader):
    """A reader inside a statement would keep the WAL from being checkpointed."""
    store.add_points([("loss", s, 0.5) for s in range(50)])
    reader.page(0, 10)
    reader.status()
    with store.connect() as db:
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0


def test_a_page_is_one_snapshot(store, reader, monkeypatch):
    """A commit between the tables' queries must not make the cursor pass what the page does not hold."""
    import ddplog.store.emissions as module

    store.add_points([("loss", 1, 0.5)])
    make = module._MAKERS["points"]
    queries = dict(module._QUERIES)

    class Committing(dict):
        def items(self):
            for i, item in enumerate(queries.items()):
                yield item
                if i == 0:
                    store.add_points([("loss", 2, 0.5)])
                    store.add_others()

    monkeypatch.setattr(module, "_QUERIES", Committing(queries))
    assert [e.id for e in reader.page(0, 100)] == [1]
    monkeypatch.undo()
    assert [e.id for e in reader.page(1, 100)] == [2, 3, 4, 5, 6]
    assert make is module._MAKERS["points"]


def test_a_replaced_store_is_opened_again(store, reader, tmp_path):
    """On a network filesystem the run's folder gets a snapshot by rename."""
    store.add_points([("loss", 1, 0.5)])
    assert len(reader.page(0, 10)) == 1
    other = StoreMaker(tmp_path / "other", uuid="bb" * 16)
    other.add_points([("loss", s, 0.5) for s in range(3)])
    with other.connect() as db:
        db.execute("PRAGMA journal_mode=DELETE")
    (other.run_dir / "run.db").replace(store.run_dir / "run.db")
    for suffix in ("-wal", "-shm"):
        (store.run_dir / f"run.db{suffix}").unlink(missing_ok=True)
    assert len(reader.page(0, 10)) == 3
    assert reader.store_uuid() == "bb" * 16


def test_run_and_status_are_read(store, reader):
    run = reader.run_info()
    assert (run.run_id, run.project, run.tags, run.config) == ("run-1", "p", ("t",), {"lr": 0.1})
    assert not reader.status().is_ended
    store.set_status("failed", "rank 3")
    assert (reader.status().status, reader.status().detail, reader.status().is_ended) == ("failed", "rank 3", True)


def test_no_store_is_an_error_of_its_own(tmp_path, store, reader):
    with pytest.raises(RunNotFoundError):
        EmissionReader(tmp_path / "nothing")
    (tmp_path / "half").mkdir()
    sqlite3.connect(tmp_path / "half" / "run.db").close()
    with pytest.raises(RunNotFoundError):
        EmissionReader(tmp_path / "half")
    for path in store.run_dir.iterdir():
        path.unlink()
    with pytest.raises(RunNotFoundError):
        reader.page(0, 1)


def test_the_store_is_never_written(store, reader):
    with pytest.raises(sqlite3.OperationalError), reader._reading() as db:
        db.execute("DELETE FROM points")


def test_a_broken_name_is_shown_not_raised(store, reader):
    with store.connect() as db:
        db.execute("INSERT INTO keys (key_id, name, reduce, replicated) VALUES (99, CAST(x'6bff' AS TEXT), 'mean', 0)")
        db.execute("INSERT INTO rank_points VALUES (1, 99, 0, 1, 0, 0.5, 7)")
    assert reader.page(0, 10)[0].key == "k\ufffd"
    assert "run.db" in repr(reader)
