"""scripts/launch_ddp.sh: what it derives from a SLURM allocation, and that it passes everything else through."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

SCRIPT = Path(__file__).parents[2] / "scripts" / "launch_ddp.sh"
ALLOCATION = {
    "SLURM_JOB_ID": "41234",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "4",
}
DERIVED = {
    "--nproc-per-node": "4",
    "--nnodes": "2",
    "--node-rank": "1",
    "--master-addr": "gpu07",
    "--master-port": "21234",
}


@pytest.fixture
def launch(tmp_path):
    """Run the script with a `ddplog` that prints its arguments, one a line, and an allocation of two nodes."""
    for name, text in {
        "ddplog": 'printf "%s\\n" "$@"; exit "${FAKE_EXIT:-0}"',
        "scontrol": '[ "$*" = "show hostnames gpu[07-08]" ] || exit 1; printf "gpu07\\ngpu08\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*words, **environ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PET_")) and k != "RANK"}
        return subprocess.run(
            [SCRIPT, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environ},
        )

    return run


def given(done):
    """Return the options before the script, and what follows."""
    words = done.stdout.splitlines()
    assert words.pop(0) == "run"
    split = words.index("train.py")
    return dict(zip(words[:split:2], words[1:split:2], strict=True)), words[split:]


def test_outside_slurm_everything_passes_through(launch):
    done = launch("--nproc-per-node", "2", "train.py", "--lr", "0.1", "two words", "")
    assert done.stdout.splitlines() == ["run", "--nproc-per-node", "2", "train.py", "--lr", "0.1", "two words", ""]


def test_the_exit_code_passes_through(launch):
    assert launch("train.py", FAKE_EXIT="7").returncode == 7


def test_an_allocation_gives_nodes_rank_master_and_processes(launch):
    options, rest = given(launch("train.py", "--lr", "0.1", **ALLOCATION))
    assert options == DERIVED
    assert rest == ["train.py", "--lr", "0.1"]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--nnodes", "1"], {"--nproc-per-node", "--node-rank", "--master-addr", "--master-port"}),
        (["--nproc_per_node=8"], {"--nnodes", "--node-rank", "--master-addr", "--master-port"}),
        (["--master-addr", "a", "--master_port", "5"], {"--nproc-per-node", "--nnodes", "--node-rank"}),
        (["--node_rank", "0"], {"--nproc-per-node", "--nnodes", "--master-addr", "--master-port"}),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "a:5"], {"--nproc-per-node", "--nnodes"}),
    ],
)
def test_what_is_given_is_not_derived(launch, words, left):
    done = launch(*words, "train.py", **ALLOCATION)
    lines = done.stdout.splitlines()
    derived = lines[1 : lines.index(words[0])]
    assert dict(zip(derived[::2], derived[1::2], strict=True)) == {name: DERIVED[name] for name in left}


def test_standalone_needs_no_rendezvous(launch):
    done = launch("--standalone", "train.py", **ALLOCATION)
    assert done.stdout.splitlines() == ["run", "--nproc-per-node", "4", "--standalone", "train.py"]


def test_torchruns_variables_count_as_given(launch):
    options, _ = given(launch("train.py", **ALLOCATION, PET_NPROC_PER_NODE="3"))
    assert "--nproc-per-node" not in options


def test_options_of_the_script_are_not_ours(launch):
    options, rest = given(launch("train.py", "--nnodes", "9", **ALLOCATION))
    assert options == DERIVED
    assert rest == ["train.py", "--nnodes", "9"]


def test_without_gpus_there_is_one_process_per_node(launch):
    options, _ = given(launch("train.py", **{**ALLOCATION, "SLURM_GPUS_ON_NODE": ""}))
    assert options["--nproc-per-node"] == "1"


def test_two_jobs_on_one_node_get_different_ports(launch):
    options, _ = given(launch("train.py", **{**ALLOCATION, "SLURM_JOB_ID": "41235"}))
    assert options["--master-port"] == "21235"


def test_a_rank_is_not_a_node(launch):
    """RANK is set: somebody else has done all this."""
    assert launch("train.py", **ALLOCATION, RANK="0").stdout.splitlines() == ["run", "train.py"]


def test_another_launcher_knows_slurm_itself(launch):
    done = launch("--", "mpirun", "train.py", **ALLOCATION)
    assert done.stdout.splitlines() == ["run", "--", "mpirun", "train.py"]


def test_a_batch_script_on_one_node_needs_no_srun(launch):
    batch = {key: value for key, value in ALLOCATION.items() if key != "SLURM_STEP_ID"}
    options, _ = given(launch("train.py", **{**batch, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}))
    assert (options["--nnodes"], options["--node-rank"]) == ("1", "0")


def test_a_batch_script_on_two_nodes_must_use_srun(launch):
    """It runs on the first node only, and would wait for the other for ever."""
    done = launch("train.py", **{key: value for key, value in ALLOCATION.items() if key != "SLURM_STEP_ID"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "srun --ntasks-per-node=1" in done.stderr


def test_several_tasks_per_node_are_refused(launch):
    done = launch("train.py", **{**ALLOCATION, "SLURM_LOCALID": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "srun --ntasks-per-node=1" in done.stderr


def test_a_failing_scontrol_stops_the_job(launch):
    done = launch("train.py", **{**ALLOCATION, "SLURM_JOB_NODELIST": "other"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "scontrol" in done.stderr
