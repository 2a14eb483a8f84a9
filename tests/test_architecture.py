"""Holds the layers, the owners of third-party packages, and what must never be in the source.

The table below is DESIGN's picture of the layers. A new top-level module needs a row; a new edge between two
modules of one layer needs a row in DRAWN. The checker reads source with ast and imports nothing; each of its rules
is tested first on a small source that breaks it.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = "ddplog"

BASE, CORE, GENERATED, EDGE, PROCESS, ENTRY = range(6)
INTEGRATIONS = ("ddp", "horovod", "lightning", "huggingface", "accelerate", "comet", "tensorboard")
LAYERS = {
    **dict.fromkeys(("errors", "config", "bootstrap", "killpoints"), BASE),
    "core": CORE,
    "v1": GENERATED,
    **dict.fromkeys(("sinks", "store", "journal", "wire", "sampling", "view"), EDGE),
    **dict.fromkeys(("agent", "aggregator", "forward", "worker"), PROCESS),
    # "" is ddplog/__init__.py: the public interface, which loads everything else lazily.
    **dict.fromkeys(("", "__main__", "cli", "launch", "testing", *INTEGRATIONS), ENTRY),
}
"""First name below ddplog -> its layer. A module imports its own package and the layers below; v1 is generated."""

DRAWN = {
    ("config", "errors"),
    ("killpoints", "errors"),
    ("view", "store"),
}
"""(importer, imported) of one layer, besides those of ENTRY, which may all import each other."""

OWNERS = {
    "zmq": ("ddplog.wire",),
    "grpc": ("ddplog.aggregator.control", "ddplog.v1"),
    "grpc_health": ("ddplog.aggregator.control",),
    "sqlite3": ("ddplog.store",),
    "pynvml": ("ddplog.sampling",),
    "torch": ("ddplog.launch", "ddplog.worker.scalars", *(f"ddplog.{name}" for name in INTEGRATIONS)),
}
"""Package -> the only modules, or packages, that may import it."""

CORE_THIRD_PARTY = {"numpy"}
CORE_NEVER = {
    *("time", "random", "secrets", "socket", "select", "selectors", "asyncio", "threading", "_thread", "queue"),
    *("multiprocessing", "concurrent", "subprocess", "signal", "logging", "os", "io", "pathlib", "shutil", "tempfile"),
    *("fcntl", "mmap", "sqlite3", "uuid", "http", "urllib", "ssl", "sched", "warnings"),
}
CORE_NEVER_CALLED = {"open", "print", "input"}

NEVER_IMPORTED = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "ruamel",
}
NEVER_CALLED = {"eval", "exec", "__import__"}
NEVER_NAMED = {"recv_pyobj", "send_pyobj", "recv_serialized", "allow_pickle"}

NOT_ON_IMPORT = (
    *("torch", "grpc", "zmq", "sqlite3", "numpy", "google.protobuf", "pynvml", "psutil", "rich", "click"),
    *("comet_ml", "wandb", "mlflow", "tensorboard", "horovod", "lightning", "transformers", "accelerate"),
)


class Import(NamedTuple):
    """One imported module, where it stands."""

    name: str
    line: int


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Yield every module that the source imports, anywhere in it, TYPE_CHECKING blocks included.

    `from x import y` gives both x and x.y, since y may be a module; `from ddplog import y` only ddplog.y. A constant given to import_module() counts.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            if (
                base != PACKAGE
            ):  # its names are modules below it, or the public interface, which check_layers tells apart
                yield Import(base, node.lineno)
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            given = node.args[0]
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield Import(given.value, node.lineno)


def called(node: ast.Call) -> str | None:
    """Return the last name of what is called: f for f(), g for a.g()."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else None


def part(name: str) -> str | None:
    """Return the first name below ddplog, "" for ddplog itself, None for another package."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == PACKAGE else None


def is_inside(module: str, owner: str) -> bool:
    return module == owner or module.startswith(owner + ".")


def check(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what a module's source does that it must not."""
    tree = ast.parse(source)
    found = set(imports(tree, module, is_package=is_package))
    problems = [
        *check_layers(module, found),
        *check_owners(module, found),
        *check_core(module, tree, found),
        *check_never(tree, found),
    ]
    return [f"{module}: {problem}" for problem in problems]


def check_layers(module: str, found: set[Import]) -> Iterator[str]:
    here = part(module)
    if here not in LAYERS:
        yield f"{here!r} has no layer: give it one in LAYERS"
        return
    for name, line in sorted(found):
        there = part(name)
        if there is None or there == here:
            continue
        if there not in LAYERS:
            there = ""  # ddplog.init: a name of the public interface
        if LAYERS[there] > LAYERS[here]:
            yield f"line {line}: imports {name}, which is above it"
        elif LAYERS[there] == LAYERS[here] != ENTRY and (here, there) not in DRAWN:
            yield f"line {line}: imports {name}, its neighbour; DRAWN does not allow it"
        elif there == "v1" and LAYERS[here] < EDGE:
            yield f"line {line}: imports {name}: protobuf stays out of {here}"


