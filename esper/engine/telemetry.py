"""Health telemetry: setting up recordings before a forward, and turning them into rows after the tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import Block, Blueprint
from esper.distributed.sharding import is_shard
from esper.engine.device_readings import Readings
from esper.engine.extra_passes import host_parameters
from esper.engine.learning.branch_rows import gradient_norms
from esper.engine.learning.objectives import Objective
from esper.engine.port import Port
from esper.engine.snapshot import present_values
from esper.kernels.chunk_layout import chunk_bounds
from esper.lifecycle import Stage
from esper.lifecycle.config import OBJECTIVES
from esper.seeds import Recording, SeedRegistry, TelemetryConfig
from esper.seeds.layer import ATTRIBUTE
from esper.seeds.layer_ranks import ranks_of
from esper.telemetry_columns import COLUMNS, Column

MEASURED = slice(Column.MEAN, Column.GRAD_RATIO + 1)
"""The columns that only a forward and backward can show; kept of every seed until the next telemetry. The others are known at any time."""
STATISTICS = slice(Column.MEAN, Column.CORRELATION + 1)
"""The columns of an activation's statistics, as a Recording has them."""


class Observer:
    """Reads the seeds of a registry every ``telemetry.every`` ticks; ``due`` says that the coming tick is one of them.

    ``tick`` gives the present tick. Rows go to the port when ``readings`` bring the device's measurements.
    """

    def __init__(
        self, registry: SeedRegistry, config: TelemetryConfig, objective: Objective, readings: Readings, port: Port, tick: Callable[[], int]
    ) -> None:
        self.registry = registry
        self.config = config
        self.objective = objective
        self.readings = readings
        self.port = port
        self.tick = tick
        self.due = False
        registry.compiled.near_zero = config.near_zero
        self._gradient_ratio: dict[int, float] = {}
        self._gradient_norms: list[Tensor] = []
        self.health: list[Tensor] = [torch.full((s.geometry.seeds, len(COLUMNS[MEASURED])), float("nan")) for s in registry.sites]

    def prepare(self, upcoming: int) -> None:
        """Give each site the recording that its next forward should fill, if any; ``upcoming`` is 0 where no tick follows."""
        self.due = upcoming > 0 and upcoming % self.config.every == 0
        keep_activation: set[int] = set()
        for branch in self.registry.in_stage(Stage.TRAINING):
            if self.objective.kind_of(branch) != "shadow":
                keep_activation.add(branch.site)
        for number, layer in enumerate(self.registry.layers):
            layer.telemetry_due, layer.keeps_activation = self.due, number in keep_activation
            if self.due or number in keep_activation:
                layer.recording = Recording(layer.geometry, self.config.near_zero, self.due, number in keep_activation)
            elif layer.recording is not None:
                layer.recording = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within: forwards are not recorded."""
        before = [layer.recording for layer in self.registry.layers]
        for layer in self.registry.layers:
            layer.recording = None
        try:
            yield
        finally:
            for layer, recording in zip(self.registry.layers, before, strict=True):
                layer.recording = recording

    def note_gradients(self, scale: float) -> None:
        """Read the gradients of this step before the optimizer drops them; ``scale`` is the loss scaling to undo."""
        self._gradient_norms = [torch.full((site.geometry.seeds,), float("nan")) for site in self.registry.sites]
        self._note_chunks(scale)
        self.objective.merge()
        living = self.registry.branches.living()
        names, counts, norms = gradient_norms(self.registry, living)
        sites = sorted({branch.site for branch in living})
        beside = {site: [p.grad for p in self._parameters_beside(site) if p.grad is not None] for site in sites}
        beside = {site: gradients for site, gradients in beside.items() if gradients}
        host = [_dot(gradients) for gradients in beside.values()]  # as dot products: no square as large as the weights is made
        sizes = [sum(gradient.numel() for gradient in gradients) for gradients in beside.values()]

        def read(values: list[Tensor]) -> None:
            squares = torch.stack(values[: len(host)]).tolist() if host else []
            mean = {site: value / size for site, value, size in zip(beside, squares, sizes, strict=True)}
            self._gradient_ratio = {}
            for branches, count, found in zip(names, counts, values[len(host) :], strict=True):  # those of one bank, so of one site
                above = mean.get(self.registry.branches[branches[0]].site)
                if above is not None:
                    ratios = (found.double().square() / (count * max(above, 1e-24))).sqrt()
                    self._gradient_ratio.update(
                        (b, ratio) for b, ratio in zip(branches, ratios.tolist(), strict=True) if math.isfinite(ratio)
                    )

        self.readings.post([*host, *norms], read)

    def _note_chunks(self, scale: float) -> None:
        """The norms of the gradients at the sites' chunks, as the layers recorded them or a compiled host's graph did."""
        sources: list[tuple[int, Recording | None]] = []
        squares: list[Tensor] = []
        for number, layer in enumerate(self.registry.layers):
            site = self.registry.compiled.sites[number] if self.registry.compiled.sites else None
            if site is not None and site.squares is not None:
                sources.append((number, None))
                squares.append(site.squares)
                site.squares = None
            elif layer.recording is not None:
                sources.append((number, layer.recording))
                squares.append(layer.recording.gradient_squares())

        def read(values: list[Tensor]) -> None:
            for (number, recording), found in zip(sources, values, strict=True):
                norms = found.sqrt() if recording is None else recording.gradient_norms(found)
                self._gradient_norms[number] = norms / scale

        self.readings.post(squares, read)

    def _parameters_beside(self, number: int) -> list[torch.nn.Parameter]:
        """The host's parameters with which branches at a site are compared: those of the site's module.

        If it has none (flattened inputs, an activation), those of the next module with parameters, in order of definition; if there is
        no such module, those of the whole host.
        """
        own = self._site_parameters(number)
        if own:
            return own
        modules = [module for name, module in self.registry.model.named_modules() if f"{ATTRIBUTE}." not in f"{name}."]
        after = modules[modules.index(self.registry.sites[number].module) + 1 :]
        following = (list(module.parameters(recurse=False)) for module in after)
        return next((some for some in following if some), list(host_parameters(self.registry.model).values()))

    def publish(self, tick: int) -> None:
        """Float32 ``[seeds, len(COLUMNS)]`` of every site, from the last step, to the port once all of it has arrived."""
        pages = [self._page(number) for number in range(len(self.registry.sites))]
        measured = [self._measured(number) for number in range(len(self.registry.sites))]

        def read(values: list[Tensor]) -> None:
            left = iter(values)
            for number, (page, (tensors, fill)) in enumerate(zip(pages, measured, strict=True)):
                rows = page() if callable(page) else page
                fill(rows, [next(left) for _ in tensors])
                if self._gradient_norms:
                    rows[:, Column.GRAD_NORM] = self._gradient_norms[number]
                if shown := self._shown(number):
                    ratios = [self._gradient_ratio.get(branch, float("nan")) for branch in shown.values()]
                    rows[list(shown), Column.GRAD_RATIO] = torch.tensor(ratios)
                self.health[number] = rows[:, MEASURED].clone()
                self.port.telemetry(tick, self.registry.sites[number].name, rows)

        self.readings.post([tensor for tensors, _ in measured for tensor in tensors], read)

    def _page(self, number: int) -> Tensor | Callable[[], Tensor]:
        """A site's rows with the present values of the columns that are known without the device; the others may come later."""
        site = self.registry.sites[number]

        def known(rows: Tensor) -> Tensor:
            table, first = self.registry.table, self.registry.first_row[number]
            span = slice(first, first + site.geometry.seeds)
            rows.fill_(float("nan"))
            rows[:, Column.STAGE] = table.stage[span]
            rows[:, Column.AGE] = table.ages(span, self.tick())
            rows[:, Column.GENERATION] = table.generation[span]
            rows[:, Column.GAIN] = table.score[span]
            rows[:, Column.ALPHA] = rows[:, Column.BRANCH_RMS_RATIO] = 0.0
            if shown := self._shown(number):
                rows[list(shown), Column.ALPHA] = self.registry.branches.alpha[list(shown.values())]
            return rows

        if self.readings.late:
            return known(torch.empty(site.geometry.seeds, len(COLUMNS)))
        return lambda: known(self.port.slot(site.name, site.geometry.seeds))

    def _shown(self, number: int) -> dict[int, int]:
        """By seed, the id of its living branch at a site; branches that only learn to replace another are left out."""
        return {branch.seed: branch.id for branch in self.registry.living_at(number) if not branch.excluded}

    def _measured(self, number: int) -> tuple[list[Tensor], Callable[[Tensor, list[Tensor]], None]]:
        """The device's measurements of a site, and the function that writes them into its rows."""
        recording = self.registry.layers[number].recording
        if recording is not None and recording.statistics is not None:
            known = self.registry.branches
            alive = sorted(branch for branch in recording.ratios or () if known[branch].alive and not known[branch].excluded)
            ratios = [recording.ratios[branch] for branch in alive] if recording.ratios else []
            seeds = [self.registry.branches[branch].seed for branch in alive]

            def recorded(rows: Tensor, values: list[Tensor]) -> None:
                rows[:, STATISTICS] = values[0].cpu()
                for seed, ratio in zip(seeds, values[1:], strict=True):
                    rows[seed, Column.BRANCH_RMS_RATIO] = float(ratio)

            return [recording.statistics, *ratios], recorded
        if not self.registry.compiled.sites:
            return [], lambda rows, values: None
        site, members = self.registry.compiled.sites[number], self.registry.compiled.members(number)
        chunks = list(members)
        bounds = chunk_bounds(site.geometry.width, site.geometry.seeds)
        sizes = (bounds[1:] - bounds[:-1])[chunks]

        def in_graph(rows: Tensor, values: list[Tensor]) -> None:
            rows[:, STATISTICS], power, count = values
            if chunks:
                below = rows[chunks, Column.VARIANCE] + rows[chunks, Column.MEAN].square()
                rows[chunks, Column.BRANCH_RMS_RATIO] = (power[chunks] / (sizes * count.clamp(min=1.0)) / below.clamp(min=1e-24)).sqrt()

        return [site.health, site.power, site.rows], in_graph

    def mean_squares(self) -> list[float]:
        """Mean square of every site's activation, as measured last; NaN where nothing was measured yet."""
        mean, variance = Column.MEAN - MEASURED.start, Column.VARIANCE - MEASURED.start
        return [float((rows[:, mean].square() + rows[:, variance]).mean()) for rows in self.health]

    def state(self) -> list[Tensor]:
        """The columns measured last of every site, for a checkpoint."""
        return list(self.health)

    def load(self, state: list[Tensor]) -> None:
        """Take over a saved state; columns that were appended since stay NaN until the next telemetry."""
        for rows, saved in zip(self.health, state, strict=True):
            rows.fill_(float("nan"))
            rows[:, : saved.shape[1]] = saved

    def row(self, row: int) -> list[float]:
        """A telemetry row of a seed: the last measurements, and the present values of the rest."""
        registry, table = self.registry, self.registry.table
        measured = self.health[registry.site_of(row)][registry.seed_of(row)].tolist()
        alphas = [
            float(registry.branches.alpha[branch.id]) for branch in registry.branches.living() if branch.row == row and not branch.excluded
        ]
        known = [float(table.ages(slice(row, row + 1), self.tick())), float(table.generation[row]), float(table.score[row])]
        return [float(table.stage[row]), alphas[-1] if alphas else 0.0, *measured, *known]

    def site_cards(self) -> list[dict[str, Any]]:
        """The description of each site for the bus, when the run starts."""
        host = sum(parameter.numel() for parameter in host_parameters(self.registry.model).values())
        return [self._card(number, host) for number in range(len(self.registry.sites))]

    def _card(self, number: int, host: int) -> dict[str, Any]:
        site = self.registry.sites[number]
        fitting: dict[str, dict[str, int]] = {}
        default = self.registry.blueprints[self.registry.default_blueprint]
        for name, blueprint in self.registry.blueprints.items():
            if self.registry.misfit(self.registry.first_row[number], name) is None:
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
            "blueprint": self.registry.default_blueprint,
            "blueprints": fitting,
            "objectives": [kind for kind in OBJECTIVES if self.objective.refusal(kind, default) is None],
            "host_parameters": host,
            "telemetry_every": self.config.every,
            "growth": self.registry.flags.on("growth", site.name),
            "reseed": self.registry.reseed,
        }

    def branch_cards(self) -> list[dict[str, Any]]:
        """One dict a branch: its place, kind, path and worth."""
        cards = []
        for branch in self.registry.branches.entries:
            ranks = ranks_of(branch, self.registry) if branch.alive and self.registry.adds(branch) else 0
            cards.append(
                {
                    "site": self.registry.sites[branch.site].name,
                    "seed": branch.seed,
                    "branch": branch.id,
                    "generation": branch.generation,
                    "blueprint": branch.blueprint,
                    "strategy": branch.strategy,
                    "objective": self.objective.kind_of(branch),
                    "stage": branch.stage.name,
                    "path": [[name, tick] for name, tick in branch.path],
                    "alpha": float(self.registry.branches.alpha[branch.id]),
                    "gain": branch.gain,
                    "gain_bound": branch.bound,
                    "parameters": branch.parameters,
                    "replaces": branch.replaces,
                }
                | ({"ranks": ranks} if ranks else {})
            )
        return cards

    def seed_cards(self) -> list[dict[str, Any]]:
        """One dict a seed that ever moved: where it is, and its last transitions ``[tick, from, to, branch, cause]``, oldest first."""
        registry, cards = self.registry, []
        for row in sorted(registry.history.rings):
            passed = [[one.tick, one.source.name, one.target.name, one.branch, one.cause] for one in registry.history.of(row)]
            where = {"site": registry.sites[registry.site_of(row)].name, "seed": registry.seed_of(row)}
            cards.append(where | {"stage": registry.table.stage_of(row).name, "last": passed})
        return cards

    def _site_parameters(self, number: int) -> list[torch.nn.Parameter]:
        return list(host_parameters(self.registry.sites[number].module).values())


def _dot(gradients: list[Tensor]) -> Tensor:
    """Sum of squares over these tensors; of sharded ones over all processes' parts."""
    return torch.stack([_squares(gradient) for gradient in gradients]).sum()


def _squares(gradient: Tensor) -> Tensor:
    if is_shard(gradient):
        total: Any = gradient.float().square().sum()
        whole: Tensor = total.full_tensor()
        return whole
    flat = present_values(gradient).float().reshape(-1)
    return torch.dot(flat, flat)
