"""The power-cut model sees what it should: each of these bugs, planted in the product, is caught by a trial."""

import os

import pytest
from faults import test_power_cut as power_cut

import ddplog.agent.shipper as shipper_module
import ddplog.journal.durable as durable_module
import ddplog.journal.reader as reader_module
import ddplog.journal.recovery as recovery_module
import ddplog.journal.writer as writer_module
from ddplog.agent.shipper import Shipper
from ddplog.core.pipeline import Pipeline
from ddplog.journal.durable import Durability
from ddplog.journal.reader import JournalReader
from ddplog.wire import codec

TRIALS = 600
MUTANTS = {}


def mutant(plant):
    MUTANTS[plant.__name__] = plant
    return plant


@mutant
def a_journal_ends_at_its_first_hole(patch):
    patch.setattr(JournalReader, "_pass_hole", lambda self: False)


@mutant
def a_journal_ends_where_a_segment_is_missing(patch):
    real = JournalReader._open_following

    def only_the_next(self):
        number = self._segment.number if self._segment is not None else 0
        following = self.folder / reader_module.layout.segment_name(number + 1)
        return (not number or following.exists()) and real(self)

    patch.setattr(JournalReader, "_open_following", only_the_next)


@mutant
def every_segment_has_the_same_epoch(patch):
    class Same:
        @staticmethod
        def SystemRandom():  # noqa: N802 - the name in `random`
            return Same

        @staticmethod
        def getrandbits(_):
            return 7

    patch.setattr(writer_module, "random", Same)


@mutant
def a_header_of_any_segment_will_do(patch):
    layout = reader_module.layout

    def read_header(segment, incarnation, _):
        for offset in (0, len(segment) - layout.SEGMENT_HEADER_BYTES):
            if 0 <= offset <= len(segment) - layout.SEGMENT_HEADER_BYTES:
                magic, _, epoch, whose, first_seq, _ = layout.SEGMENT_HEADER.unpack_from(segment, offset)
                if (magic, whose) == (layout.SEGMENT_MAGIC, incarnation):
                    return epoch, first_seq
        return None

    patch.setattr(layout, "read_header", read_header)


@mutant
def a_failed_sync_is_asked_again(patch):
    patch.setattr(Durability, "_is_suspect", lambda self, number: False)


@mutant
def a_failed_sync_of_a_folder_is_asked_again(patch):
    def sync_folder(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    patch.setattr(durable_module, "_sync_folder", sync_folder)


@mutant
def names_are_not_synced(patch):
    patch.setattr(durable_module, "_sync_folder", lambda folder: None)


@mutant
def the_head_page_is_not_synced(patch):
    patch.setattr(Durability, "_sync_head", lambda self: None)


@mutant
def only_the_newest_segment_is_synced(patch):
    real = Durability._numbers
    patch.setattr(Durability, "_numbers", lambda self: real(self)[-1:])


@mutant
def a_frame_behind_a_hole_gets_the_next_seq(patch):
    def find_frame(buffer, start, end, epoch, lost_seq):
        for offset in range(start + 8, end - 47, 8):
            if recovery_module._seq_of(buffer, offset, end, epoch) is not None:
                return offset, lost_seq + 1
        return None

    patch.setattr(reader_module, "find_frame", find_frame)


@mutant
def a_journal_is_declared_before_it_is_durable(patch):
    real = Shipper._track

    def track(self, path, *, is_adopted):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(JournalReader, "sync", lambda self: False)
            real(self, path, is_adopted=is_adopted)

    patch.setattr(Shipper, "_track", track)


@mutant
def holes_are_not_declared(patch):
    patch.setattr(shipper_module.codec, "encode_loss", lambda *_: codec.encode_heartbeat("0", []))


@mutant
def holes_are_not_counted(patch):
    def lose(self, writer, next_seq, why, time_unix_ns):
        writer.next_seq = next_seq

    patch.setattr(Pipeline, "_lose", lose)


@mutant
def numbers_without_names_are_not_counted(patch):
    real = Pipeline._note_lost

    def note_lost(self, writer, first_seq, count, why, time_unix_ns):
        if "keys" not in why:
            real(self, writer, first_seq, count, why, time_unix_ns)

    patch.setattr(Pipeline, "_note_lost", note_lost)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, shm_path, monkeypatch, suite_table):
    """Reliability cases 16 and 17."""
    MUTANTS[name](monkeypatch)
    monkeypatch.setattr(power_cut, "MANY", 60)
    for seed in range(TRIALS):
        with pytest.MonkeyPatch.context() as patch:
            try:
                power_cut.run(seed, shm_path, patch, fails=seed % 3 == 0)
            except (AssertionError, ValueError) as exc:  # ValueError: the pipeline's own check
                print(f"seed {seed}: {exc!r}"[:300])
                break
    else:
        pytest.fail(f"{TRIALS} trials do not see it")
    suite_table("power cuts: planted bugs", bugs=1, caught=1)
