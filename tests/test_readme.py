"""README is the product's face: its example runs, its commands exist, its links lead somewhere, its table has tests."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ddplog.cli.main import COMMANDS, cli
from ddplog.config import Settings
from ddplog.sinks import available

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_command_line_shown_is_one_that_there_is():
    shown = re.findall(r"^ddplog (\w+)(.*?)(?:#|$)", "\n".join(blocks("bash")), re.MULTILINE)

    assert {name for name, _ in shown} == set(COMMANDS)
    for name, rest in shown:
        command = cli.get_command(click.Context(cli), name)
        known = {option for parameter in command.params for option in parameter.opts}
        if name != "run":
            assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_every_line_of_python_uses_what_there_is():
    for block in blocks("python"):
        ast.parse(block)
        for module, name in re.findall(r"^from (ddplog\.\w+) import (\w+)", block, re.MULTILINE):
            source = Path(importlib.util.find_spec(module).origin).read_text()
            assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), (module, name)
        for module, name in re.findall(r"\b(ddplog\.(?:horovod|ddp))\.(\w+)\(", README):
            source = Path(importlib.util.find_spec(module).origin).read_text()
            assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), (module, name)


def test_every_file_named_is_there():
    named = set(re.findall(r"`((?:scripts|tests|src|examples|benchmarks|proto)/[\w./-]*)`", README))
    named |= set(
        re.findall(r"^((?:scripts|benchmarks)/\S+|python benchmarks/\S+)", "\n".join(blocks("bash")), re.MULTILINE)
    )

    assert named
    for path in named:
        assert (ROOT / path.removeprefix("python ")).exists(), path


def test_every_level_of_the_promise_names_its_proof():
    table = README.split("## The promise")[1].split("\n\n")[1].splitlines()

    assert table[0] == "| level | when | survives | proven by |"
    levels = [row.split("|")[1].strip() for row in table[2:]]
    assert levels[:4] == ["accepted", "node-durable", "aggregated", "delivered(sink)"]
    root = Path(__file__).parents[1]
    for row in table[2:]:
        proofs = re.findall(r"`([\w/.]+)`", row.split("|")[4])
        assert proofs, row
        for proof in proofs:
            assert (root / proof).exists() or (root / "tests" / "faults" / proof).exists(), proof


def test_every_sink_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)

    assert set(rows) == set(available())


def test_every_setting_named_is_one():
    named = set(re.findall(r"`(\w+_s|spool_bytes|max_keys|strict|mode)`", README))

    assert named <= set(Settings.__dataclass_fields__)


def test_it_names_no_placeholder():
    assert "FIGURES" not in README
    assert "TODO" not in README


@pytest.mark.system
def test_the_example_runs(tmp_path):
    """The twelve lines, with a loader of three batches and the open_run() of their own run."""
    example = blocks("python")[0]
    prologue = """
class Batch(list):
    num_tokens = 7
loader = [Batch([0] * 4) for _ in range(3)]
def train_step(batch):
    return 0.5, 0.9
"""
    before, after = example.split("past = ")
    script = before.replace("import ddplog\n", f"import ddplog\n{prologue}") + "run.finish()\npast = " + after
    script = re.sub(r'"runs/[^"]*"', "run.dir", script) + "\nprint(loss.step.tolist(), loss.value.tolist())\n"
    environ = {
        **os.environ,
        "DDPLOG_SPOOL": str(tmp_path / "spool"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[0, 1, 2] [0.5, 0.5, 0.5]\n"
