"""Real telemetry rows: what 1,000 seeds of a network trained on digits report, step by step."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

SEEDS, COLUMNS = 1000, 12
NAMES = (
    *("stage", "alpha", "mean", "variance", "near_zero", "correlation"),
    *("grad_norm", "branch_rms_ratio", "grad_ratio", "age", "generation", "gain"),
)


def training_rows(steps: int, chunk: int = 4, active: int = 100) -> np.ndarray:
    """Float32 ``[steps, 1000, 12]``: health of the chunks of one hidden layer while it trains (batch 64, AdamW).

    The first ``active`` seeds are GRAFTING: they have a branch (a low-rank map) whose size and gradient are reported.
    """
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    width = SEEDS * chunk
    host = torch.nn.ModuleList([torch.nn.Linear(64, width), torch.nn.Linear(width, 10)])
    down = torch.nn.Parameter(torch.randn(active, chunk, 1, generator=generator) * 0.5)
    up = torch.nn.Parameter(torch.zeros(active, 1, chunk))
    optimizer = torch.optim.AdamW([*host.parameters(), down, up], lr=1e-3)
    rows = np.zeros((steps, SEEDS, COLUMNS), np.float32)
    for step in range(steps):
        batch = torch.randint(len(inputs), (64,), generator=generator)
        alpha = min(1.0, step / steps)
        site = host[0](inputs[batch]).relu()
        site.retain_grad()
        chunks = site.view(-1, SEEDS, chunk)
        branch = torch.einsum("nsc,sco,sok->nsk", chunks[:, :active], down, up)
        grown = torch.cat([chunks[:, :active] + alpha * branch, chunks[:, active:]], 1)
        loss = torch.nn.functional.cross_entropy(host[1](grown.reshape(-1, width)), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        _report(rows[step], chunks.detach(), site.grad.view(-1, SEEDS, chunk), branch.detach(), up.grad, alpha, step)
        optimizer.step()
    return rows


def _report(row, chunks, gradient, branch, branch_gradient, alpha, step) -> None:
    means = chunks.mean(2)
    site = means.mean(1, keepdim=True)
    centred, others = means - means.mean(0), site - site.mean(0)
    scale = centred.norm(dim=0) * others.norm(dim=0) + 1e-12
    active = branch.shape[1]
    gradient_norm = gradient.flatten(0, 0).norm(dim=(0, 2))
    row[:, 2] = means.mean(0)
    row[:, 3] = chunks.var(dim=(0, 2))
    row[:, 4] = (chunks.abs() < 1e-3).float().mean((0, 2))
    row[:, 5] = (centred * others).sum(0) / scale
    row[:, 6] = gradient_norm
    row[:active, 0], row[:active, 1] = 3, alpha
    row[:active, 7] = branch.square().mean((0, 2)).sqrt() / (chunks[:, :active].square().mean((0, 2)).sqrt() + 1e-12)
    row[:active, 8] = branch_gradient.norm(dim=(1, 2)) / (gradient_norm[:active] + 1e-12)
    row[:active, 9] = step
