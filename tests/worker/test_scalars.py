"""What counts as a number, whose ever it is, and what is said of what does not."""

import math
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddplog.worker.scalars import MAX_KEY_BYTES, BadValueError, as_int, as_number, flatten

NUMPY_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
               "float64", "longdouble")  # fmt: skip


def as_float(key, value):
    return as_number(key, value, lambda _: False)


def leaves(data):
    return {key: value for key, value, problem in flatten(data) if problem is None}


def problems(data):
    return [(problem.reason, key) for key, _, problem in flatten(data) if problem is not None]


@given(st.floats())
def test_a_float_is_itself(value):
    assert math.isnan(as_float("k", value)) if math.isnan(value) else as_float("k", value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0.0), (-7, -7.0), (True, 1.0), (False, 0.0), (2**53 + 1, 2.0**53), (10**300, 1e300), (-(10**300), -1e300)],
)
def test_python_numbers(value, expected):
    found = as_float("k", value)

    assert (found, type(found)) == (expected, float)


def test_an_int_that_no_float_holds_is_named_and_not_written_out():
    """A million digits in a warning help nobody."""
    with pytest.raises(BadValueError) as caught:
        as_float("loss", 10**400)

    assert caught.value.reason == "bad_value"
    assert "loss" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_numpy_scalars_and_arrays_of_one(name):
    one = np.ones((), name)
    for value in (one, one[()], one.reshape(1), one.reshape(1, 1, 1)):
        found = as_float("k", value)
        assert (found, type(found)) == (1.0, float)


def test_numpy_values_that_are_not_finite_stay_so():
    assert math.isnan(as_float("k", np.float32("nan")))
    assert as_float("k", np.array([-np.inf])) == -math.inf


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), np.zeros((0,)), np.zeros((2, 2)), np.complex64(1), np.array([1j]), np.array("1"), np.str_("1"),
     np.datetime64("2026-01-01"), np.timedelta64(1, "s"), np.array([None]), np.zeros((1,), [("a", "f8")]), np.bytes_(b"1")],
    ids=repr,
)  # fmt: skip
def test_numpy_values_that_are_no_single_real_number_are_refused(value):
    with pytest.raises(BadValueError, match="k: ") as caught:
        as_float("k", value)

    assert caught.value.reason == "bad_value"


@pytest.mark.parametrize(
    ("value", "what"),
    [("1.0", "a str"), (None, "a NoneType"), (1j, "a complex"), (b"1", "a bytes"), ([1.0], "a list"), ((1,), "a tuple"),
     (Ellipsis, "an ellipsis"), (Decimal(1), "a Decimal"), (Fraction(1, 2), "a Fraction"), (float, "a type")],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_refused_with_its_type(value, what):
    with pytest.raises(BadValueError, match=f"loss: {what}") as caught:
        as_float("loss", value)

    assert caught.value.reason == "bad_value"


TORCH = """
import sys
import torch
from ddplog.worker.scalars import BadValueError, as_int, as_number

def as_float(key, value):
    return as_number(key, value, lambda _: False)

def refused(value):
    try:
        as_float("k", value)
    except BadValueError as exc:
        return exc.reason == "bad_value" and "k: a tensor of" in str(exc)
    return False

types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
         torch.int64, torch.bool]
for dtype in types:
    for shape in ((), (1,), (1, 1)):
        value = as_float("k", torch.ones(shape, dtype=dtype))
        assert value == 1.0 and type(value) is float, (dtype, shape)
leaf = torch.tensor(0.5, requires_grad=True)
assert as_float("k", leaf) == 0.5 and as_float("k", leaf * 2) == 1.0
assert as_float("k", torch.nn.Parameter(torch.tensor([2.0]))) == 2.0
assert as_float("k", torch.tensor(float("inf"))) == float("inf")
assert as_float("k", torch.tensor(3.0).expand(1)) == 3.0
for bad in (torch.zeros(2), torch.zeros(0), torch.zeros(2, 2), torch.tensor(1j), torch.zeros(1, 2, requires_grad=True)):
    assert refused(bad), bad
assert as_int(torch.tensor(7)) == 7 and as_int(torch.tensor([7])) == 7
assert as_int(torch.tensor(7.5)) is None and as_int(torch.tensor([1, 2])) is None
print("ok")
"""


@pytest.mark.system
def test_torch_scalars():
    """In a process of its own: torch takes a second and 200 MB, which the other tests need not."""
    pytest.importorskip("torch")
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TORCH], capture_output=True, text=True, env=environ, timeout=100, check=False
    )

    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_nested_dicts_are_joined():
    data = {"loss": 1.0, "val": {"loss": 2.0, "top": {"1": 3.0, "5": 4.0}}, "empty": {}}

    assert leaves(data) == {"loss": 1.0, "val/loss": 2.0, "val/top/1": 3.0, "val/top/5": 4.0}


def test_a_dict_that_contains_itself_ends():
    loop = {"x": 1.0}
    loop["again"] = loop

    found = list(flatten(loop))

    assert len(found) < 100
    assert isinstance(found[-1][1], dict)  # refused as a value
    with pytest.raises(BadValueError):
        as_float(found[-1][0], found[-1][1])


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "\t",
        "a\nb",
        "a\x00",
        "a\x1b[31m",
        "\u202eevil",
        "a\u2028b",
        "\ud800",
        "k" * (MAX_KEY_BYTES + 1),
        "é" * 126,
    ],
)
def test_a_name_that_cannot_be_shown_or_stored_is_refused(key):
    assert problems({key: 1.0, "good": 2.0}) == [("bad_key", key)]
    assert leaves({key: 1.0, "good": 2.0}) == {"good": 2.0}


@pytest.mark.parametrize("key", ["k" * MAX_KEY_BYTES, "é" * 125, "損失/訓練", "a b", "loss [%]", "😀"])
def test_any_other_name_is_taken(key):
    assert leaves({key: 1.0}) == {key: 1.0}


@pytest.mark.parametrize("key", [1, None, ("a", "b"), b"loss", 0.5, np.int64(3)], ids=repr)
def test_a_name_that_is_no_string_is_refused_with_its_type(key):
    ((_, value, problem),) = flatten({key: 1.0})

    assert (problem.reason, value) == ("bad_key", 1.0)
    assert type(key).__name__ in str(problem)


def test_the_joined_name_is_what_must_fit():
    inner = "k" * 130
    assert problems({inner: {inner: 1.0}}) == [("bad_key", f"{inner}/{inner}")]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3), (-3, -3), (True, 1), (3.0, 3), (np.int32(3), 3), (np.uint64(7), 7), (np.float64(4.0), 4),
        (np.float32(4.0), 4), (np.array(5), 5), (2**63 - 1, 2**63 - 1), (-(2**63) + 1, -(2**63) + 1),
        (3.5, None), (math.nan, None), (math.inf, None), (1e300, None), ("3", None), (None, None), (1j, None),
        (2**63, None), (-(2**63), None), (np.float32(4.5), None), (np.array([1, 2]), None), (Decimal(3), None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_step_is_a_whole_number_of_64_bits(value, number):
    """The smallest int64 is not one: it stands for "no step"."""
    found = as_int(value)

    assert (found, type(found)) == (number, type(number))


def test_a_step_whose_index_raises_is_none():
    class Odd:
        def __index__(self):
            raise RuntimeError

    assert as_int(Odd()) is None
