"""The exit status of processes that are not our children; on a kernel that does not tell, nothing, and no error."""

import os
import subprocess
import sys

import pytest

from ddplog.agent.exit_status import Process

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
child.stdin.close()
sys.stdin.readline()
child.wait()
print("reaped", flush=True)
sys.stdin.readline()
"""
ENDS = {
    "input()": 1 << 8,
    "import sys; sys.stdin.read(); sys.exit(7)": 7 << 8,
    "import sys, os; sys.stdin.read(); os._exit(0)": 0,
    "import sys, os; sys.stdin.read(); os.kill(os.getpid(), 9)": 9,
}


@pytest.mark.parametrize("code", ENDS)
def test_the_status_is_told_once_the_parent_has_looked(code):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        process = Process(lambda: pid)
        assert process.look() is None
        assert process.may_tell(0)
        assert not process.may_tell(60_000_000_000), "nobody waits for ever"
        parent.stdin.write("end\nlook\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "reaped\n"
        status = process.look()
        assert not process.may_tell(0)
        assert process.look() == status
        if status is None:
            pytest.skip(f"Linux {os.uname().release} does not tell: 6.15 is the first")
        assert status == ENDS[code]
        parent.stdin.write("leave\n")


def test_a_process_that_has_gone_or_changed_tells_nothing():
    """Its pid may be another's by now: what held the journal's lock is asked twice."""
    assert not Process(lambda: 0).may_tell(0)
    answers = iter([os.getpid(), 0])
    changed = Process(lambda: next(answers))
    assert not changed.may_tell(0)
    assert changed.look() is None
    assert not Process(lambda: 2**22 + 1).may_tell(0), "no such pid"
    changed.close()