def check_owners(module: str, found: set[Import]) -> Iterator[str]:
    for name, line in sorted(found):
        owners = OWNERS.get(name.partition(".")[0])
        if owners is not None and not any(is_inside(module, owner) for owner in owners):
            yield f"line {line}: imports {name}, which is for {', '.join(owners)}"


def check_core(module: str, tree: ast.Module, found: set[Import]) -> Iterator[str]:
    if not is_inside(module, "ddplog.core"):
        return
    for name, line in sorted(found):
        first = name.partition(".")[0]
        if first in CORE_NEVER:
            yield f"line {line}: imports {name}: core decides and does nothing else"
        elif first not in sys.stdlib_module_names | CORE_THIRD_PARTY | {PACKAGE}:
            yield f"line {line}: imports {name}: core has the standard library and numpy"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CORE_NEVER_CALLED:
            yield f"line {node.lineno}: calls {node.func.id}()"


def check_never(tree: ast.Module, found: set[Import]) -> Iterator[str]:
    for name, line in sorted(found):
        if name.partition(".")[0] in NEVER_IMPORTED:
            yield f"line {line}: imports {name}: code could come in as data"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
            yield f"line {node.lineno}: calls {node.func.id}()"
        elif isinstance(node, ast.Attribute) and node.attr in NEVER_NAMED:
            yield f"line {node.lineno}: uses {node.attr}"
        elif isinstance(node, ast.Attribute) and is_torch_load(node):
            yield f"line {node.lineno}: torch.load reads pickles"
        elif isinstance(node, ast.keyword) and node.arg in NEVER_NAMED and not is_false(node.value):
            yield f"line {node.value.lineno}: passes {node.arg}"


def is_torch_load(node: ast.Attribute) -> bool:
    return node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def modules() -> list[tuple[str, Path]]:
    """Return (name, file) of every module that people write."""
    found = []
    for path in sorted((SRC / PACKAGE).rglob("*.py")):
        names = path.relative_to(SRC).with_suffix("").parts
        if names[1] != "v1":
            found.append((".".join(names[:-1] if names[-1] == "__init__" else names), path))
    return found


# --- the source -------------------------------------------------------------------------------------------------


def test_there_is_source_to_check():
    assert len(modules()) > 10


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_a_module_keeps_to_its_layer_and_imports_no_one_elses_package(module, path):
    assert check(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that sees this source tree."""
    environ = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> list[str]:
    """Return which of NOT_ON_IMPORT a statement loads beyond what the interpreter itself starts with."""
    code = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    fresh = json.loads(run_python(code))
    return [name for name in NOT_ON_IMPORT if any(is_inside(module, name) for module in fresh)]


@pytest.mark.system
def test_import_ddplog_is_light():
    """It stands at the top of every training script: no library that can clash, fork badly or take a second."""
    assert loaded_by("import ddplog") == []


@pytest.mark.system
def test_the_agent_has_nothing_to_do_with_drivers():
    """Only the sampler's process calls them; and each node starts an agent, as soon as may be."""
    assert not {"pynvml", "psutil", "numpy", "grpc"} & set(loaded_by("import ddplog.agent.process"))


@pytest.mark.system
def test_the_check_of_what_an_import_loads_can_fail():
    assert loaded_by("import sqlite3, google.protobuf.message") == ["sqlite3", "google.protobuf"]


# --- the checker ------------------------------------------------------------------------------------------------

BROKEN = {
    "base imports core": ("import ddplog.core", "ddplog.config"),
    "core imports an edge": ("from ddplog.store import schema", "ddplog.core.reduce"),
    "core imports an edge, relatively": ("from ..store import schema", "ddplog.core.reduce"),
    "core imports an edge for its types": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ddplog.store import schema",
        "ddplog.core.reduce",
    ),
    "core imports generated code": ("from ddplog.v1 import data_pb2", "ddplog.core.records"),
    "an edge imports a neighbour": ("from ddplog.journal.spool import locked", "ddplog.store.run_store"),
    "an edge imports a neighbour, as a name": ("from ddplog import journal", "ddplog.wire.codec"),
    "an edge imports a neighbour in a function": ("def f():\n    import ddplog.journal", "ddplog.wire.codec"),
    "the store imports the view": ("import ddplog.view.server", "ddplog.store.reader"),
    "an edge imports a process": ("from ddplog.agent import shipper", "ddplog.journal.reader"),
    "a process imports an entry": ("from ddplog.cli import main", "ddplog.aggregator.process"),
    "a process imports the public interface": ("from ddplog import init", "ddplog.worker.run"),
    "a process imports another": ("from ddplog.agent import shipper", "ddplog.aggregator.process"),
    "a module nobody placed": ("", "ddplog.helpers"),
    "zmq outside wire": ("import zmq", "ddplog.agent.process"),
    "zmq inside a function": ("def f():\n    from zmq.utils import z85", "ddplog.aggregator.ingest"),
    "zmq by name": ("import importlib\nimportlib.import_module('zmq')", "ddplog.agent.process"),
    "grpc beside control": ("import grpc", "ddplog.aggregator.process"),
    "grpc in a module whose name only begins alike": ("import grpc", "ddplog.aggregator.control_client"),
    "grpc in the command line": ("import grpc", "ddplog.cli.top"),
    "grpc's health outside control": ("from grpc_health.v1 import health", "ddplog.cli.top"),
    "sqlite3 outside the store": ("import sqlite3", "ddplog.view.server"),
    "pynvml outside sampling": ("import pynvml", "ddplog.agent.process"),
    "torch in the worker": ("import torch", "ddplog.worker.run"),
    "torch's parts in the store": ("from torch.distributed import run", "ddplog.store.schema"),
    **{f"core imports {name}": (f"import {name}", "ddplog.core.dedup") for name in sorted(CORE_NEVER)},
    "core imports a part of a forbidden module": ("from concurrent.futures import Future", "ddplog.core.dedup"),
    "core imports os.path": ("import os.path", "ddplog.core.dedup"),
    "core imports pandas": ("import pandas", "ddplog.core.dedup"),
    "core opens a file": ("open('x')", "ddplog.core.dedup"),
    "core prints": ("print('x')", "ddplog.core.dedup"),
    **{f"imports {name}": (f"import {name}", "ddplog.sinks.jsonl") for name in sorted(NEVER_IMPORTED)},
    "from yaml": ("from yaml import safe_load", "ddplog.cli.main"),
    "eval": ("eval('1')", "ddplog.cli.main"),
    "exec": ("exec('1')", "ddplog.cli.main"),
    "__import__": ("__import__('x')", "ddplog.cli.main"),
    "np.load of pickles": ("import numpy as np\nnp.load('x', allow_pickle=True)", "ddplog.cli.main"),
    "np.load of perhaps pickles": ("import numpy as np\nnp.load('x', allow_pickle=y)", "ddplog.cli.main"),
    "recv_pyobj": ("sock.recv_pyobj()", "ddplog.wire.sockets"),
    "torch.load": ("import torch\ntorch.load('x')", "ddplog.launch.torchrun"),
}

