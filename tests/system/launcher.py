"""Starts a script as N ranks of one node and waits for them: torchrun without torch, in 30 ms.

    launcher.py N script.py [argument ...]

Exits with 0 if every rank did, else with the code of the first that did not (128 + n for signal n).
"""

import os
import subprocess
import sys

world_size, *words = sys.argv[1:]
identity = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": "0"}
ranks = [
    subprocess.Popen([sys.executable, *words], env={**os.environ, **identity, "RANK": str(n), "LOCAL_RANK": str(n)})
    for n in range(int(world_size))
]
codes = [rank.wait() for rank in ranks]
bad = next((code for code in codes if code), 0)
sys.exit(bad if bad >= 0 else 128 - bad)
