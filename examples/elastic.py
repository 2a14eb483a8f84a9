"""Train with checkpoints, so that a killed rank costs some steps and not the run: ddplog keeps one run over all restarts.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    Gloo would meet the old ranks' addresses in torchrun's own store
torchrun --nproc-per-node 4 --max-restarts 2 examples/elastic.py          torchrun starts all ranks again
ddplog run --nproc-per-node 4 --max-restarts 2 examples/elastic.py        the same, with exit codes and a summary

Kill a rank with -9 meanwhile, then look with `ddplog show`: the group's second life is the run's attempt 1. It repeats the
steps since the last checkpoint; of each step the highest attempt counts, and values of two attempts are never mixed.
Started again with the same --run-id and --checkpoint, with as many ranks as you like, the run goes on, too.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddplog

BATCH = 16


def parse():
    parser = argparse.ArgumentParser(description="Train a small classifier on made-up data, with checkpoints.")
    parser.add_argument("--steps", type=int, default=2000, help="Stop after so many optimizer steps.")
    parser.add_argument("--every", type=int, default=100, help="Save a checkpoint every so many steps.")
    parser.add_argument("--checkpoint", type=Path, default=Path("elastic.pt"), help="Where; on a disk all nodes share.")
    parser.add_argument("--run-id", help="The run to begin or to go on with.")
    parser.add_argument("--step-s", type=float, default=0.005, help="Pause per step, so that there is time to look.")
    return parser.parse_args()


def make_batch(step, rank):
    """Return noisy points around ten centres: the same for the same step and rank, also when the step is repeated."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    labels = torch.randint(10, (BATCH,), generator=generator)
    centres = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(BATCH, 16, generator=generator), labels


def load(path, model, optimizer):
    """Return the step to go on with: 0 without a checkpoint."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def save(path, model, optimizer, step):
    """Replace the checkpoint at once: whoever is killed here leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def main():
    options = parse()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = load(options.checkpoint, model, optimizer)
    model = DistributedDataParallel(model)

    run = ddplog.init(project="elastic", run_id=options.run_id, sinks=("tensorboard", "jsonl"))
    run.define_metric("samples", reduce="sum")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # may differ between the nodes of one attempt

    for step in range(first, options.steps):
        points, labels = make_batch(step, rank)
        loss = nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log({"loss": loss.detach(), "samples": BATCH, "world_size": world_size, "restarts": restarts}, step=step)
        if rank == 0 and (step + 1) % options.every == 0:
            save(options.checkpoint, model.module, optimizer, step + 1)
        time.sleep(options.step_s)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
