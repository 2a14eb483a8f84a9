"""The rank log: what comes back, what a crash leaves, and what a full disk does not."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ddplog.store.rank_log import Position, RankLog, file_numbers, iter_entries

HEADER = 56
SOURCE = str(Path(__file__).parents[2] / "src")
FIELDS = ("writer_id", "attempt", "rank", "incarnation", "first_seq", "num_records", "payload")


def entry(number, size=8):
    return {
        "writer_id": number + 1, "attempt": number % 3, "rank": number - 1, "incarnation": bytes([number % 256]) * 16,
        "first_seq": number * 10, "num_records": number % 7 + 1, "payload": bytes([number % 251]) * size,
    }  # fmt: skip


def row(number, size=8):
    return tuple(entry(number, size)[name] for name in FIELDS)


def fill(log, count, size=8):
    return [log.append(**entry(n, size)) for n in range(count)]


def seqs(folder, start=None, end=None):
    return [found.first_seq // 10 for found in iter_entries(folder, start, end)]


def log_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_entries_come_back_as_they_went_with_their_positions(tmp_path):
    log = RankLog(tmp_path / "ranks")
    positions = fill(log, 5, 16)
    log.close()

    found = list(iter_entries(tmp_path / "ranks"))
    assert [e.position for e in found] == positions == [Position(1, n * (HEADER + 16)) for n in range(5)]
    for number, e in enumerate(found):
        assert {name: getattr(e, name) for name in FIELDS} == entry(number, 16)


def test_many_entries_at_once_are_as_one_after_the_other(tmp_path):
    one, many = RankLog(tmp_path / "one", file_bytes=500), RankLog(tmp_path / "many", file_bytes=500)
    singly = [one.append(**entry(n, 8 * (n % 5 + 1))) for n in range(40)]

    assert many.extend([row(n, 8 * (n % 5 + 1)) for n in range(40)]) == singly
    assert many.end == one.end
    assert many.extend([]) == []
    assert many.end == one.end
    one.close()
    many.close()
    assert log_bytes(tmp_path / "many") == log_bytes(tmp_path / "one")


def test_more_entries_than_one_system_call_takes_go_over_several_files(tmp_path):
    log = RankLog(tmp_path / "ranks", file_bytes=50_000)
    positions = log.extend([row(n) for n in range(1500)]) + log.extend([row(n) for n in range(1500, 2000)])
    log.close()

    assert [e.position for e in iter_entries(tmp_path / "ranks")] == positions
    assert seqs(tmp_path / "ranks") == list(range(2000))
    assert file_numbers(tmp_path / "ranks") == [1, 2, 3]


@pytest.mark.parametrize("limit", [1, HEADER + 8, 2 * (HEADER + 8), 200])
def test_a_file_is_begun_when_the_next_entry_would_not_fit(tmp_path, limit):
    """An entry larger than a file is still taken: it has one to itself."""
    log = RankLog(tmp_path / "ranks", file_bytes=limit)
    positions = fill(log, 7)
    log.close()

    per_file = max(1, limit // (HEADER + 8))
    assert positions == [Position(1 + n // per_file, n % per_file * (HEADER + 8)) for n in range(7)]
    assert seqs(tmp_path / "ranks") == list(range(7))
    sizes = [path.stat().st_size for path in (tmp_path / "ranks").iterdir()]
    assert max(sizes) <= max(limit, HEADER + 8)


def test_a_part_of_the_log_is_read_between_two_positions(tmp_path):
    log = RankLog(tmp_path / "ranks", file_bytes=3 * (HEADER + 8))
    positions = [*fill(log, 10), log.end]
    log.close()

    for first in range(11):
        for last in range(first, 11):
            assert seqs(tmp_path / "ranks", positions[first], positions[last]) == list(range(first, last))
        assert seqs(tmp_path / "ranks", positions[first]) == list(range(first, 10))


@pytest.mark.parametrize("first_size", [8, 24])
def test_a_log_cut_at_any_byte_keeps_the_whole_entries_and_goes_on(tmp_path, first_size):
    """A crash may leave any prefix of what was being written; it had not been acknowledged."""
    folder = tmp_path / "ranks"
    log = RankLog(folder)
    ends = []
    for number in range(4):
        log.append(**entry(number, first_size + 8 * number))
        ends.append(log.end.offset)
    log.close()
    data = (folder / "000001.log").read_bytes()
    for cut in range(len(data) + 1):
        (folder / "000001.log").write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        assert seqs(folder) == list(range(whole))
        log = RankLog(folder)
        assert log.end == Position(1, ends[whole - 1] if whole else 0)
        log.append(**entry(99))
        log.close()
        assert seqs(folder) == [*range(whole), 99]


@pytest.mark.parametrize("offset", [0, 4, 8, 20, 30, 39, HEADER, HEADER + 7])
def test_a_damaged_entry_ends_its_file_and_no_other(tmp_path, offset):
    """Magic, checksum, length and payload are all under guard; the other files are none the worse."""
    folder = tmp_path / "ranks"
    log = RankLog(folder, file_bytes=3 * (HEADER + 8))
    fill(log, 9)
    log.close()
    with (folder / "000002.log").open("r+b") as file:
        file.seek(HEADER + 8 + offset)
        (byte,) = file.read(1)
        file.seek(HEADER + 8 + offset)
        file.write(bytes([byte ^ 0x40]))

    assert seqs(folder) == [0, 1, 2, 3, 6, 7, 8]


def test_what_the_store_does_not_know_of_is_cut_off(tmp_path):
    """It was never acknowledged, so the agents send it again; kept, it would be there twice."""
    folder = tmp_path / "ranks"
    log = RankLog(folder, file_bytes=3 * (HEADER + 8))
    positions = fill(log, 9)
    log.close()
    log = RankLog(folder, end=positions[4], file_bytes=3 * (HEADER + 8))

    assert file_numbers(folder) == [1, 2]
    assert log.end == positions[4] == log.append(**entry(50))
    log.close()
    assert seqs(folder) == [0, 1, 2, 3, 50]


@pytest.mark.parametrize("to", range(10))
def test_a_rewind_takes_back_what_came_after(tmp_path, to):
    folder = tmp_path / "ranks"
    log = RankLog(folder, file_bytes=3 * (HEADER + 8))
    places = [log.end, *(log.append(**entry(n)) and log.end for n in range(9))]
    log.rewind(places[to])

    assert log.end == places[to]
    assert seqs(folder) == list(range(to))
    log.append(**entry(77))
    log.sync()
    assert seqs(folder) == [*range(to), 77]
    log.close()
    before = log_bytes(folder)
    RankLog(folder).close()
    assert log_bytes(folder) == before


class RankLogModel(RuleBasedStateMachine):
    """Whatever is appended, taken back and reopened: the log is the list of what is left."""

    @initialize(file_bytes=st.sampled_from([100, 500, 1 << 20]))
    def start(self, file_bytes):
        self.folder = Path(tempfile.mkdtemp()) / "ranks"
        self.file_bytes = file_bytes
        self.log = RankLog(self.folder, file_bytes=file_bytes)
        self.model = []

    @rule(sizes=st.lists(st.integers(0, 40), max_size=4))
    def extend(self, sizes):
        first = len(self.model)
        positions = self.log.extend([row((first + n) % 200, 8 * size) for n, size in enumerate(sizes)])
        self.model += [(p, (first + n) % 200, 8 * sizes[n]) for n, p in enumerate(positions)]

    @rule(data=st.data())
    def rewind(self, data):
        if self.model:
            index = data.draw(st.integers(0, len(self.model) - 1))
            self.log.rewind(self.model[index][0])
            del self.model[index:]

    @rule(is_known=st.booleans())
    def reopen(self, is_known):
        end = self.log.end
        self.log.close()
        self.log = RankLog(self.folder, end=end if is_known else None, file_bytes=self.file_bytes)
        assert self.log.end == end

    @rule()
    def sync(self):
        self.log.sync()

    @invariant()
    def holds_what_is_left(self):
        if hasattr(self, "log"):
            found = [(e.position, e.first_seq // 10, len(e.payload)) for e in iter_entries(self.folder)]
            assert found == self.model

    def teardown(self):
        if hasattr(self, "log"):
            self.log.close()
            shutil.rmtree(self.folder.parent)


RankLogModel.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestRankLogModel = RankLogModel.TestCase


# -- trimming


def make_trimmable(folder):
    log = RankLog(folder, file_bytes=2 * (HEADER + 8))
    fill(log, 9)  # files 1 to 4 with two entries, file 5 with one
    return log


@pytest.mark.parametrize(
    ("max_bytes", "keep_from", "deleted"),
    [
        (10**9, 5, []),
        (9 * 64, 5, []),
        (9 * 64 - 1, 5, [1]),
        (5 * 64, 5, [1, 2]),
        (5 * 64 - 1, 5, [1, 2, 3]),
        (0, 5, [1, 2, 3, 4]),
        (0, 99, [1, 2, 3, 4]),
        (0, 3, [1, 2]),
        (0, 1, []),
        (0, 0, []),
    ],
)
def test_only_the_oldest_files_go_none_that_is_needed_and_never_the_last(tmp_path, max_bytes, keep_from, deleted):
    log = make_trimmable(tmp_path / "ranks")

    assert log.trim(max_bytes, keep_from) == deleted
    assert file_numbers(tmp_path / "ranks") == [n for n in range(1, 6) if n not in deleted]
    log.append(**entry(9))
    log.close()
    assert seqs(tmp_path / "ranks") == [n for n in range(10) if n // 2 + 1 not in deleted]


def test_a_trimmed_log_opens_again_where_it_ended(tmp_path):
    log = make_trimmable(tmp_path / "ranks")
    log.trim(0, 99)
    end = log.end
    log.close()

    for known in (end, None):
        log = RankLog(tmp_path / "ranks", end=known)
        assert log.end == end
        log.close()


def test_other_files_in_the_folder_are_no_part_of_it(tmp_path):
    log = make_trimmable(tmp_path / "ranks")
    for name in ("notes.txt", "x.log", "000001.log.bak"):
        (tmp_path / "ranks" / name).touch()
    log.close()

    assert file_numbers(tmp_path / "ranks") == [1, 2, 3, 4, 5]
    assert file_numbers(tmp_path / "nowhere") == []
    assert seqs(tmp_path / "ranks") == list(range(9))


# -- a full disk

FULL = """
import os, resource, sys
from pathlib import Path
from ddplog.store.rank_log import RankLog, iter_entries

