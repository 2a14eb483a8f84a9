"""What a backlog left behind goes back to the kernel, also from below memory that is in use."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddplog.aggregator.memory import give_back

ENVIRON = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
MEASURE = """
from pathlib import Path
from ddplog.aggregator.memory import give_back

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

backlog = [bytes(2000) for _ in range(50_000)]
above = bytes(2000)
del backlog
before = resident_mb()
give_back()
print(before - resident_mb())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's own")
def test_free_memory_below_what_is_in_use_is_given_back():
    done = subprocess.run((sys.executable, "-c", MEASURE), env=ENVIRON, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 50


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()
