"""What is read from the real libraries, once they are initialised; and that nothing is imported for it."""

import json
import subprocess
import sys

import pytest
from horovod_jobs import needs_horovod
from system.jobs import Job

from ddplog.worker.contexts import Context, initialised

TORCH = """
import json, sys
from dataclasses import asdict
from ddplog.worker.contexts import initialised
assert initialised(sys.modules) == [] and "torch" not in sys.modules
import torch.distributed as dist
assert initialised(sys.modules) == []
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(json.dumps([asdict(context) for context in initialised(sys.modules)]))
dist.destroy_process_group()
assert initialised(sys.modules) == []
"""
HOROVOD = """
import json, sys
from dataclasses import asdict
from ddplog.worker.contexts import initialised
import horovod.torch as hvd
assert initialised(sys.modules) == []
hvd.init()
print(json.dumps([asdict(context) for context in initialised(sys.modules)]))
hvd.shutdown()
assert initialised(sys.modules) == []
"""


def ask(job, code):
    out, _ = job.run(sys.executable, job.script(code))
    return [Context(**found) for found in json.loads(out)]


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.close()


def test_what_is_not_imported_is_not_initialised():
    assert initialised({"json": json, "subprocess": subprocess}) == []


def test_a_horovod_that_was_built_for_another_library_says_nothing():
    """import horovod.torch goes through without its extension, and leaves a module without functions."""
    assert initialised({"horovod.torch": json}) == []


@pytest.mark.system
def test_torch_distributed_says_rank_and_size(job):
    assert ask(job, TORCH) == [Context(library="torch.distributed", rank=0, size=1)]


@needs_horovod
@pytest.mark.services
@pytest.mark.system
def test_horovod_says_where_it_is_and_whether_it_has_mpi(job):
    assert ask(job, HOROVOD) == [
        Context(library="horovod", rank=0, size=1, local_rank=0, local_size=1, node_rank=0, has_mpi=False)
    ]
