"""The training scripts that the tests of attach() start under torchrun, by name: python attach_jobs.py NAME OUT."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import ddplog

BITS_STEPS = 50
NORM_STEPS = 4
OFFSET = 1000
"""Each variant of a job logs from a step of its own on, so that one run shows all of them."""


class Net(nn.Module):
    """Two heads, of which the second may be unused; buffers, which DDP broadcasts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])

    def forward(self, x, heads=(0, 1)):
        hidden = self.body(x)
        return sum(self.heads[i](hidden) for i in heads)


def halving_hook(state, bucket):
    """A user's hook, which does something that DDP's default does not."""
    state.append(bucket.index())
    work = dist.all_reduce(bucket.buffer().div_(2 * dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def powersgd():
    return PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=5, min_compression_rate=0.5
    ), powerSGD_hook


VARIANTS = {
    "default": {},
    "fp16_compress": {"hook": lambda: (None, fp16_compress_hook)},
    # One bucket: with several, PowerSGD starts collectives from its futures' callbacks, and over gloo in another order on
    # each rank, which hangs, attached or not (seen with torch 2.13).
    "powersgd": {"hook": powersgd, "bucket_cap_mb": 25},
    "user": {"hook": lambda: ([], halving_hook)},
    "bucket_view": {"gradient_as_bucket_view": True},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "no_sync": {},
}


def train_bits(run, name, number, *, is_attached):
    """Train 50 steps; return every gradient of every step, and the errors of the attachment."""
    options = {key: value for key, value in VARIANTS[name].items() if key != "hook"}
    torch.manual_seed(3)
    model = DistributedDataParallel(Net(), **{"bucket_cap_mb": 0.004, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attached = ddplog.attach(model, optimizer) if is_attached else None
    if "hook" in VARIANTS[name]:  # the user's own registration, after ours
        model.register_comm_hook(*VARIANTS[name]["hook"]())
    torch.manual_seed(100 + dist.get_rank())
    gradients = []
    for step in range(BITS_STEPS):
        run.set_step(number * OFFSET + step)
        optimizer.zero_grad(set_to_none=step % 7 != 3)
        heads = (0, step % 2) if name == "find_unused" else (0, 1)
        for part in range(2 if name == "no_sync" else 1):
            with model.no_sync() if name == "no_sync" and part == 0 else nullcontext():
                model(torch.randn(8, 16), heads).square().mean().backward()
        gradients += [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
    if attached is not None:
        attached.detach()
        assert not model._forward_pre_hooks
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    return gradients, attached.num_errors if attached is not None else 0


def bits(run):
    """Compare training with and without attach(), gradient by gradient."""
    found = {}
    for number, name in enumerate(VARIANTS):
        without, _ = train_bits(run, name, number, is_attached=False)
        with_it, num_errors = train_bits(run, name, number, is_attached=True)
        same = sum(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))
        found[name] = {"same": same, "gradients": len(without), "errors": num_errors}
    return found


class Small(nn.Module):
    """Sizes that two ranks cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def mesh():
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def fsdp1_hybrid(model):
    return fsdp1(model, device_mesh=mesh(), sharding_strategy=ShardingStrategy.HYBRID_SHARD, use_orig_params=True)


def fsdp2_hybrid(model):
    both = mesh()
    fully_shard(model.first, mesh=both)
    return fully_shard(model, mesh=both)


def fsdp2(model):
    fully_shard(model.first)
    return fully_shard(model)


def fsdp2_partly(model):
    fully_shard(model.first)
    return model


WRAPS = {
    "sharded": {
        "fsdp1": fsdp1,
        "fsdp1_orig": lambda model: fsdp1(model, use_orig_params=True),
        "fsdp2": fsdp2,
        "fsdp2_hybrid": fsdp2_hybrid,
        "fsdp2_partly": fsdp2_partly,
    },
    "hybrid": {"fsdp1_hybrid": fsdp1_hybrid, "fsdp2_hybrid": fsdp2_hybrid},
    "replicated": {"fsdp1_none": lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)},
}
"""How a norm is reduced holds for all of a run, so what is sharded and what is not are jobs of their own."""


def norms(run):
    """Train sharded models; return, per variant, the norms of a full model that saw every rank's batch."""
    world, rank, found = dist.get_world_size(), dist.get_rank(), {}
    for number, (name, wrap) in enumerate(WRAPS[os.environ["KIND"]].items()):
        torch.manual_seed(5)
        full, model = Small(), Small()
        model.load_state_dict(full.state_dict())
        model = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reference = torch.optim.SGD(full.parameters(), lr=0.1)
        found[name] = []
        with ddplog.attach(model, optimizer) as attached:
            for step in range(NORM_STEPS):
                run.set_step(number * OFFSET + step)
                batches = torch.randn(world, 5, 6)
                optimizer.zero_grad()
                model(batches[rank]).square().mean().backward()
                if name == "fsdp2_partly":
                    for parameter in model.second.parameters():
                        dist.all_reduce(parameter.grad.div_(world))
                optimizer.step()
                reference.zero_grad()
                full(batches.flatten(0, 1)).square().mean().backward()
                found[name].append(float(torch.cat([p.grad.flatten() for p in full.parameters()]).norm()))
                reference.step()
        assert attached.num_errors == 0, attached
    return found


class Digits(Dataset):
    """One rank is slow to read: LATE_S per batch of 8, on rank LATE."""

    def __init__(self, rank):
        self.late_s = float(os.environ["LATE_S"]) if rank == int(os.environ["LATE"]) else 0.0

    def __len__(self):
        return 50 * 8

    def __getitem__(self, i):
        if i % 8 == 0:
            time.sleep(self.late_s)
        return torch.full((16,), i / 400)


def straggler(_run):
    """Train 50 steps with one line of ours."""
    model = DistributedDataParallel(Net(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(Digits(dist.get_rank()), 8)
    ddplog.attach(model, optimizer, loader if os.environ.get("WITH_LOADER") else None)
    for batch in loader:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return {}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = ddplog.init(exit_wait_s=30)
    found = {"bits": bits, "norms": norms, "straggler": straggler}[sys.argv[1]](run)
    Path(f"{sys.argv[2]}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
