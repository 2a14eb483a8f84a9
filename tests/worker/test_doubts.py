"""Which starts are doubtful, what is said of them, and how often."""

import pytest
from worker.test_identity import (
    ELASTIC,
    HOROVOD,
    KUBEFLOW,
    KUBEFLOW_8,
    LSF,
    OPENMPI,
    PLAIN,
    SLURM,
    TORCHRUN,
    horovod,
    torch,
)

from ddplog.worker import doubts
from ddplog.worker.identity import from_environment

ARGV = ["/usr/bin/python3", "-u", "train.py", "--name", "two words"]


def find(environ, contexts=(), modules=("torch",), argv=ARGV):
    return doubts.find(environ, from_environment(environ), contexts, modules, argv)


@pytest.mark.parametrize(
    ("environ", "starter", "num", "reason"),
    [
        (TORCHRUN, "torchrun", 4, "it does not read the variables of torchrun"),
        (SLURM, "srun", 8, "it does not read the variables of srun"),
        (OPENMPI, "mpirun", 8, "this one is built without MPI"),
        (LSF, "jsrun", 6, "this one is built without MPI"),
    ],
)
def test_a_horovod_script_that_another_launcher_started_is_named_with_the_command_to_use(environ, starter, num, reason):
    doubt = find(environ, [horovod(0, 1)])

    command = f"horovodrun -np {num} python -u train.py --name 'two words'"
    assert (doubt.title, doubt.level) == ("the job is split", "error")
    assert doubt.text == (
        f"{starter} started {num} separate trainings, and no gradient is averaged. Start it with `{command}`, or with "
        f"`ddplog run -- {command}`. Horovod is alone in each of the processes (hvd.rank() is 0, hvd.size() is 1): {reason}. "
        f"ddplog keeps the ranks of {starter}, so that all of it is in this run."
    )


def test_a_horovod_that_has_mpi_is_not_said_to_be_without():
    assert "it does not read the variables of mpirun" in find(OPENMPI, [horovod(0, 1, has_mpi=True)]).text


def test_a_torch_script_that_horovodrun_started_is_named_with_the_command_to_use():
    doubt = find(HOROVOD, [torch(0, 1)])

    command = "train.py --name 'two words'"
    assert (doubt.title, doubt.level) == ("the job is split", "error")
    assert doubt.text.startswith("horovodrun started 4 separate trainings, and no gradient is averaged.")
    assert "torch.distributed has a world of 1 in each of the processes" in doubt.text
    assert f"`torchrun --nproc-per-node 4 {command}`, or with `ddplog run --nproc-per-node 4 {command}`" in doubt.text


def test_a_script_under_horovodrun_that_connects_nothing_may_be_split():
    """Typical: `if "RANK" in os.environ: init_process_group()`. A script that has not come to it yet looks the same."""
    doubt = find(HOROVOD)

    assert (doubt.title, doubt.level) == ("the job may be split", "warning")
    assert "neither imported Horovod nor initialised torch.distributed" in doubt.text
    assert "`torchrun --nproc-per-node 4 train.py --name 'two words'`" in doubt.text


@pytest.mark.parametrize(
    ("argv", "horovodrun", "torchrun"),
    [
        (["python", "-m", "pkg.train", "-x"], "python -m pkg.train -x", "-m pkg.train -x"),
        (["python"], "python ...", "..."),
        (["python", "train.py", "x" * 300], "python ...", "..."),
    ],
)
def test_the_command_to_use_is_the_one_that_was_used(argv, horovodrun, torchrun):
    assert f"`horovodrun -np 4 {horovodrun}`" in find(TORCHRUN, [horovod_alone()], argv=argv).text
    assert f"`torchrun --nproc-per-node 4 {torchrun}`" in find(HOROVOD, [torch(0, 1)], argv=argv).text


def horovod_alone():
    return horovod(0, 1)


def test_a_pods_rank_is_named_where_nobody_says_how_many_processes_a_pod_has():
    doubt = find(KUBEFLOW)

    assert (doubt.title, doubt.level) == ("RANK is the pod's", "warning")
    assert doubt.text.startswith("RANK=3 and WORLD_SIZE=4 are given without LOCAL_RANK, as a PyTorchJob gives them")
    assert "right if it is the only one of its pod" in doubt.text
    assert "LOCAL_RANK=0 says so" in doubt.text


def test_a_pods_rank_is_wrong_where_several_processes_are_to_run_in_it():
    doubt = find(KUBEFLOW_8)

    assert (doubt.title, doubt.level) == ("RANK is the pod's", "error")
    assert "PET_NPROC_PER_NODE=8 processes are to run in each, but nothing has numbered them" in doubt.text
    assert "rank 3 of 4, one process a pod" in doubt.text
    assert "torchrun" in doubt.text


@pytest.mark.parametrize(
    ("environ", "contexts", "modules"),
    [
        ({}, (), ("torch", "horovod")),
        ({}, [horovod(0, 1)], ("torch", "horovod")),
        ({}, [torch(0, 1)], ("torch",)),
        (TORCHRUN, (), ("torch",)),
        (TORCHRUN, [torch(3, 4)], ("torch",)),
        (TORCHRUN, [torch(3, 4), horovod(0, 1)], ("torch", "horovod")),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, [horovod(0, 1)], ("torch", "horovod")),
        (HOROVOD, [horovod(1, 4)], ("torch", "horovod")),
        (HOROVOD, (), ("torch", "horovod")),  # hvd.init() is still to come
        (HOROVOD, (), ()),  # no training at all
        (HOROVOD, [torch(1, 4)], ("torch",)),
        (HOROVOD | {"HOROVOD_SIZE": "1", "HOROVOD_RANK": "0"}, (), ("torch",)),
        (ELASTIC, [horovod(0, 1)], ("torch", "horovod")),  # the last one left
        (OPENMPI, [horovod(6, 8)], ("torch", "horovod")),
        (PLAIN, (), ("torch",)),
        (KUBEFLOW, [torch(3, 4)], ("torch",)),
        (KUBEFLOW_8, [torch(25, 32)], ("torch",)),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "1"}, (), ("torch",)),
        (KUBEFLOW | TORCHRUN, (), ("torch",)),
        (KUBEFLOW | {"LOCAL_RANK": "0"}, (), ("torch",)),
    ],
)
def test_what_is_in_order_is_not_mentioned(environ, contexts, modules):
    assert find(environ, contexts, modules) is None
