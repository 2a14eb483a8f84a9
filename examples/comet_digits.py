"""Train on scikit-learn's handwritten digits with DDP in the way of Comet's own examples: nothing here is ddplog's.

ddplog run --capture comet --nproc-per-node 2 examples/comet_digits.py

An Experiment on every rank, and metric names that all ranks share. With Comet itself, that is one experiment a rank, or
one in which the ranks' values collide; captured, it is one run in which each name is one series over all ranks.
"""

import argparse
import os

import comet_ml
import torch
import torch.distributed as dist
from comet_ml.integration.pytorch import log_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    return parser.parse_args()


def make_loader(first, last, batch_size):
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels[first:last] / 16, dtype=torch.float32), torch.tensor(labels[first:last]))
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, seed=0))


def main():
    args = parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)

    experiment = comet_ml.start(
        api_key=os.environ.get("COMET_API_KEY"),
        project_name="Digits with DDP",
        experiment_config=comet_ml.ExperimentConfig(name="mlp", tags=["ddp", "digits"]),
    )
    experiment.log_parameters(vars(args))
    experiment.log_other("world_size", dist.get_world_size())

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    train, test = make_loader(0, 1280, args.batch_size), make_loader(1280, 1792, args.batch_size)

    step = 0
    for epoch in range(args.epochs):
        train.sampler.set_epoch(epoch)
        with experiment.train():
            for images, labels in train:
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                step += 1
                experiment.log_metric("loss", loss.item(), step=step, epoch=epoch)
        with experiment.validate(), torch.no_grad():
            correct, total, matrix = 0, 0, torch.zeros(10, 10)
            for images, labels in test:
                predicted = model(images).argmax(1)
                correct += (predicted == labels).sum().item()
                total += len(labels)
                matrix[labels, predicted] += 1
            experiment.log_metrics({"accuracy": correct / total, "count": total}, epoch=epoch)
            experiment.log_confusion_matrix(matrix=matrix.tolist())
        experiment.log_epoch_end(epoch)

    log_model(experiment, model.module, "digits")
    experiment.end()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
