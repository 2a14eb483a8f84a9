"""How a writer's end reads: its own word, and the exit status that others learn, in whatever order they come."""

import itertools
import signal

import pytest

from ddplog.core.attempt import Options
from ddplog.core.effects import UNKNOWN_DEATH, Writer, WriterInfo
from ddplog.core.ends import describe_exit, final_state, split_status
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import KIND_MESSAGE, NO_STEP, encode_message

INFO = WriterInfo(
    incarnation=b"i" * 16, rank=3, world_size=4, local_rank=3, node_rank=0, node_id="0", host="h", pid=7, boot_id="b",
    started_unix_ns=0, is_alive=True, oldest_seq=0,
)  # fmt: skip


def test_a_wait_status_is_an_exit_code_or_a_signal():
    assert split_status(0) == (0, None)
    assert split_status(7 << 8) == (7, None)
    assert split_status(9) == (None, 9)
    assert split_status(6 | 0x80) == (None, 6), "with a core dumped"


def test_what_ended_a_process_has_a_name():
    assert describe_exit(None, None) == UNKNOWN_DEATH
    assert describe_exit(0, None) == ""
    assert describe_exit(7, None) == "exit code 7"
    assert describe_exit(None, 35) == "signal 35"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGUSR1):
        assert describe_exit(None, number) == f"signal {int(number)} ({number.name})"


@pytest.mark.parametrize(
    ("said", "exit_code", "killed_by", "state"),
    [
        ("", None, None, "died"),
        ("", 0, None, "finished"),  # os._exit(0): the process says that all is well
        ("", 5, None, "died"),
        ("", None, 9, "died"),
        ("finished", None, None, "finished"),
        ("finished", 0, None, "finished"),
        ("finished", 3, None, "failed"),  # said at its exit, before sys.exit(3) was one
        ("finished", None, 11, "killed"),
        ("failed", 1, None, "failed"),
        ("failed", 0, None, "failed"),
        ("killed", None, 2, "killed"),
        ("preempted", 0, None, "preempted"),
        ("preempted", None, 15, "preempted"),
        ("nonsense", None, None, "died"),
    ],
)
def test_an_exit_status_outranks_the_word_finished_and_no_other(said, exit_code, killed_by, state):
    writer = Writer(writer_id=1, info=INFO, attempt=0, finish_status=said, exit_code=exit_code, signal=killed_by)
    assert final_state(writer) == state


WORDS = {"": "", "finished": "", "failed": "ValueError: x", "killed": "KeyboardInterrupt"}
STATUSES = {0: "", 3 << 8: "exit code 3", 9: "signal 9 (SIGKILL)"}


@pytest.mark.parametrize(("said", "status"), list(itertools.product(WORDS, STATUSES)))
def test_the_end_reads_the_same_whatever_comes_first(said, status):
    """The agent's heartbeats, the last records and the Bye overtake each other; a heartbeat comes again and again."""
    seen = set()
    for order in set(itertools.permutations(["record", "bye", "status"])):
        pipeline = Pipeline(Options(grace_ns=1, late_ns=1, settle_ns=1, max_keys=10))
        pipeline.hello([INFO], 0, 0)
        kinds = []
        for what in order:
            if what == "record" and said:
                message = {"type": "finish", "status": said, "detail": WORDS[said]}
                payload = encode_message(KIND_MESSAGE, 0, NO_STEP, 0, message, 0)
                pipeline.batch(INFO.incarnation, 0, 1, payload, 0, 0)
            elif what == "bye":
                pipeline.bye(INFO.incarnation, int(bool(said)), 0, 0)
            for _ in range(2 if what == "status" else 0):
                pipeline.exited(INFO.incarnation, status, 0)
            effects = pipeline.take()
            kinds += [event.kind for event in effects.events]
        (writer,) = pipeline.writers.values()
        seen.add((writer.state, writer.detail, writer.exit_code, writer.signal))
        if STATUSES[status] and said in ("", "finished"):
            assert 1 <= len(kinds) <= 2, "it is told once, and at most once again with the status"
    assert len(seen) == 1
    ((state, detail, exit_code, killed_by),) = seen
    assert (exit_code, killed_by) == split_status(status)
    if said in ("", "finished"):
        assert detail == STATUSES[status]
        assert (state == "finished") == (status == 0)
    else:
        assert (state, detail) == (said, WORDS[said])
