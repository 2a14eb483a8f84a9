"""The simulator is only worth its seeds if it sees bugs: each planted one is caught within 200 of them."""

import logging

import pytest
from simulation.sim_mutants import MUTANTS, planted
from simulation.sim_world import ViolationError, simulate


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, record_property):
    """And the seed that sees it sees nothing without it."""
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(200):
            with planted(name):
                try:
                    simulate(seed)
                except ViolationError as violation:
                    caught = str(violation)
                else:
                    continue
            simulate(seed)
            record_property("mutant", (name, seed, caught.partition(": ")[2][:100]))
            return
    finally:
        logging.disable(logging.NOTSET)
    pytest.fail(f"200 seeds, and {name!r} was not seen")