ALLOWED = {
    "an edge imports core and base": (
        "from ddplog.core.records import scan\nfrom ddplog.errors import DdplogError",
        "ddplog.journal.reader",
    ),
    "an edge imports generated code": ("from ddplog.v1.data_pb2 import Envelope", "ddplog.wire.codec"),
    "an edge imports itself": (
        "from . import schema\nfrom .schema import x\nimport ddplog.store",
        "ddplog.store.reader",
    ),
    "the view imports the store": ("from ddplog.store import reader", "ddplog.view.server"),
    "a process imports an edge": ("from ddplog.wire.sockets import DealerEndpoint", "ddplog.agent.process"),
    "a process imports a module of base by its name": ("from ddplog import config as c", "ddplog.worker.run"),
    "a process imports base": ("from ddplog.bootstrap import command", "ddplog.agent.process"),
    "an entry imports a process": ("from ddplog.aggregator.control import connect", "ddplog.cli.top"),
    "an entry imports the public interface": ("import ddplog\nfrom ddplog import init", "ddplog.ddp"),
    "the public interface imports a process": ("from ddplog.worker.run import Run", "ddplog"),
    "zmq in wire": ("import zmq\nfrom zmq.utils import z85", "ddplog.wire.keys"),
    "grpc in control": ("import grpc\nfrom grpc_health.v1 import health", "ddplog.aggregator.control"),
    "torch in the scalars": ("import torch", "ddplog.worker.scalars"),
    "torch in an integration": ("import torch", "ddplog.lightning"),
    "torch in the launcher": ("from torch.distributed import run", "ddplog.launch.torchrun"),
    "core imports numpy and the standard library": (
        "import numpy as np\nimport json, struct, zlib",
        "ddplog.core.dedup",
    ),
    "a model's eval()": ("model.eval()", "ddplog.ddp"),
    "np.load without pickles": ("import numpy as np\nnp.load('x', allow_pickle=False)", "ddplog.cli.main"),
}


@pytest.mark.parametrize(("source", "module"), BROKEN.values(), ids=BROKEN)
def test_the_checker_finds(source, module):
    assert check(source, module)


@pytest.mark.parametrize(("source", "module"), ALLOWED.values(), ids=ALLOWED)
def test_the_checker_allows(source, module):
    assert check(source, module, is_package=module == PACKAGE) == []


def test_a_relative_import_of_a_package_starts_at_itself():
    tree = ast.parse("from . import b\nfrom .c import d\nfrom .. import e")
    assert {name for name, _ in imports(tree, "ddplog.a", is_package=True)} == {
        *("ddplog.a", "ddplog.a.b", "ddplog.a.c", "ddplog.a.c.d", "ddplog.e"),
    }
    assert {name for name, _ in imports(tree, "ddplog.a.x", is_package=False)} == {
        *("ddplog.a", "ddplog.a.b", "ddplog.a.c", "ddplog.a.c.d", "ddplog.e"),
    }


def test_drawn_and_owners_name_modules_that_have_a_layer():
    for importer, imported in DRAWN:
        assert LAYERS[importer] == LAYERS[imported]
        assert (imported, importer) not in DRAWN, "a cycle"
    for owners in OWNERS.values():
        for owner in owners:
            assert part(owner) in LAYERS
