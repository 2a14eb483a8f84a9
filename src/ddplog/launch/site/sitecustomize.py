"""Makes a tracker's package mean ddplog's stand-in for it, in every Python that `ddplog run --capture` starts.

Python imports `sitecustomize` by itself at its start; launch/capture.py puts this folder in front of PYTHONPATH, and
`DDPLOG_CAPTURE=comet_ml=ddplog.comet` into the environment. The job may start Pythons that have no ddplog, so this
file is the standard library's only, and ddplog is imported when the captured package first is. It must not raise,
print, or keep the user's own sitecustomize from running.

ddplog's helper processes are not captured: a forwarder needs the real package.
"""

# ruff: noqa: INP001 - a folder on PYTHONPATH, and no package

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

VARIABLE = "DDPLOG_CAPTURE"


class StandIn:
    """Loads ddplog's module as the captured one: the same object under two names."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002 - the protocol's
        return importlib.import_module(self.spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import system has just replaced."""
        module.__spec__ = self.spec


class Capture:
    """Finds the stand-ins of captured packages and of the modules in them."""

    def __init__(self, captured: Mapping[str, str]) -> None:
        self.captured = captured

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the protocol's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        first, dot, rest = fullname.partition(".")
        if first not in self.captured:
            return None
        import importlib.util  # 2 ms that a Python without captured imports need not spend

        wanted = self.captured[first] + dot + rest
        try:
            found = importlib.util.find_spec(wanted)
        except ModuleNotFoundError as exc:
            raise ModuleNotFoundError(
                f"{fullname} is captured (`ddplog run --capture`), and {sys.executable} cannot import {exc.name}, "
                "which stands in for it: install ddplog there",
                name=fullname,
            ) from exc
        if found is None:
            raise ModuleNotFoundError(
                f"{fullname} is captured (`ddplog run --capture`), and ddplog has no stand-in for this part of {first}",
                name=fullname,
            )
        is_package = found.submodule_search_locations is not None
        loader = StandIn(found)  # no importlib.abc.Loader, whose import takes 1 ms of every Python's start
        return ModuleSpec(fullname, loader, origin=wanted, is_package=is_package)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Capture({self.captured!r})"


def install() -> None:
    """Capture what the environment says, unless this is one of ddplog's own processes."""
    words = [word.partition("=") for word in os.environ.get(VARIABLE, "").split(",")]
    captured = {name: module for name, _, module in words if name and module}
    if captured and "ddplog_helper" not in sys._xoptions:  # noqa: SLF001 - the only place -X's words can be read
        sys.meta_path.insert(0, Capture(captured))


def run_next() -> None:
    """Run the sitecustomize that this one is in front of, if there is one: the user's, or the distribution's."""
    here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - pathlib is not loaded yet
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != here])
    if spec is None or spec.loader is None:
        return
    import importlib.util

    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    install()
    run_next()
