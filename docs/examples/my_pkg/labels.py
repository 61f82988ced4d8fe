"""Several labels a sample, most of them rare: a weighted loss, and metrics that a rare label cannot hide from."""

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset, random_split

from esper.tasks import task_of

RARITY = torch.tensor([0.5, 0.1, 0.03])  # how often each label is on


def loss(output, batch):
    weight = ((1 - RARITY) / RARITY).to(output.device)  # a positive counts as much as all negatives of its label
    return functional.binary_cross_entropy_with_logits(output, batch[1], pos_weight=weight, reduction="none").mean(1)


def all_right(output, batch):
    return ((output > 0) == (batch[1] > 0.5)).all(1).float()


def balanced(output, batch):
    """Of each sample: the mean over labels of hits, each weighted so that positives and negatives of a label count alike."""
    on, rarity = batch[1] > 0.5, RARITY.to(output.device)
    weight = torch.where(on, 0.5 / rarity, 0.5 / (1 - rarity))
    return (((output > 0) == on) * weight).mean(1)


def tags(samples=4000):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 8, generator=draws)
    scores = torch.stack([x[:, 0] * x[:, 1], x[:, 2] + x[:, 3].abs(), x[:, 4:].square().sum(1)], 1)
    bounds = torch.stack([scores[:, i].quantile(1 - float(rate)) for i, rate in enumerate(RARITY)])
    y = (scores > bounds).float()
    sets = random_split(TensorDataset(x, y), [0.7, 0.1, 0.1, 0.1], generator=draws)
    return task_of("tags", *sets, outputs=3, loss=loss, metrics={"balanced": ("max", balanced), "all_right": ("max", all_right)})
