"""Train a small network on scikit-learn's handwritten digits with DDP, every rank logging what it sees.

scripts/launch_ddp.sh                                          makes everything it needs, 2 processes
ddplog run --nproc-per-node 2 examples/train_digits.py         the same, in an environment that has ddplog
torchrun --nproc-per-node 2 examples/train_digits.py           also works: nothing but ddplog.init() is needed
python examples/train_digits.py                                and so does one process
"""

import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddplog

CONFIG = {"epochs": 8, "batch_size": 32, "lr": 0.05, "momentum": 0.9, "hidden": 128, "seed": 0}


def make_loaders(rank, world_size):
    pixels, labels = load_digits(return_X_y=True)  # 1,797 images of 8 x 8: the last batch is smaller than the others
    pixels = torch.tensor(pixels / 16, dtype=torch.float32)
    parts = train_test_split(pixels, torch.tensor(labels), test_size=0.2, random_state=CONFIG["seed"])
    for images, digits in (parts[0::2], parts[1::2]):
        data = TensorDataset(images, digits)
        sampler = DistributedSampler(data, world_size, rank, seed=CONFIG["seed"])
        yield DataLoader(data, CONFIG["batch_size"], sampler=sampler)


def main():
    use_cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(CONFIG["seed"])

    run = ddplog.init(project="digits", config=CONFIG, sinks=("tensorboard",))
    run.define_metric("lr", replicated=True)  # the same on every rank; a difference becomes an event
    run.define_metric("samples_per_s", reduce="sum")  # the job's throughput is the sum over ranks

    model = nn.Sequential(nn.Linear(64, CONFIG["hidden"]), nn.ReLU(), nn.Linear(CONFIG["hidden"], 10)).to(device)
    run.log_params({"num_weights": sum(p.numel() for p in model.parameters()), "world_size": world_size})
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if use_cuda else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=CONFIG["lr"], momentum=CONFIG["momentum"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CONFIG["epochs"])
    ddplog.attach(model, optimizer)  # step, data, forward, backward, communication, gradient norm: all by itself
    loss_of = nn.CrossEntropyLoss()
    train, valid = make_loaders(rank, world_size)

    step = 0
    for epoch in range(CONFIG["epochs"]):
        train.sampler.set_epoch(epoch)
        for images, digits in train:
            start = time.perf_counter()
            output = model(images.to(device))
            loss = loss_of(output, digits.to(device))
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            acc = (output.argmax(1).cpu() == digits).float().mean()
            values = {"loss": loss.detach(), "acc": acc, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]}
            values["samples_per_s"] = len(digits) / (time.perf_counter() - start)
            # No all_reduce, no .item(), no "if rank == 0": the weight makes the mean that of all samples.
            run.log(values, step=step, weight=len(digits))
            step += 1
        scheduler.step()
        with torch.no_grad():
            for images, digits in valid:
                output = model(images.to(device)).cpu()
                acc = (output.argmax(1) == digits).float().mean()
                # Logged once per batch: the batches of one epoch fold into one point.
                run.log({"valid/loss": loss_of(output, digits), "valid/acc": acc}, step=epoch, weight=len(digits))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