folder, file_bytes, limit, size = Path(sys.argv[1]), *map(int, sys.argv[2:])

def row(number, size):
    return 1, 0, 0, b"i" * 16, number, 1, bytes(size)

log = RankLog(folder, file_bytes=file_bytes)
log.extend([row(number, 8) for number in range(3)])
end, before = log.end, sorted((p.name, p.read_bytes()) for p in folder.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        log.extend([row(3, 8), row(4, size), row(5, 8)])
    except OSError:
        pass
    else:
        sys.exit("it fitted")
    assert log.end == end, (log.end, end)
    assert sorted((p.name, p.read_bytes()) for p in folder.iterdir()) == before
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.extend([row(3, 8), row(4, size), row(5, 8)])
log.close()
assert [e.first_seq for e in iter_entries(folder)] == [0, 1, 2, 3, 4, 5]
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("file_bytes", "limit"),
    [
        (10**6, 3 * 64),  # nothing of it can be written
        (10**6, 3 * 64 + 30),  # part of the first header can
        (10**6, 5 * 64 + 200),  # part of the second payload can
        (256, 4 * 64),  # all of the first; nothing of the second, in a new file
        (256, 500),  # part of the second, in a new file
        (200, 0),  # nothing, in a new file
    ],
)
def test_what_does_not_fit_leaves_the_log_as_it_was(tmp_path, file_bytes, limit):
    """The kernel's limit on the size of a file refuses, and cuts short, as a full disk does."""
    run(FULL, tmp_path / "ranks", file_bytes, limit, 1000)


