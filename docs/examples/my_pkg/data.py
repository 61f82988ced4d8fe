"""Data of one's own: four data sets, a loss, metrics with a direction."""

import torch
from torch.utils.data import TensorDataset, random_split

from esper.tasks import task_of


def loss(output, batch):
    return (output.squeeze(1) - batch[1]).square()  # one value a sample


def within(output, batch):
    return ((output.squeeze(1) - batch[1]).abs() < 0.25).float()


def waves(samples=2000, noise=0.1):
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 4, generator=draws) * 6 - 3
    y = x.sin().sum(1) + noise * torch.randn(samples, generator=draws)
    sets = random_split(TensorDataset(x, y), [0.7, 0.1, 0.1, 0.1], generator=draws)
    return task_of("waves", *sets, outputs=1, loss=loss, metrics={"within": ("max", within)})
