"""How values are shown, and that words cannot steer a terminal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddplog.view import text


@given(st.text())
def test_clean_text_is_printable(value):
    assert not [c for c in text.clean(value) if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E]


def test_what_was_there_can_still_be_read():
    assert text.clean("a\x1b[2J\nb\u202e\ud800ü") == "a\\x1b[2J\\nb\\u202e\\ud800ü"


def test_markup_is_literal():
    assert text.words("[red]x[/red]").plain == "[red]x[/red]"
    assert len(text.words("x" * 500).plain) == 200


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (math.nan, "-"), (None, "-"), (math.inf, "inf"), (123456789.0, "1.23457e+08")]
)
def test_numbers(value, shown):
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123, "12.3 ms"), (5, "5.0 s"), (65, "1m 05s"), (3725, "1h 02m"), (200_000, "2d 07h"), (-5, "-5.0 s")],
)
def test_durations(value, shown):
    assert text.seconds(value) == shown


def test_sizes():
    assert [text.size(n) for n in (0, 1023, 1536, 5 * 1024**3)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("code", "signal", "detail", "shown"),
    [
        (None, 9, "", "signal 9 (SIGKILL)"),
        (None, 9, "signal 9 (SIGKILL)", "signal 9 (SIGKILL)"),
        (None, None, "died, code unknown", "died, code unknown"),
        (3, None, "", "exit code 3"),
        (1, None, "ValueError: no", "exit code 1, ValueError: no"),
        (None, None, "", ""),
        (None, 99, "", "signal 99"),
    ],
)
def test_how_a_rank_ended(code, signal, detail, shown):
    assert text.how_ended(code, signal, detail) == shown


def test_losses_come_first_and_the_sampler_last():
    keys = ["sys/gpu0/util", "lr", "val/acc", "train/loss"]
    assert sorted(keys, key=text.interest) == ["train/loss", "val/acc", "lr", "sys/gpu0/util"]