NO_FILES = """
import os, resource, sys
from pathlib import Path
from ddplog.store.rank_log import RankLog, iter_entries

folder = Path(sys.argv[1])
log = RankLog(folder, file_bytes=64)
log.extend([(1, 0, 0, b"i" * 16, 0, 1, bytes(8))])
end = log.end
low = os.open("/", os.O_RDONLY)
os.close(low)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
try:
    log.extend([(1, 0, 0, b"i" * 16, 1, 1, bytes(8))])
except OSError:
    assert log.end == end
else:
    sys.exit("a file was opened")
finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
log.extend([(1, 0, 0, b"i" * 16, 1, 1, bytes(8))])
log.close()
assert [e.first_seq for e in iter_entries(folder)] == [0, 1]
"""


@pytest.mark.system
def test_a_file_that_cannot_be_begun_leaves_the_log_as_it_was(tmp_path):
    run(NO_FILES, tmp_path / "ranks")


@pytest.mark.parametrize("how", ["raises", "writes less"])
def test_what_fails_late_takes_everything_of_the_call_back(tmp_path, monkeypatch, how):
    """The third of several system calls, in a later file: its predecessors had written theirs."""
    log = RankLog(tmp_path / "ranks", file_bytes=10_000)
    log.extend([row(0)])
    end, before, pwritev, calls = log.end, log_bytes(tmp_path / "ranks"), os.pwritev, []

    def fail(descriptor, buffers, offset):
        calls.append(len(buffers))
        if len(calls) < 3:
            return pwritev(descriptor, buffers, offset)
        if how == "raises":
            raise OSError(28, "no space left on device")
        return pwritev(descriptor, buffers[:1], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(OSError, match=r"disk|space"):
            log.extend(row(number) for number in range(1, 900))
    assert (log.end, log_bytes(tmp_path / "ranks")) == (end, before)

    log.extend([row(1)])
    log.close()
    assert seqs(tmp_path / "ranks") == [0, 1]
