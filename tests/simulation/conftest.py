"""Prints the table of mutants where these tests were collected."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which seed was the first to catch each mutant."""
    rows = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "mutant"
    ]
    if rows:
        terminalreporter.section("simulation: mutants")
        for name, seed, what in rows:
            terminalreporter.write_line(f"{name:40} seed {seed:4}  {what}")
