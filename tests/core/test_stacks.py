"""What is read out of faulthandler's text."""

import faulthandler
import threading

from ddplog.core.stacks import MAX_TEXT, Frame, alike, cut, parse, place

TEXT = """Thread 0x00007f8e1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/home/u/data.py", line 8 in fetch

Current thread 0x00007f8e2 (most recent call first):
  File "/usr/lib/python3.11/site-packages/torch/distributed/c10d.py", line 2055 in all_reduce
  File "/home/u/train.py", line 17 in step
  File "/home/u/train.py", line ??? in <module>
  ...
"""


def test_threads_and_frames():
    other, main = parse(TEXT)
    assert (other.ident, other.users_frame) == ("0x00007f8e1", Frame("/home/u/data.py", 8, "fetch"))
    assert [frame.line for frame in main.frames] == [2055, 17, 0]
    assert place(TEXT) == "step (train.py:17)"


def test_a_thread_without_a_line_of_the_users_is_where_it_is():
    assert place(TEXT.partition('  File "/home/u/data')[0]) == "wait (threading.py:324)"
    assert place("Current thread 0x1 (most recent call first):\n  <no Python frame>\n") == "no Python code"
    assert place("") == "no Python code"


def test_what_this_interpreter_writes_can_be_read(tmp_path):
    ready, done = threading.Event(), threading.Event()

    def wait_here():
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    ready.wait()
    with (tmp_path / "dump").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    done.set()
    thread.join()
    text = (tmp_path / "dump").read_text()
    threads = parse(text)
    assert threads[-1].frames[0].function == "test_what_this_interpreter_writes_can_be_read"
    assert any(frame.function == "wait_here" for thread in threads[:-1] for frame in thread.frames)
    assert place(text).startswith("test_what_this_interpreter_writes_can_be_read (test_stacks.py:")


def test_a_long_text_keeps_its_end_and_says_so():
    text = "".join(f'  File "a.py", line {i} in f\n' for i in range(10_000))
    kept = cut(text)
    assert len(kept) <= MAX_TEXT
    assert kept.splitlines()[0] == "... (the first threads are cut)"
    assert kept.splitlines()[1].startswith('  File "a.py", line ')
    assert kept.endswith("line 9999 in f\n")


def test_what_steers_a_terminal_is_taken_out():
    assert cut("a\x1b[2J\r\n\tb\u202e") == "a?[2J?\n?b?"


def test_ranks_at_the_same_places_are_one_group_whatever_their_threads_are_called():
    same = TEXT.replace("0x00007f8e2", "0x00001")
    groups = alike([(0, TEXT), (1, same), (2, TEXT.replace("17", "18")), (3, TEXT)])
    assert [ranks for ranks, _ in groups] == [[2], [0, 1, 3]]
    assert groups[1][1] == TEXT
