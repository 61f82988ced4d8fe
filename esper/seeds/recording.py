"""The measurements of one forward and backward pass at a site, made only at ticks that need them."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.blueprints import Geometry
from esper.kernels import Kernels
from esper.kernels.chunk_layout import feature_owner
from esper.kernels.reference import telemetry


class Recording:
    """Statistics of a site's activation in its last forward, and the gradient that came back to it.

    With ``keep_activation`` the activation itself is kept too (the objectives that regress on it need it); a copy, because a
    module behind the site may change it in place.
    """

    def __init__(self, geometry: Geometry, near_zero: float, health: bool = True, keep_activation: bool = False) -> None:
        self.geometry = geometry
        self.near_zero = near_zero
        self.health = health
        self.keep_activation = keep_activation
        self.statistics: Tensor | None = None
        self.input: Tensor | None = None
        self.gradient: Tensor | None = None
        self.squares: Tensor | None = None
        """The mean of several ``gradient_squares``, where it has taken the place of the last one's."""
        self.ratios: dict[int, Tensor] | None = {} if health else None

    def read(self, x: Tensor, site: str = "", kernels: Kernels | None = None) -> None:
        """Read an activation ``[…, width]`` (or channels first) before the site's branches act on it."""
        with torch.no_grad():
            if self.health:
                self.statistics = self._health(x.detach(), site, kernels)
            if self.keep_activation:
                self.input = x.detach().clone()

    def _health(self, x: Tensor, site: str, kernels: Kernels | None) -> Tensor:
        seeds = self.geometry.seeds
        x = features_last(x, self.geometry)
        return telemetry(x, seeds, self.near_zero) if kernels is None else kernels.telemetry(site, x, seeds, self.near_zero)

    def keep_gradient(self, gradient: Tensor | None) -> None:
        """Backward hook at the site's output."""
        self.gradient = None if gradient is None else gradient.detach()

    def gradient_squares(self) -> Tensor:
        """Sum of squares of the gradient at every feature, float32 ``[width]`` where the model is; NaN where no gradient came back."""
        if self.squares is not None:
            return self.squares
        if self.gradient is None:
            device = None if self.statistics is None else self.statistics.device
            return torch.full((self.geometry.width,), float("nan"), device=device)
        gradient = features_last(self.gradient, self.geometry).float()
        return gradient.square().sum(tuple(range(gradient.dim() - 1)))

    def gradient_norms(self, squares: Tensor | None = None) -> Tensor:
        """L2 norm of the gradient in every chunk, float32 ``[seeds]`` on the CPU, from ``gradient_squares``."""
        squares = (self.gradient_squares() if squares is None else squares).cpu()
        owner = feature_owner(self.geometry.width, self.geometry.seeds)
        return torch.zeros(self.geometry.seeds).index_add_(0, owner, squares).sqrt()


def features_last(x: Tensor, geometry: Geometry) -> Tensor:
    """A view ``[…, width]`` of an activation."""
    return x if geometry.dim == -1 else x.movedim(geometry.dim, -1)
