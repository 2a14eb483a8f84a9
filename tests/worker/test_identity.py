"""Which rank this process is, under every launcher; the environments are recorded from real ones."""

import pytest

from ddplog.errors import ConfigError
from ddplog.worker.identity import Identity, detect

SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
         "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
            "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
            "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
HOROVOD = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
           "HOROVOD_CROSS_RANK": "0", "HOROVOD_CROSS_SIZE": "2", "HOROVOD_HOSTNAME": "a", "HOROVOD_CONTROLLER": "gloo"}  # fmt: skip
OPENMPI = {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "2", "PMIX_RANK": "6"}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
           "MV2_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
LSF = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_LOCAL_RANK": "0",
       "JSM_NAMESPACE_LOCAL_SIZE": "3"}  # fmt: skip
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
RAY = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def who(launcher, rank, world_size, local_rank, local_world_size, node_rank):
    return Identity(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        launcher=launcher,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, who("torchrun", 3, 4, 1, 2, 1)),
        (HOROVOD, who("horovodrun", 1, 4, 1, 2, 0)),
        (DEEPSPEED, who("deepspeed", 5, 8, 1, 4, 1)),
        (OPENMPI, who("openmpi", 6, 8, 2, 4, 0)),
        (MVAPICH, who("mvapich2", 2, 4, 1, 2, 0)),
        (MPICH, who("mpich", 2, 4, 0, 2, 0)),
        (LSF, who("lsf", 3, 6, 0, 3, 0)),
        (RAY, who("ray", 2, 4, 0, 2, 1)),
        (PLAIN, who("env", 1, 2, 1, 1, 0)),
        (SLURM, who("slurm", 5, 8, 1, 4, 1)),
        ({}, who("python", 0, 1, 0, 1, 0)),
    ],
    ids=lambda value: value.launcher if isinstance(value, Identity) else "",
)
def test_each_launcher_is_known_by_its_variables(environ, expected):
    identity = detect({"PATH": "/bin", **environ})

    assert identity == expected
    assert identity.has_launcher == (expected.launcher != "python")


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (SLURM | TORCHRUN, "torchrun"),
        (SLURM | HOROVOD, "horovodrun"),
        (SLURM | OPENMPI, "openmpi"),
        (SLURM | PLAIN, "env"),
        (OPENMPI | TORCHRUN, "torchrun"),
        (OPENMPI | HOROVOD, "horovodrun"),
        (SLURM | DEEPSPEED, "deepspeed"),
    ],
)
def test_the_innermost_launcher_counts(environ, launcher):
    """torchrun under srun: SLURM's rank is the node's, and every local rank would have the same."""
    assert detect(environ).launcher == launcher


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1", "WORLD_SIZE": "4"},  # Kubeflow's are the node's, not the process's
        {"TORCHELASTIC_RUN_ID": "none"},
        {"HOROVOD_RANK": "0"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"},  # a batch script, not a step
        {"LOCAL_RANK": "1"},
    ],
)
def test_part_of_a_launchers_variables_is_no_launcher(environ):
    assert detect(environ) == who("python", 0, 1, 0, 1, 0)


def test_openmpis_node_rank_is_no_node():
    """OMPI_COMM_WORLD_NODE_RANK numbers the processes on a node, over all jobs; it does not number nodes."""
    assert {detect(OPENMPI | {"OMPI_COMM_WORLD_NODE_RANK": str(n)}).node_rank for n in range(4)} == {0}


@pytest.mark.parametrize(("text", "number"), [("4(x2)", 4), ("3,2(x2)", 3), ("2", 2), ("1(x16),4", 1)])
def test_slurm_counts_tasks_in_its_own_notation(text, number):
    assert detect(SLURM | {"SLURM_TASKS_PER_NODE": text}).local_world_size == number


def test_what_a_launcher_leaves_out_is_the_single_process_default():
    environ = {name: value for name, value in TORCHRUN.items() if name not in ("LOCAL_WORLD_SIZE", "GROUP_RANK")}

    assert detect(environ) == who("torchrun", 3, 4, 1, 1, 0)
    assert detect(environ | {"LOCAL_WORLD_SIZE": ""}) == who("torchrun", 3, 4, 1, 1, 0)


@pytest.mark.parametrize(
    ("environ", "setting", "value"),
    [
        (TORCHRUN | {"RANK": "4"}, "RANK", "4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK", "-1"),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "0"}, "RANK", "0"),
        (TORCHRUN | {"RANK": "one"}, "RANK", "one"),
        (TORCHRUN | {"WORLD_SIZE": "4.0"}, "WORLD_SIZE", "4.0"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK", "x"),
        (HOROVOD | {"HOROVOD_RANK": "9"}, "HOROVOD_RANK", "9"),
        (HOROVOD | {"HOROVOD_CROSS_RANK": "?"}, "HOROVOD_CROSS_RANK", "?"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK", "8"),
        (MPICH | {"PMI_SIZE": "many"}, "PMI_SIZE", "many"),
        (MVAPICH | {"MV2_COMM_WORLD_RANK": "4"}, "MV2_COMM_WORLD_RANK", "4"),
        (LSF | {"JSM_NAMESPACE_RANK": "6"}, "JSM_NAMESPACE_RANK", "6"),
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID", "8"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "(x2)"}, "SLURM_TASKS_PER_NODE", "(x2)"),
        # Recorded in a child of Lightning's own launcher, which gives it no RANK.
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "RANK", ""),
    ],
)
def test_a_contradiction_names_the_variable(environ, setting, value):
    """A rank outside its world would share its journal's place, and its points, with nobody or with another."""
    with pytest.raises(ConfigError) as caught:
        detect(environ)

    assert (caught.value.setting, caught.value.value) == (setting, value)
