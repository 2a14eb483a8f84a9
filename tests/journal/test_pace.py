"""How far a rank has come, seen from outside."""

import pytest

from ddplog.journal.pace import Pace
from ddplog.journal.segment import segment_name, segment_numbers
from ddplog.journal.writer import JournalWriter


@pytest.fixture
def journal(tmp_path):
    writer = JournalWriter(
        tmp_path / "0.aa", bytes(16), {}, segment_bytes=8192, spool_bytes=1 << 20, check=lambda: None
    )
    yield writer
    writer.close(finished=False)


def log(writer, *steps):
    writer.enter()
    for step in steps:
        writer.append_scalars(("loss",), [1.0], step, 1.0)
    writer.leave()


def test_the_largest_step_that_was_logged(journal):
    pace = Pace(journal.folder)
    assert pace.look() is None
    log(journal, 0, 1, 7, 3)
    assert pace.look() == 7, "a validation at its epoch's number is no step back"
    log(journal, 8)
    assert pace.look() == 8
    assert pace.look() == 8
    pace.close()


def test_messages_have_no_step(journal):
    journal.enter()
    journal.append_message({"type": "text", "key": "k", "text": "t"}, 99)
    journal.leave()
    pace = Pace(journal.folder)
    assert pace.look() is None
    pace.close()


def test_it_goes_on_in_the_newest_segment(journal):
    pace = Pace(journal.folder)
    log(journal, *range(50))
    assert pace.look() == 49
    log(journal, *range(50, 1000))
    assert len(segment_numbers(str(journal.folder))) > 2
    assert pace.look() == 999
    pace.close()


def test_a_segment_that_is_gone_is_no_trouble(journal):
    pace = Pace(journal.folder)
    (journal.folder / segment_name(1)).unlink()
    assert pace.look() is None
    pace.close()
