"""`--capture`: which Pythons of a job import the stand-in, and which are left alone."""

import os
import subprocess
import sys

import pytest

from ddplog.bootstrap import command
from ddplog.launch.capture import CAPTURES, SITE, add_captures

WHICH = "import comet_ml, sys; print(comet_ml.__name__, sys.modules['comet_ml'] is sys.modules.get('ddplog.comet'))"


@pytest.fixture
def python(tmp_path):
    """Run Python as a captured job starts it, with a comet_ml in the path that must not be imported."""
    (tmp_path / "decoy" / "comet_ml").mkdir(parents=True)
    (tmp_path / "decoy" / "comet_ml" / "__init__.py").write_text("print('the real one')")
    given = os.pathsep.join([str(tmp_path / "decoy"), str(SITE.parents[2])])

    def run(code, *options, captures=("comet",), **environ):
        everything = add_captures({**os.environ, "PYTHONPATH": given, **environ}, captures)
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            env=everything, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    return run


def test_nothing_is_captured_unless_asked_for(python):
    environ = {"PYTHONPATH": "/x", "HOME": "/h"}

    assert add_captures(environ, ()) == environ
    assert python(WHICH, captures=()) == "the real one\ncomet_ml False"


def test_the_folder_stands_in_front_of_what_the_user_has_and_once():
    """A captured job may itself use `ddplog run --capture`; an empty entry is the working directory and stays."""
    once = add_captures({"PYTHONPATH": f"/a{os.pathsep}{os.pathsep}/b"}, ["comet"])
    twice = add_captures(once, ["comet"])

    assert once == twice
    assert once["PYTHONPATH"].split(os.pathsep) == [str(SITE), "/a", "", "/b"]
    assert once["DDPLOG_CAPTURE"] == "comet_ml=ddplog.comet"
    assert add_captures({}, ["comet"])["PYTHONPATH"] == str(SITE)


@pytest.mark.parametrize("name", CAPTURES)
def test_every_capture_has_a_stand_in(name):
    package, module = CAPTURES[name]

    __import__(module)
    assert package != module


def test_the_package_is_the_stand_in(python):
    assert python(WHICH) == "ddplog.comet True"


def test_so_are_the_modules_in_it(python):
    code = """
        import importlib.util
        print(importlib.util.find_spec("comet_ml") is not None, importlib.util.find_spec("comet_ml.config").origin)
        from comet_ml.integration.pytorch import watch
        import comet_ml.config, comet_ml.integration.pytorch as again
        from comet_ml import Experiment, integration
        import ddplog.comet
        print(watch is ddplog.comet.integration.pytorch.watch, Experiment is ddplog.comet.Experiment)
        print(comet_ml.config is ddplog.comet.config, again is integration.pytorch, comet_ml.__spec__.name)
        print(importlib.util.find_spec("comet_ml").name, hasattr(comet_ml.config, "__path__"))
    """
    lines = python("\n".join(line.strip() for line in code.splitlines()))

    assert lines.splitlines() == [
        "True ddplog.comet.config", "True True", "True True ddplog.comet", "ddplog.comet False",
    ]  # fmt: skip


def test_a_part_that_has_no_stand_in_says_so(python):
    """And never falls through to the real package, which would start an experiment of its own on every rank."""
    code = "try: import comet_ml.integration.ray\nexcept ModuleNotFoundError as exc: print(exc.name, '|', exc)"
    name, said = python(code).split(" | ")

    assert name == "comet_ml.integration.ray"
    assert said == (
        "comet_ml.integration.ray is captured (`ddplog run --capture`), "
        "and ddplog has no stand-in for this part of comet_ml"
    )


def test_a_python_without_ddplog_says_what_it_needs(python):
    """A job may start several Pythons, and only those that use the tracker need ddplog."""
    code = (
        "import sys\nsys.path = [p for p in sys.path if not p.endswith('src')]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
        "print(1)\ntry: import comet_ml\nexcept ImportError as exc: print(exc)"
    )
    first, said = python(code).splitlines()

    assert first == "1"
    assert said.startswith("comet_ml is captured (`ddplog run --capture`), and ")
    assert said.endswith("cannot import ddplog, which stands in for it: install ddplog there")


def test_nothing_of_ddplog_is_imported_before_the_package_is(python):
    assert python("import sys; print([name for name in sys.modules if 'ddplog' in name])") == "[]"


def test_the_stand_in_is_light(python):
    """It is imported before torch, on every rank."""
    heavy = ("torch", "numpy", "zmq", "grpc", "sqlite3", "google.protobuf", "click")
    assert python(f"import comet_ml, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_users_own_sitecustomize_runs_too(python, tmp_path):
    """Coverage and tracing tools live on it."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import sys; sys.own = __file__")
    path = os.pathsep.join([str(tmp_path / "own"), str(SITE.parents[2])])
    code = (
        "import sys, sitecustomize; print(sys.own == sitecustomize.__file__); import comet_ml; print(comet_ml.__name__)"
    )

    assert python(code, PYTHONPATH=path) == "True\nddplog.comet"


def test_a_helper_of_ddplog_is_left_alone(python, tmp_path):
    """The forwarder of the Comet sink needs the real package; a helper has the job's environment."""
    (tmp_path / "decoy" / "helper.py").write_text(f"def main():\n    {WHICH}\n")
    done = subprocess.run(
        command("helper"),
        env=add_captures({**os.environ, "PYTHONPATH": str(tmp_path / "decoy")}, ["comet"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["the real one", "comet_ml False"]


@pytest.mark.parametrize("option", ["-I", "-E", "-S"])
def test_a_python_that_ignores_pythonpath_is_not_captured(python, option):
    """PYTHONPATH is the only way into a Python that somebody else starts; this is its limit."""
    assert python("import sys; print(any('Capture' in repr(f) for f in sys.meta_path))", option) == "False"
