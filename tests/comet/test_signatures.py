"""Every public name, method and parameter of Comet's interface is here, so that no script written for it ends in one.

What that interface is, is recorded in data/signatures.json; where comet_ml is installed, the record is compared with it.
"""

import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ddplog.comet
from ddplog.comet.integration import pytorch
from ddplog.comet.untaken import METHODS

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "data" / "signatures.json").read_text())


def installed():
    try:
        return importlib.metadata.version("comet_ml")
    except importlib.metadata.PackageNotFoundError:
        return None


def accepts(function, wanted, *, is_method=False):
    """Return the first of Comet's parameters that the function does not take in the same place and by the same name."""
    ours = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    kinds = {parameter.kind for parameter in ours}
    takes_any = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    names = [parameter.name for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for place, (name, kind, default) in enumerate(wanted):
        if takes_any:
            continue
        if kind.startswith("VAR_"):
            if getattr(inspect.Parameter, kind) not in kinds:
                return name
        elif kind != "POSITIONAL_OR_KEYWORD" or names[place : place + 1] != [name]:
            return name
        elif default is not None and ours[place].default is inspect.Parameter.empty:
            return f"{name} has no default"
    required = [p.name for p in ours if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = set(required) - {name for name, _, _ in wanted}
    return f"needs {unknown}" if unknown else None


@pytest.mark.skipif(
    installed() != RECORD["version"], reason="the comet_ml whose interface is recorded is not installed"
)
def test_the_record_is_what_comet_ml_has():
    """Otherwise the tests below prove nothing."""
    done = subprocess.run([sys.executable, HERE / "signatures.py"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == RECORD


def test_the_version_is_the_recorded_one():
    """transformers and Lightning look whether it is new enough."""
    assert ddplog.comet.__version__ == RECORD["version"]


def test_every_public_name_is_here():
    assert [name for name in RECORD["names"] if not hasattr(ddplog.comet, name)] == []
    assert set(RECORD["names"]) <= set(ddplog.comet.__all__)


@pytest.mark.parametrize("name", RECORD["methods"])
def test_every_method_takes_what_comets_does(name):
    wanted = RECORD["methods"][name]
    found = inspect.getattr_static(ddplog.comet.Experiment, name)
    if wanted is None:
        assert isinstance(found, property)
    else:
        assert accepts(found, wanted, is_method=True) is None
        assert found.__doc__


def test_an_offline_experiment_has_no_further_method():
    assert set(RECORD["offline_methods"]) <= set(RECORD["methods"])


def test_no_method_is_both_done_and_not_taken():
    """A row of the table would replace a method of the class without a word."""
    source = inspect.getsource(sys.modules["ddplog.comet.experiment"])
    assert [name for name in METHODS if f"def {name}(" in source] == []


@pytest.mark.parametrize("name", RECORD["functions"])
def test_every_function_takes_what_comets_does(name):
    assert accepts(getattr(ddplog.comet, name), RECORD["functions"][name]) is None


@pytest.mark.parametrize("name", RECORD["constructors"])
def test_the_leading_parameters_of_a_constructor_are_in_comets_order(name):
    """Scripts pass the key, project and workspace by position; what is further behind, nobody does."""
    wanted = [name for name, kind, _ in RECORD["constructors"][name] if kind == "POSITIONAL_OR_KEYWORD"]
    ours = list(getattr(ddplog.comet, name).POSITIONAL)
    assert ours == wanted[: len(ours)]
    assert len(ours) >= min(3, len(wanted))


def test_the_options_of_an_experiment_are_comets():
    ours = inspect.signature(ddplog.comet.ExperimentConfig).parameters.values()
    assert [[p.name, p.kind.name, repr(p.default)] for p in ours] == RECORD["config"]


@pytest.mark.parametrize("name", RECORD["pytorch"])
def test_the_integration_takes_what_comets_does(name):
    assert accepts(getattr(pytorch, name), RECORD["pytorch"][name]) is None


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda a, c=0: None, "b"),
        (lambda b=0, a=1: None, "a"),
        (lambda a, b: None, "b has no default"),
        (lambda a, b=1, *, z: None, None),
        (lambda a: None, "b"),
        (lambda a, b=1: None, None),
        (lambda *args, **kwargs: None, None),
    ],
)
def test_the_comparison_sees_what_would_break_a_script(function, problem):
    wanted = [["a", "POSITIONAL_OR_KEYWORD", None], ["b", "POSITIONAL_OR_KEYWORD", "1"]]
    assert accepts(function, wanted) == problem
