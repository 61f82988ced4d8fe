"""The shape of a site and how its features are divided among seeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """A site's activation: ``width`` features along ``dim`` (−1, or 1 for channels first) with ``spatial`` positions axes.

    ``seeds`` share the width: seed ``s`` owns ``[⌊s·width/seeds⌋, ⌊(s+1)·width/seeds⌋)``. ``positions`` is the number of
    activation rows a sample has (pixels, characters), ``residual`` says that the module maps its input to its own shape.
    """

    width: int
    seeds: int
    dim: int = -1
    spatial: int = 0
    positions: int = 1
    residual: bool = False

    def bounds(self, seed: int) -> tuple[int, int]:
        """First feature of a seed's chunk and the first beyond it; seed −1 is the whole site."""
        if seed == -1:
            return 0, self.width
        return seed * self.width // self.seeds, (seed + 1) * self.width // self.seeds

    @property
    def chunk(self) -> int:
        """The widest chunk: ``⌈width/seeds⌉``."""
        return -(-self.width // self.seeds)

    def features(self, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Feature indices ``[len(seeds), chunk]`` (int64, padded with the chunk's first) and the mask of the real ones."""
        starts = torch.tensor([self.bounds(seed)[0] for seed in seeds]).unsqueeze(1)
        ends = torch.tensor([self.bounds(seed)[1] for seed in seeds]).unsqueeze(1)
        index = starts + torch.arange(self.chunk).unsqueeze(0)
        mask = index < ends
        return torch.where(mask, index, starts), mask


@dataclass(frozen=True)
class LinearLayer(Geometry):
    """A linear layer that reads ``source`` features."""

    source: int = 0


@dataclass(frozen=True)
class BehindHidden(Geometry):
    """A layer behind a hidden layer that reads ``source`` features, with an ``activation``, and a ``bias`` or none.

    Convolutions have ``kernels``, the hidden layer's and the site's own; ``group`` is the number of channels of a normalization group
    between them, 0 where there is none.
    """

    source: int = 0
    activation: str = ""
    bias: bool = True
    kernels: tuple[tuple[int, ...], ...] = ()
    group: int = 0
