"""Sites for the kernel tests: activations, routes of mixed stages, and banks of every kind, padded as blueprints pad them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kernels.branch_kinds import KINDS, split_banks
from esper.kernels.chunk_layout import chunk_bounds, chunk_width

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """One site with everything the ops take."""

    x: Tensor
    alpha: Tensor
    route: Tensor
    kinds: str
    parameters: list[Tensor]

    def to(self, dtype: torch.dtype) -> Case:
        """Activations and parameters in another precision, α untouched."""
        return Case(self.x.to(dtype), self.alpha, self.route, self.kinds, [p.to(dtype) for p in self.parameters])


def stack_shape(name: str, capacity: int, chunk: int, hidden: int) -> tuple[int, ...]:
    """Shape of one parameter stack of a bank."""
    into, out, units = (capacity, chunk, hidden), (capacity, hidden, chunk), (capacity, hidden)
    shapes = {"w1": into, "wg": into, "wv": into, "down": into, "w2": out, "up": out, "b1": units, "bg": units, "bv": units}
    return shapes.get(name, (capacity, chunk))


def make_case(
    rows: int, width: int, seeds: int, kinds: str, hidden: int = 5, share: float = 0.7, dtype=torch.float32, draw: int = 0
) -> Case:
    """A site with ``share`` of the seeds active, spread over the banks in shuffled slots; some slots stay free."""
    g = torch.Generator().manual_seed(draw)
    names = kinds.split(",")
    bank = torch.randint(0, len(names), (seeds,), generator=g)
    bank[torch.rand(seeds, generator=g) > share] = -1
    slot, capacity = torch.zeros(seeds, dtype=torch.int64), []
    for number in range(len(names)):
        mine = (bank == number).nonzero()[:, 0]
        capacity.append(max(1, 1 << max(0, len(mine) - 1).bit_length()))
        slot[mine] = torch.randperm(capacity[-1], generator=g)[: len(mine)]
    chunk, parameters = chunk_width(width, seeds), []
    bounds = chunk_bounds(width, seeds)
    for number, name in enumerate(names):
        for part in KINDS[name].stack_names:
            shape = stack_shape(part, capacity[number], chunk, hidden)
            stack = torch.randn(shape, generator=g) / max(1, shape[1] if len(shape) == 3 else 1) ** 0.5
            for seed in (bank == number).nonzero()[:, 0].tolist():
                real = int(bounds[seed + 1] - bounds[seed])
                for axis, size in enumerate(shape[1:]):
                    if size == chunk and part not in ("b1", "bg", "bv"):
                        stack[slot[seed]].narrow(axis, real, size - real).zero_()
            # bfloat16 holds these exactly: tests compare arithmetic, not the rounding of inputs.
            parameters.append(stack.bfloat16().float().to(DEVICE))
    route = torch.stack([bank, slot, torch.randint(0, 2, (seeds,), generator=g)], 1).int()
    alpha = torch.rand(seeds, generator=g) * (torch.rand(seeds, generator=g) > 0.2)  # some branches stand at α = 0
    x = torch.randn(rows, width, generator=g) + 0.3
    return Case(x.to(dtype).to(DEVICE), alpha.to(DEVICE), route.to(DEVICE), kinds, parameters)


def error(out: Tensor, expected: Tensor) -> float:
    """Relative root mean square of the difference; infinite where anything is not finite."""
    if not torch.isfinite(out).all():
        return float("inf")
    out, expected = out.detach(), expected.detach()
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)) if out.numel() else 0.0


__all__ = ["DEVICE", "Case", "error", "make_case", "split_banks"]
