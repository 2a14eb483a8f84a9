"""Whether there is anything that `ddplog sync` can do at once."""

import subprocess
import sys

from ddplog.launch.sync import is_live

HOLD = """
import fcntl, sys
alive = open(sys.argv[1], "w")
fcntl.lockf(alive, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_job_is_live_while_a_rank_holds_its_journal(tmp_path):
    """A sync can then only wait, and says so."""
    assert not is_live(tmp_path)
    for name in ("0.aa", "1.bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alive").touch()
    assert not is_live(tmp_path)
    words = [sys.executable, "-c", HOLD, str(tmp_path / "1.bb" / "alive")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_live(tmp_path)
        holder.communicate()
    assert not is_live(tmp_path)
