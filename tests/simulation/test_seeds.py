"""Whole jobs under faults, one per seed. A seed that fails is printed and replays alone:

DDPLOG_SIM_SEED=1234 python -m pytest tests/simulation/test_seeds.py
"""

import logging
import os
from pathlib import Path

import pytest
from simulation.sim_world import ViolationError, simulate

CHUNK = 250
PAST = [
    int(line.split()[0])
    for line in (Path(__file__).parent / "failing_seeds.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def run(seeds, suite_table):
    logging.disable(logging.CRITICAL)
    failed = []
    try:
        for seed in seeds:
            try:
                simulate(seed)
            except ViolationError as violation:
                failed.append(str(violation))
    finally:
        logging.disable(logging.NOTSET)
    assert not failed, f"{len(failed)} seeds failed:\n" + "\n".join(failed[:20])
    suite_table("simulated jobs", seeds=len(seeds), lost=0, doubled=0, wrong=0, stuck=0)


chosen = os.environ.get("DDPLOG_SIM_SEED")
if chosen is not None:

    def test_chosen_seed(suite_table):
        run([int(chosen)], suite_table)

else:

    @pytest.mark.parametrize("first", range(0, 16 * CHUNK, CHUNK))
    def test_seeds(first, suite_table):
        run(range(first, first + CHUNK), suite_table)

    def test_seeds_that_failed_once(suite_table):
        run(PAST, suite_table)

    @pytest.mark.nightly
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("first", range(10_000, 210_000, 5_000))
    def test_many_seeds(first, suite_table):
        run(range(first, first + 5_000), suite_table)
