"""Train the network of train_digits.py with Horovod, every rank logging what it sees and how long its steps take.

scripts/install_horovod.sh                                        builds Horovod for torch on the CPU, once
horovodrun -np 2 python examples/train_digits_horovod.py          nothing but ddplog.init() is needed
ddplog run -- horovodrun -np 2 python examples/train_digits_horovod.py    adds the exit status, a summary and a report
mpirun -np 2 python examples/train_digits_horovod.py              with a Horovod that is built with MPI
"""

import argparse
import time

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddplog
import ddplog.horovod

CONFIG = {"epochs": 4, "batch_size": 32, "lr": 0.05, "momentum": 0.9, "hidden": 128, "seed": 0}


def parse():
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits with Horovod.")
    parser.add_argument("--epochs", type=int, default=CONFIG["epochs"])
    parser.add_argument("--slow-rank", type=int, help="This rank takes longer over its data: a straggler to look for.")
    parser.add_argument("--slow-s", type=float, default=0.02, help="How much longer, seconds a batch.")
    return parser.parse_args()


def make_loaders(rank, size):
    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(pixels / 16, dtype=torch.float32)
    parts = train_test_split(pixels, torch.tensor(labels), test_size=0.2, random_state=CONFIG["seed"])
    for images, digits in (parts[0::2], parts[1::2]):
        data = TensorDataset(images, digits)
        yield DataLoader(data, CONFIG["batch_size"], sampler=DistributedSampler(data, size, rank, seed=CONFIG["seed"]))


def main():
    options = parse()
    hvd.init()  # before ddplog.init(), which then knows the rank from Horovod itself
    torch.manual_seed(CONFIG["seed"])
    run = ddplog.init(project="digits", config={**CONFIG, "epochs": options.epochs}, sinks=("tensorboard",))

    model = nn.Sequential(nn.Linear(64, CONFIG["hidden"]), nn.ReLU(), nn.Linear(CONFIG["hidden"], 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=CONFIG["lr"], momentum=CONFIG["momentum"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    ddplog.horovod.attach(hvd, optimizer, model=model)  # step, backward, communication and waiting time of every rank
    loss_of = nn.CrossEntropyLoss()
    train, valid = make_loaders(hvd.rank(), hvd.size())
    at_end = ddplog.horovod.MetricAverageCallback(weight=len(valid.sampler))

    step = 0
    for epoch in range(options.epochs):
        train.sampler.set_epoch(epoch)
        model.train()
        for images, digits in train:
            if hvd.rank() == options.slow_rank:
                time.sleep(options.slow_s)
            run.set_step(step)  # for attach(), too
            optimizer.zero_grad()
            output = model(images)
            loss = loss_of(output, digits)
            loss.backward()
            optimizer.step()
            acc = (output.argmax(1) == digits).float().mean()
            run.log({"loss": loss.detach(), "acc": acc}, weight=len(digits))
            step += 1
        model.eval()
        with torch.no_grad():
            right = sum((model(images).argmax(1) == digits).sum().item() for images, digits in valid)
        at_end.on_epoch_end(epoch, {"valid_acc": right / len(valid.sampler)})
    hvd.shutdown()


if __name__ == "__main__":
    main()
