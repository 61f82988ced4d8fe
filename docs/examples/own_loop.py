"""A model that grows in a training loop of one's own: no Hydra, no bus, no MLflow."""

import torch
from torch import nn
from torch.nn import functional

from esper import attach

torch.manual_seed(0)
inputs = torch.randn(2048, 16)
targets = (inputs[:, :4].prod(1) > 0).long()  # parity of four signs
batches = [(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, 1536, 64)]
judge = [(inputs[i : i + 64], targets[i : i + 64]) for i in range(1536, 2048, 64)]

model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # one value a sample: the judge is surer


grow = attach(model, loss=loss_of, optimizer=optimizer, judge=judge, sites="mlp_hidden", total_steps=600, controller="heuristic")
for step in range(600):
    batch = batches[step % len(batches)]
    loss = loss_of(model, batch).mean()
    loss.backward()
    grow.after_backward(batch, loss.detach())
    optimizer.step()
    grow.tick(loss.detach())
    optimizer.zero_grad()
grow.close()

plain = grow.export()  # a plain nn.Module: what grew is in it, esper is not
print(f"loss {float(loss.detach()):.3f}, germinated {grow.transitions.counts['germinated']}, kept {grow.transitions.counts['fossilized']}")
