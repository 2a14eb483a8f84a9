"""Which rank this process is, under every launcher; the environments are recorded from real ones."""

import pytest

from ddplog.errors import ConfigError
from ddplog.worker.contexts import Context
from ddplog.worker.identity import Identity, detect

# Recorded here: torchrun of torch 2.13, horovodrun 0.28.1 static and elastic, OpenMPI 4.1; the others are from their
# documentation or source. What no launcher's row reads is left in where it could mislead.
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "default", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "34611",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
}  # fmt: skip
HOROVOD = {
    "HOROVOD_RANK": "1", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "0", "HOROVOD_CROSS_SIZE": "2", "HOROVOD_HOSTNAME": "localhost", "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": "lo", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "34818", "NCCL_SOCKET_IFNAME": "lo",
}  # fmt: skip
ELASTIC = HOROVOD | {"HOROVOD_ELASTIC": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "2", "OMPI_APP_CTX_NUM_PROCS": "8",
    "OMPI_FIRST_RANKS": "0", "OMPI_UNIVERSE_SIZE": "8", "OMPI_MCA_orte_ess_node_rank": "2",
    "OMPI_MCA_orte_ess_num_procs": "8", "PMIX_RANK": "6", "PMIX_NAMESPACE": "24641537", "PMIX_HOSTNAME": "vm",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NNODES": "2",
    "SLURM_GTIDS": "4,5,6,7",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
LSF = {
    "JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "3", "LSB_JOBID": "12",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
RAY = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
# A PyTorchJob of 4 pods: nprocPerNode is "auto" unless the job says otherwise, and WORLD_SIZE then counts pods.
KUBEFLOW = {
    "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "digits-master-0", "MASTER_PORT": "23456", "PYTHONUNBUFFERED": "0",
    "PET_NODE_RANK": "3", "PET_NNODES": "4", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "digits-master-0",
    "PET_MASTER_PORT": "23456", "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}  # fmt: skip
KUBEFLOW_8 = KUBEFLOW | {"PET_NPROC_PER_NODE": "8", "WORLD_SIZE": "32"}
LIGHTNING = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
"""Recorded in a child of Lightning's own launcher, which gives it no RANK."""


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
        (ELASTIC, who("horovodrun", 1, 4, 1, 2, 0)),
        (DEEPSPEED, who("deepspeed", 5, 8, 1, 4, 1)),
        (OPENMPI, who("openmpi", 6, 8, 2, 4, 0)),
        (MVAPICH, who("mvapich2", 2, 4, 1, 2, 0)),
        (MPICH, who("mpich", 2, 4, 0, 2, 0)),
        (LSF, who("lsf", 3, 6, 0, 3, 0)),
        (RAY, who("ray", 2, 4, 0, 2, 1)),
        (PLAIN, who("env", 1, 2, 1, 1, 0)),
        (SLURM, who("slurm", 5, 8, 1, 4, 1)),
        (KUBEFLOW, who("pod", 3, 4, 0, 1, 3)),
        (KUBEFLOW_8, who("pod", 3, 4, 0, 1, 3)),
        ({}, who("python", 0, 1, 0, 1, 0)),
    ],
    ids=lambda value: value.launcher if isinstance(value, Identity) else "",
)
def test_each_launcher_is_known_by_its_variables(environ, expected):
    identity = detect({"PATH": "/bin", **environ})

    assert identity == expected
    assert identity.has_launcher == (expected.launcher not in ("pod", "python"))


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
        (KUBEFLOW | TORCHRUN, "torchrun"),
        (KUBEFLOW_8 | TORCHRUN, "torchrun"),
        (KUBEFLOW | OPENMPI, "openmpi"),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "2"}, "slurm"),
    ],
)
def test_the_innermost_launcher_counts(environ, launcher):
    """torchrun under srun: SLURM's rank is the node's, and every local rank would have the same."""
    assert detect(environ).launcher == launcher


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1"},
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
        (KUBEFLOW | {"RANK": "4"}, "RANK", "4"),
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
        (LIGHTNING, "RANK", ""),
    ],
)
def test_a_contradiction_names_the_variable(environ, setting, value):
    """A rank outside its world would share its journal's place, and its points, with nobody or with another."""
    with pytest.raises(ConfigError) as caught:
        detect(environ)

    assert (caught.value.setting, caught.value.value) == (setting, value)


# -- libraries that are initialised


def horovod(rank, size, **more):
    return Context(
        library="horovod", rank=rank, size=size, local_rank=rank % 2, local_size=2, node_rank=rank // 2, **more
    )


def torch(rank, size):
    return Context(library="torch.distributed", rank=rank, size=size)


@pytest.mark.parametrize(
    ("environ", "contexts", "expected"),
    [
        # after a resize of an elastic job, also to one rank: the environment is that of the start
        (ELASTIC, [horovod(2, 3)], who("horovodrun", 2, 3, 0, 2, 1)),
        (ELASTIC, [horovod(0, 1)], who("horovodrun", 0, 1, 0, 2, 0)),
        (HOROVOD, [horovod(1, 4)], who("horovodrun", 1, 4, 1, 2, 0)),
        (OPENMPI, [horovod(6, 8)], who("openmpi", 6, 8, 0, 2, 3)),
        # torch.distributed knows no local rank: the launcher does
        (TORCHRUN, [torch(3, 4)], who("torchrun", 3, 4, 1, 2, 1)),
        # nobody but the library says that there are others: torch.multiprocessing.spawn, or init_method="tcp://..."
        ({}, [torch(1, 2)], who("torch.distributed", 1, 2, 1, 1, 0)),
        # a child of Lightning's own launcher, and the process that is its parent
        (LIGHTNING, [torch(1, 2)], who("torch.distributed", 1, 2, 1, 1, 0)),
        (LIGHTNING | {"LOCAL_RANK": "0"}, [torch(0, 2)], who("python", 0, 2, 0, 1, 0)),
        (KUBEFLOW_8, [torch(25, 32)], who("torch.distributed", 25, 32, 0, 1, 3)),
        # the library that connects the processes counts, not one that is merely there
        (HOROVOD, [horovod(1, 4), torch(0, 1)], who("horovodrun", 1, 4, 1, 2, 0)),
        (TORCHRUN, [horovod(0, 1), torch(3, 4)], who("torchrun", 3, 4, 1, 2, 1)),
        # one process
        ({}, [torch(0, 1)], who("python", 0, 1, 0, 1, 0)),
        ({}, [horovod(0, 1)], who("python", 0, 1, 0, 2, 0)),
        ({}, [], who("python", 0, 1, 0, 1, 0)),
    ],
)
def test_what_an_initialised_library_says_outranks_the_environment(environ, contexts, expected):
    assert detect(environ, contexts) == expected


@pytest.mark.parametrize(
    ("environ", "contexts", "expected"),
    [
        (TORCHRUN, [horovod(0, 1)], who("torchrun", 3, 4, 1, 2, 1)),
        (OPENMPI, [horovod(0, 1)], who("openmpi", 6, 8, 2, 4, 0)),
        (HOROVOD, [torch(0, 1)], who("horovodrun", 1, 4, 1, 2, 0)),
        (HOROVOD, [horovod(0, 1)], who("horovodrun", 1, 4, 1, 2, 0)),
        (SLURM, [horovod(0, 1), torch(0, 1)], who("slurm", 5, 8, 1, 4, 1)),
    ],
)
def test_a_split_job_keeps_the_launchers_ranks(environ, contexts, expected):
    """Each process says that it is rank 0 of 1: taken at their word, all but one would be duplicates of it."""
    assert detect(environ, contexts) == expected
