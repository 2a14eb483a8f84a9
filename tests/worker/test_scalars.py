"""What counts as a number, whose ever it is, and what is said of what does not."""

import math
import os
import shutil
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


def leaves(data):
    return {key: value for key, value, problem in flatten(data) if problem is None}


def problems(data):
    return [(problem.reason, key) for key, _, problem in flatten(data) if problem is not None]


@given(st.floats())
def test_a_float_is_itself(value):
    assert math.isnan(as_number("k", value)) if math.isnan(value) else as_number("k", value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0.0), (-7, -7.0), (True, 1.0), (False, 0.0), (2**53 + 1, 2.0**53), (10**300, 1e300), (-(10**300), -1e300)],
)
def test_python_numbers(value, expected):
    found = as_number("k", value)

    assert (found, type(found)) == (expected, float)


def test_an_int_that_no_float_holds_is_named_and_not_written_out():
    """A million digits in a warning help nobody."""
    with pytest.raises(BadValueError) as caught:
        as_number("loss", 10**400)

    assert caught.value.reason == "bad_value"
    assert "loss" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_numpy_scalars_and_arrays_of_one(name):
    one = np.ones((), name)
    for value in (one, one[()], one.reshape(1), one.reshape(1, 1, 1)):
        found = as_number("k", value)
        assert (found, type(found)) == (1.0, float)


def test_numpy_values_that_are_not_finite_stay_so():
    assert math.isnan(as_number("k", np.float32("nan")))
    assert as_number("k", np.array([-np.inf])) == -math.inf


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), np.zeros((0,)), np.zeros((2, 2)), np.complex64(1), np.array([1j]), np.array("1"), np.str_("1"),
     np.datetime64("2026-01-01"), np.timedelta64(1, "s"), np.array([None]), np.zeros((1,), [("a", "f8")]), np.bytes_(b"1")],
    ids=repr,
)  # fmt: skip
def test_numpy_values_that_are_no_single_real_number_are_refused(value):
    with pytest.raises(BadValueError, match="k: ") as caught:
        as_number("k", value)

    assert caught.value.reason == "bad_value"


@pytest.mark.parametrize(
    ("value", "what"),
    [("1.0", "a str"), (None, "a NoneType"), (1j, "a complex"), (b"1", "a bytes"), ([1.0], "a list"), ((1,), "a tuple"),
     (Ellipsis, "an ellipsis"), (Decimal(1), "a Decimal"), (Fraction(1, 2), "a Fraction"), (float, "a type")],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_refused_with_its_type(value, what):
    with pytest.raises(BadValueError, match=f"loss: {what}") as caught:
        as_number("loss", value)

    assert caught.value.reason == "bad_value"


TORCH = """
import sys
import torch
from ddplog.worker.scalars import BadValueError, as_int, as_number

def refused(value):
    try:
        as_number("k", value)
    except BadValueError as exc:
        return exc.reason == "bad_value" and "k: a tensor of" in str(exc)
    return False

types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
         torch.int64, torch.bool]
for dtype in types:
    for shape in ((), (1,), (1, 1)):
        value = as_number("k", torch.ones(shape, dtype=dtype))
        assert value == 1.0 and type(value) is float, (dtype, shape)
leaf = torch.tensor(0.5, requires_grad=True)
assert as_number("k", leaf) == 0.5 and as_number("k", leaf * 2) == 1.0
assert as_number("k", torch.nn.Parameter(torch.tensor([2.0]))) == 2.0
assert as_number("k", torch.tensor(float("inf"))) == float("inf")
assert as_number("k", torch.tensor(3.0).expand(1)) == 3.0
for bad in (torch.zeros(2), torch.zeros(0), torch.zeros(2, 2), torch.tensor(1j), torch.zeros(1, 2, requires_grad=True)):
    assert refused(bad), bad
assert as_int(torch.tensor(7)) == 7 and as_int(torch.tensor([7])) == 7
assert as_int(torch.tensor(7.5)) is None and as_int(torch.tensor([1, 2])) is None
print("ok")
"""


DTENSORS = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from ddplog.worker.scalars import BadValueError, as_number

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
local = torch.tensor([2.5], requires_grad=True)

def place(placement):
    return DTensor.from_local(local, mesh, [placement], run_check=False)

assert as_number("k", place(Replicate())) == 2.5
for placement in (Shard(0), Partial()):
    try:
        as_number("loss", place(placement))
    except BadValueError as exc:
        assert exc.reason == "bad_value" and "loss.full_tensor()" in str(exc) and "collective" in str(exc), exc
    else:
        raise AssertionError(placement)
dist.destroy_process_group()
print("ok")
"""

COMPILED = """
import sys, tempfile, warnings
from pathlib import Path
import torch
from ddplog.journal.reader import JournalReader
from worker.fake_device import on_device
from worker.test_pending import new_run, device_of, values

run = new_run(Path(tempfile.mkdtemp()) / "0.1", segment_bytes=1 << 20)
device = device_of(run)
counters = torch._dynamo.utils.counters

def step(x, number):
    loss = (x * 2).sum()
    run.log({"loss": on_device(loss), "half": loss.detach() / 2, "lr": 0.1}, step=number)
    return loss + 1

def train(numbers):
    compiled = torch.compile(step, backend=sys.argv[1])
    x = torch.ones(4, requires_grad=True)
    for number in numbers:
        assert compiled(x, torch.tensor(number)).item() == 9.0
        run.log({"beside": on_device(compiled(x.detach(), torch.tensor(number)))}, step=number)
        device.complete()

train(range(3))  # the first call of all is traced
torch._dynamo.reset()
counters.clear()
train(range(3, 6))
assert counters["stats"]["unique_graphs"] <= 4, counters  # two for each kind of x: before log() and after it
device.complete()
run.flush()
found = values(run)
assert [item["loss"] for item in found if "loss" in item] == [8.0] * 12, found
assert [item["half"] for item in found if "half" in item] == [4.0] * 12, found
assert [item["beside"] for item in found if "beside" in item] == [9.0] * 6, found
assert dict(run.drops) == {}
print("ok")
"""


def run_torch(code, *words):
    """In a process of its own: it takes a second and 200 MB, and changes what torch is for everybody else."""
    pytest.importorskip("torch")
    root = Path(__file__).parents[2]
    environ = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environ, timeout=110, check=False
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


@pytest.mark.system
def test_torch_scalars():
    run_torch(TORCH)


@pytest.mark.system
def test_a_dtensor_has_a_value_only_where_every_rank_has_it():
    """The others' needs a collective, which log() must not start: the ranks may not all come to it."""
    run_torch(DTENSORS)


@pytest.mark.system
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_step_may_log(backend):
    """It is a break in the graph, and of ddplog's own code nothing is compiled but at a first call that comes too early."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor compiles with g++")
    run_torch(COMPILED, backend)


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
        as_number(found[-1][0], found[-1][1])


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
