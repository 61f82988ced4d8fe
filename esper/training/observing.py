"""Health telemetry: setting up recordings before a forward, and turning them into rows after the tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import Block, Blueprint
from esper.lifecycle import Stage
from esper.messages import COLUMNS, Column
from esper.seeds import Branch, Garden, Recording, TelemetryConfig
from esper.seeds.layer import ATTRIBUTE
from esper.training.objectives import Objective
from esper.training.passes import host_parameters
from esper.training.signals import gradient_norms
from esper.training.snapshot import present_values

MEASURED = slice(Column.MEAN, Column.GRAD_RATIO + 1)
"""The columns that only a forward and backward can show; kept of every seed until the next telemetry. The others are known at any time."""
STATISTICS = slice(Column.MEAN, Column.CORRELATION + 1)
"""The columns of an activation's statistics, as a Recording has them."""


class Observer:
    """Reads the seeds of a garden every ``telemetry.every`` ticks; ``due`` says that the coming tick is such a one.

    ``tick`` tells which is now.
    """

    def __init__(self, garden: Garden, config: TelemetryConfig, objective: Objective, tick: Callable[[], int]) -> None:
        self.garden = garden
        self.config = config
        self.objective = objective
        self.tick = tick
        self.due = False
        self._gradient_ratio: dict[int, float] = {}
        self._gradient_norms: list[Tensor] = []
        self.health: list[Tensor] = [torch.full((s.geometry.seeds, len(COLUMNS[MEASURED])), float("nan")) for s in garden.sites]

    def prepare(self, upcoming: int) -> None:
        """Give each site the recording that its next forward should fill, if any; ``upcoming`` 0 is no tick."""
        self.due = upcoming > 0 and upcoming % self.config.every == 0
        keep: set[int] = set()
        if self.objective.keeps_activations:
            keep = {branch.site for branch in self.garden.in_stage(Stage.TRAINING)}
        for number, layer in enumerate(self.garden.layers):
            if self.due or number in keep:
                layer.recording = Recording(layer.geometry, self.config.near_zero, self.due, number in keep)
            elif layer.recording is not None:
                layer.recording = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within: forwards are not recorded."""
        before = [layer.recording for layer in self.garden.layers]
        for layer in self.garden.layers:
            layer.recording = None
        try:
            yield
        finally:
            for layer, recording in zip(self.garden.layers, before, strict=True):
                layer.recording = recording

    def note_gradients(self, scale: float) -> None:
        """Read the gradients of this step before the optimizer drops them; ``scale`` is the loss scaling to undo."""
        self._gradient_norms = [
            torch.full((site.geometry.seeds,), float("nan")) if layer.recording is None else layer.recording.gradient_norms() / scale
            for site, layer in zip(self.garden.sites, self.garden.layers, strict=True)
        ]
        self._gradient_ratio = {}
        living = self.garden.branches.living()
        beside = self._host_gradients(sorted({branch.site for branch in living}))
        for branch, (norm, count) in self.branch_gradients(living).items():
            host = beside.get(self.garden.branches[branch].site)
            if count and host is not None and math.isfinite(norm):
                self._gradient_ratio[branch] = math.sqrt((norm * norm / count) / max(host, 1e-24))

    def _host_gradients(self, sites: list[int]) -> dict[int, float]:
        """Mean square of the gradient at the host's parameters beside each site that has any; waits for the device once."""
        sums, sizes = {}, {}
        for site in sites:
            gradients = [p.grad for p in self._parameters_beside(site) if p.grad is not None]
            if gradients:  # as dot products: no square as large as the weights is made
                values = [present_values(gradient).float().reshape(-1) for gradient in gradients]
                sums[site] = torch.stack([torch.dot(value, value) for value in values]).sum()
                sizes[site] = sum(gradient.numel() for gradient in gradients)
        squares = torch.stack(list(sums.values())).tolist() if sums else []
        return {site: square / sizes[site] for site, square in zip(sums, squares, strict=True)}

    def _parameters_beside(self, number: int) -> list[torch.nn.Parameter]:
        """The host's parameters that branches at a site are measured against: those of the site's module.

        Where it has none (flattened inputs, an activation): those of the next module, in order of definition, that has some of
        its own, and of the whole host where none follows.
        """
        own = self._site_parameters(number)
        if own:
            return own
        modules = [module for name, module in self.garden.model.named_modules() if f"{ATTRIBUTE}." not in f"{name}."]
        after = modules[modules.index(self.garden.sites[number].module) + 1 :]
        following = (list(module.parameters(recurse=False)) for module in after)
        return next((some for some in following if some), list(host_parameters(self.garden.model).values()))

    def branch_gradients(self, branches: list[Branch]) -> dict[int, tuple[float, int]]:
        """By branch: (L2 norm, number of parameters) of the gradient at its parameters, from the task or its objective."""
        self.objective.merge()
        return gradient_norms(self.garden, branches)

    def rows(self, slot: Callable[[str, int], Tensor]) -> list[tuple[str, Tensor]]:
        """(site, float32 ``[seeds, len(COLUMNS)]``) of every site, from the recordings of the last step, each in its ``Port.slot``."""
        table, result = self.garden.table, []
        for number, (site, layer) in enumerate(zip(self.garden.sites, self.garden.layers, strict=True)):
            seeds, first = site.geometry.seeds, self.garden.first_row[number]
            rows = slot(site.name, seeds).fill_(float("nan"))
            span = slice(first, first + seeds)
            rows[:, Column.STAGE] = table.stage[span]
            rows[:, Column.AGE] = table.ages(span, self.tick())
            rows[:, Column.GENERATION] = table.generation[span]
            rows[:, Column.GAIN] = table.score[span]
            rows[:, Column.ALPHA] = rows[:, Column.BRANCH_RMS_RATIO] = 0.0
            recording = layer.recording
            if recording is not None and recording.statistics is not None:
                rows[:, STATISTICS] = recording.statistics.cpu()
            if self._gradient_norms:
                rows[:, Column.GRAD_NORM] = self._gradient_norms[number]
            self._fill_branches(rows, number, {} if recording is None else recording.ratios or {})
            self.health[number] = rows[:, MEASURED].clone()
            result.append((site.name, rows))
        return result

    def _fill_branches(self, rows: Tensor, number: int, ratios: dict[int, Tensor]) -> None:
        for branch in self.garden.branches.living():
            if branch.site != number or branch.aside:
                continue
            rows[branch.seed, Column.ALPHA] = self.garden.branches.alpha[branch.id]
            if branch.id in ratios:
                rows[branch.seed, Column.BRANCH_RMS_RATIO] = float(ratios[branch.id])
            rows[branch.seed, Column.GRAD_RATIO] = self._gradient_ratio.get(branch.id, float("nan"))

    def mean_squares(self) -> list[float]:
        """Mean square of every site's activation, as measured last; NaN where nothing was measured yet."""
        mean, variance = Column.MEAN - MEASURED.start, Column.VARIANCE - MEASURED.start
        return [float((rows[:, mean].square() + rows[:, variance]).mean()) for rows in self.health]

    def row(self, row: int) -> list[float]:
        """A telemetry row of a seed: what was measured last, and the rest as it is now."""
        garden, table = self.garden, self.garden.table
        measured = self.health[garden.site_of(row)][garden.seed_of(row)].tolist()
        alphas = [float(garden.branches.alpha[branch.id]) for branch in garden.branches.living() if branch.row == row and not branch.aside]
        known = [float(table.ages(slice(row, row + 1), self.tick())), float(table.generation[row]), float(table.score[row])]
        return [float(table.stage[row]), alphas[-1] if alphas else 0.0, *measured, *known]

    def site_cards(self) -> list[dict[str, Any]]:
        """What the bus is told of each site when the run starts."""
        host = sum(parameter.numel() for parameter in host_parameters(self.garden.model).values())
        return [self._card(number, host) for number in range(len(self.garden.sites))]

    def _card(self, number: int, host: int) -> dict[str, Any]:
        site = self.garden.sites[number]
        fitting: dict[str, dict[str, int]] = {}
        for name, blueprint in self.garden.blueprints.items():
            if self.garden.misfit(self.garden.first_row[number], name) is None:
                if isinstance(blueprint, Block):
                    parameters, macs = sum(p.numel() for p in self._site_parameters(number)), 0
                else:
                    assert isinstance(blueprint, Blueprint)
                    parameters, macs = blueprint.parameters(site.geometry), blueprint.macs(site.geometry)
                fitting[name] = {"parameters": parameters, "macs": macs}
        return {
            "name": site.name,
            "kind": type(site.module).__name__,
            "width": site.geometry.width,
            "seeds": site.geometry.seeds,
            "blueprint": self.garden.default_blueprint,
            "blueprints": fitting,
            "host_parameters": host,
            "telemetry_every": self.config.every,
            "growth": self.garden.flags.on("growth", site.name),
        }

    def branch_cards(self) -> list[dict[str, Any]]:
        """One dict a branch: where it is, what it is, its path, its worth."""
        cards = []
        for branch in self.garden.branches.entries:
            cards.append(
                {
                    "site": self.garden.sites[branch.site].name,
                    "seed": branch.seed,
                    "branch": branch.id,
                    "generation": branch.generation,
                    "blueprint": branch.blueprint,
                    "strategy": branch.strategy,
                    "stage": branch.stage.name,
                    "path": [[name, tick] for name, tick in branch.path],
                    "alpha": float(self.garden.branches.alpha[branch.id]),
                    "gain": branch.gain,
                    "gain_bound": branch.bound,
                    "parameters": branch.parameters,
                    "replaces": branch.replaces,
                }
            )
        return cards

    def seed_cards(self) -> list[dict[str, Any]]:
        """One dict a seed that ever moved: where it is, and its last transitions ``[tick, from, to, branch, cause]``, oldest first."""
        garden, cards = self.garden, []
        for row in sorted(garden.history.rings):
            passed = [[one.tick, one.source.name, one.target.name, one.branch, one.cause] for one in garden.history.of(row)]
            where = {"site": garden.sites[garden.site_of(row)].name, "seed": garden.seed_of(row)}
            cards.append(where | {"stage": garden.table.stage_of(row).name, "last": passed})
        return cards

    def _site_parameters(self, number: int) -> list[torch.nn.Parameter]:
        return list(host_parameters(self.garden.sites[number].module).values())
