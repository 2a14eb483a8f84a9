"""Prints, after the tests, the table of what was thrown at ddplog and what came of it."""

import os
import signal
from collections.abc import Callable
from typing import Final

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell in the background; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

BAD: Final = ("lost", "doubled", "wrong", "stuck")


@pytest.fixture
def suite_table(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function (suite, **counts) that adds to the suite's row, e.g. kills=200, points=4_000_000, lost=0.

    To be called once the checks have passed, with what was counted: the table is read as evidence.
    """

    def add(suite: str, **counts: int) -> None:
        record_property("suite", (suite, counts))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each suite; its parts, in whatever process they ran, are summed. And the mutants."""
    found = [kept for report in terminalreporter.getreports("passed") for kept in report.user_properties]
    _print_suites(terminalreporter, [value for name, value in found if name == "suite"])
    mutants = [value for name, value in found if name == "mutant"]
    if mutants:
        terminalreporter.section("simulation: planted bugs, and the first seed that saw each")
        for name, seed, what in mutants:
            terminalreporter.write_line(f"{name:40} seed {seed:4}  {what}")


def _print_suites(terminalreporter: pytest.TerminalReporter, found: list[tuple[str, dict[str, int]]]) -> None:
    suites: dict[str, dict[str, int]] = {}
    for suite, counts in found:
        row = suites.setdefault(suite, {})
        for what, count in counts.items():
            row[what] = row.get(what, 0) + count
    if not suites:
        return
    terminalreporter.section("what was thrown at it")
    width = max(map(len, suites))
    for suite, row in sorted(suites.items()):
        done = ", ".join(f"{count:,} {what}" for what, count in row.items() if what not in BAD)
        came = ", ".join(f"{what} {row[what]:,}" for what in BAD if what in row)
        terminalreporter.write_line(f"{suite:{width}}  {done}: {came}")


def pytest_configure() -> None:
    """Let no job of a test be sampled unless it says so: what tests count is what ranks log."""
    os.environ.setdefault("DDPLOG_SAMPLE_S", "0")
