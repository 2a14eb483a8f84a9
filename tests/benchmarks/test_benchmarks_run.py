"""Each benchmark runs from its command and says what it measured. What it measures is nobody's assertion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def run(name, tmp_path, *words):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DDPLOG_", "SLURM_")) and k != "RANK"}
    out = tmp_path / "out.json"
    process = subprocess.run(
        [sys.executable, str(FOLDER / name), "--quick", "--out", str(out), *words],
        capture_output=True, text=True, timeout=110, env=clean, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    document = json.loads(out.read_text())
    assert document["is_quick"]
    assert document["machine"]["cores"] >= 1
    return process.stdout, document["results"]


def test_bench_log(tmp_path):
    shown, results = run("bench_log.py", tmp_path)

    assert "struct.pack_into" in shown
    assert results["tight"]["log, 10 floats"]["count"] == 2000
    assert results["drops"] == {}
    assert results["import_ms"]["heavy_modules"] == 0


def test_bench_ingest(tmp_path):
    shown, results = run("bench_ingest.py", tmp_path, "--ranks", "8", "--parts", "aggregator,blocks,paced")

    assert "on one core" in shown
    for name in ("aggregator_blocks", "aggregator_steps", "blocks", "paced"):
        assert results[name]["store"]["complete"], results[name]
        assert results[name]["exit_code"] == 0


def test_bench_faults(tmp_path):
    shown, results = run("bench_faults.py", tmp_path)

    names = {"baseline", "aggregator stopped", "sink stopped", "spool full"}
    assert names <= set(results["tight"]) == set(results["paced"]) <= names | {"disk full"}
    assert ("disk full" in results["tight"]) != ("left out" in shown)
    assert results["tight"]["baseline"]["ratio"] == {"p50": 1, "p99": 1, "p99.9": 1}
    for name, share in results["dropped_share"].items():
        assert share == (1 if name.endswith("full") else 0), name


def test_bench_step(tmp_path):
    pytest.importorskip("torch")
    shown, results = run("bench_step.py", tmp_path)

    assert "one by one" in shown
    assert set(results["modes"]) == {
        *("none", "ddplog", "stacked", "one by one"),
        *("attach: times", "attach: + norm", "attach: + comm"),
    }
    assert results["drops"] == {}
    assert results["helpers"] == 2


def test_bench_gpu(tmp_path):
    """Without a device it says so and ends well: it is kept ready for a machine that has one."""
    torch = pytest.importorskip("torch")
    shown, results = run("bench_gpu.py", tmp_path)

    assert results["around"]["us"]["count"] == 500
    assert results["around"]["drops"] == {}
    assert ("no CUDA device" in shown) == (not torch.cuda.is_available())
    if torch.cuda.is_available():
        assert not results["syncs"]["error"]
        assert results["syncs"]["drops"] == results["log"]["drops"] == results["step"]["drops"] == {}


def test_bench_sampling(tmp_path):
    shown, results = run("bench_sampling.py", tmp_path, "--stub", "--ranks", "2")

    assert "of a core at 5 s" in shown
    host, *gpus = results.values()
    assert (host["ranks"], host["read"]) == (2, {})
    for found in gpus:  # none without a C compiler
        assert len(found["read"]) == 2
        assert found["cpu_ms"]["count"] == 3
