"""The recordings of several forwards, of this process and of others, averaged into one."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.distributed import Ranks, ordered_sum
from esper.seeds import Recording, SeedRegistry

STATISTICS = 4
"""Columns of a recording's statistics, from ``mean`` to ``correlation``."""


class SharedTelemetry:
    """Keeps what each micro-batch of a step has shown, and puts the mean over those of all ranks in the place of the last one's.

    Of a compiled host, whose graph measures by itself, every rank keeps its own.
    """

    def __init__(self, registry: SeedRegistry, ranks: Ranks) -> None:
        self.registry, self.ranks = registry, ranks
        self._mine: list[Tensor] = []

    def note(self) -> None:
        """Keep the measurements of the last forward and backward, where there are any; in a loop of the user's own, the last ones."""
        if any(layer.recording is not None and layer.recording.health for layer in self.registry.layers):
            kept = self._mine if self.ranks.shards else []
            self._mine = [*kept, torch.cat([*map(self._activations, self._sites), *map(self._ratios, self._sites)])]

    def exchange(self, step: int) -> None:
        """Average over all micro-batches, in a fixed order; every rank comes here at the same steps.

        Where an activation is not finite in one of them, neither is the mean. The ratio of a branch is the mean of those that there are.
        """
        mine, self._mine = self._mine, []
        if not mine:
            return
        found = self.ranks.gather(f"telemetry of step {step}", None, torch.cat(mine))
        parts = [part for _, every in found for part in every.split(mine[0].numel())]
        sizes = [self._length(number) for number in self._sites] + [len(self._branches(number)) for number in self._sites]
        mean = list((ordered_sum(parts) / len(parts)).split(sizes))
        counts = ordered_sum([(~torch.isnan(part)).double() for part in parts])
        known = list((ordered_sum([torch.nan_to_num(part, 0.0, torch.inf) for part in parts]) / counts).split(sizes))
        for number in self._sites:
            recording = self.registry.layers[number].recording
            if recording is not None and recording.statistics is not None:
                self._put_back(number, recording, mean[number], known[len(self._sites) + number])

    @property
    def _sites(self) -> range:
        return range(len(self.registry.layers))

    def _length(self, number: int) -> int:
        geometry = self.registry.layers[number].geometry
        return geometry.seeds * STATISTICS + geometry.width

    def _branches(self, number: int) -> list[int]:
        return sorted(branch.id for branch in self.registry.living_at(number))

    def _activations(self, number: int) -> Tensor:
        recording = self.registry.layers[number].recording
        if recording is None or recording.statistics is None:
            return torch.full((self._length(number),), float("nan"), dtype=torch.float64)
        return torch.cat([recording.statistics.double().cpu().reshape(-1), recording.gradient_squares().double().cpu()])

    def _ratios(self, number: int) -> Tensor:
        recording = self.registry.layers[number].recording
        held = {} if recording is None else recording.ratios or {}
        values = [float(held[branch]) if branch in held else float("nan") for branch in self._branches(number)]
        return torch.tensor(values, dtype=torch.float64)

    def _put_back(self, number: int, recording: Recording, activations: Tensor, ratios: Tensor) -> None:
        seeds = recording.geometry.seeds
        device = torch.device("cpu") if recording.statistics is None else recording.statistics.device
        recording.statistics = activations[: seeds * STATISTICS].view(seeds, STATISTICS).to(device, torch.float32)
        recording.squares = activations[seeds * STATISTICS :].to(device, torch.float32)
        named = zip(self._branches(number), ratios.float().unbind(), strict=True)
        recording.ratios = {branch: ratio for branch, ratio in named if not bool(torch.isnan(ratio))}
