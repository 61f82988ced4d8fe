"""``esper check``: tables about a run without carrying it out: its sites, its stages in steps, its cost."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fnmatch import fnmatchcase

from rich.console import Console
from rich.table import Table
from torch import nn

from esper.blueprints import Block, Blueprint
from esper.config import RootConfig
from esper.engine.extra_passes import host_parameters
from esper.feature_flags import FEATURES, environment
from esper.kernels.dispatch import unavailable_reason
from esper.lifecycle import Stage
from esper.lifecycle.duration import parse
from esper.report.number_format import count, duration, short
from esper.running.builders import build_trainer, refuse_idle
from esper.running.control_runs import controls_of
from esper.running.cost_estimate import Cost, Forward, cost_of, forward_of
from esper.seeds import Site
from esper.trainer.device import choose_device, describe, numerics
from esper.trainer.trainer import Trainer

WIDTH = 140  # a pipe has no width to ask for
COPIES = 4
"""A branch's parameters lie in memory with their gradients and two moments."""


def check(config: RootConfig) -> str:
    """The tables as text. Only a few steps are trained, to time them, on a host that is thrown away.

    Raises UserError for everything that the run itself would refuse before its first step.
    """
    device = choose_device(config.trainer)
    task = config.task.build()
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(describe(device, config.trainer), highlight=False)
    console.print(f"task: {task.description}", highlight=False, markup=False)
    with numerics(config.trainer):
        trainer = build_trainer(config, task, device)
        try:
            forward = forward_of(trainer)
            cost = cost_of(trainer)
            refuse_idle(config, task, trainer)
        finally:
            trainer.batches.close()
    console.print(_sites(config, trainer, forward))
    console.print(_flags(trainer))
    blocks = _blocks(trainer, forward)
    if blocks.row_count:
        console.print(blocks)
    console.print(_schedule(trainer))
    for label, text in [*_host(trainer, forward, cost), *_time(config, trainer, cost), *_memory(trainer, cost)]:
        console.print(f"[bold]{label:<22}[/]", end=" ")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _sites(config: RootConfig, trainer: Trainer, forward: Forward) -> Table:
    """One row a site and blueprint that fits it; a site that no blueprint fits has one row."""
    registry = trainer.grow.registry
    table = Table(title=f"Sites: {len(registry.sites)} with {registry.table.rows} seeds", title_justify="left", title_style="bold")
    for name in ("pattern", "module", "shape", "features", "seeds", "blueprint"):
        table.add_column(name, justify="right" if name in ("features", "seeds") else "left", no_wrap=name == "module", overflow="fold")
    table.add_column("parameters a branch", justify="right")
    table.add_column("MACs a sample", justify="right")
    for number, site in enumerate(registry.sites):
        shape = "×".join(str(size) for size in forward.shapes.get(site.name, ())) or "–"
        chunk = f"{site.geometry.width} in chunks of {_chunks(site)}"
        first = [_pattern(config, trainer.model, site), f"{site.name} ({type(site.module).__name__})", shape]
        first += [chunk, str(site.geometry.seeds)]
        fitting = list(_fitting(trainer, number, forward))
        for place, (name, parameters, macs) in enumerate(fitting):
            chosen = f"{name} (chosen)" if name == registry.default_blueprint else name
            cells = first if place == 0 else [""] * len(first)
            table.add_row(*cells, chosen, count(parameters), count(macs), end_section=place == len(fitting) - 1)
        if not fitting:
            table.add_row(*first, "none fits", "", "", end_section=True)
    return table


def _chunks(site: Site) -> str:
    narrowest, widest = site.geometry.width // site.geometry.seeds, site.geometry.chunk
    return str(widest) if narrowest == widest else f"{narrowest} to {widest}"


def _pattern(config: RootConfig, model: nn.Module, site: Site) -> str:
    """The pattern by which sites.match found the site, the user's or the host's own, or else a role."""
    given = list(config.sites.match)
    patterns = list(getattr(model, "growth_sites", ())) if given == ["auto"] else given
    found = [pattern for pattern in patterns if fnmatchcase(site.name, pattern)]
    if given == ["auto"]:
        return f"auto: {found[0]}" if found and found[0] != site.name else "auto"
    return found[0] if found else ", ".join(given)


def _fitting(trainer: Trainer, number: int, forward: Forward) -> Iterator[tuple[str, int, int]]:
    """(blueprint, parameters, forward MACs a sample) of a branch at the site's widest chunk, the chosen blueprint first."""
    registry = trainer.grow.registry
    site, default = registry.sites[number], registry.default_blueprint
    for name in sorted(registry.blueprints, key=lambda name: name != default):
        blueprint = registry.blueprints[name]
        if registry.misfit(registry.first_row[number], name) is not None:
            continue
        if isinstance(blueprint, Block):
            yield name, _own_parameters(site.module), forward.by_module.get(site.name, 0)
        else:
            assert isinstance(blueprint, Blueprint)
            widest = max(range(site.geometry.seeds), key=lambda seed: blueprint.parameters(site.geometry, seed))
            yield name, blueprint.parameters(site.geometry, widest), blueprint.macs(site.geometry, widest)


def _blocks(trainer: Trainer, forward: Forward) -> Table:
    """The residual blocks beside which ``blueprint=block`` would grow, where another blueprint was chosen."""
    table = Table(title="Residual blocks: sites of blueprint=block", title_justify="left", title_style="bold")
    for name in ("module", "shape", "parameters a branch", "MACs a sample"):
        table.add_column(name, justify="left" if name in ("module", "shape") else "right")
    if isinstance(trainer.grow.registry.blueprints[trainer.grow.registry.default_blueprint], Block):
        return table
    for name, module in trainer.model.named_modules():
        if name and hasattr(module, "output_layers"):
            shape = "×".join(str(size) for size in forward.shapes.get(name, ())) or "–"
            macs = forward.by_module.get(name, 0)
            table.add_row(f"{name} ({type(module).__name__})", shape, count(_own_parameters(module)), count(macs))
    return table


def _flags(trainer: Trainer) -> Table:
    """One row a feature: at which sites it is on, and where and why it is off."""
    registry = trainer.grow.registry
    table = Table(title=f"Flags at the sites of the {registry.flags.model}", title_justify="left", title_style="bold")
    for name in ("feature", "on at", "off at", "because"):
        table.add_column(name, overflow="fold")
    for feature in FEATURES:
        verdicts = {site.name: registry.flags.verdict(feature, site.name) for site in registry.sites}
        chosen = [name for name, verdict in verdicts.items() if verdict.on]
        reasons: dict[str, list[str]] = {}
        for name, verdict in verdicts.items():
            if len(chosen) < len(registry.sites) or feature in environment():
                reasons.setdefault(f"{'on' if verdict.on else 'off'}: {verdict.why}", []).append(name)
        off = [name for name in verdicts if name not in chosen]
        because = "; ".join(f"{', '.join(names)} {why}" for why, names in reasons.items())
        everywhere = "all sites" if len(chosen) == len(verdicts) else ", ".join(chosen) or "no site"
        table.add_row(feature, everywhere, ", ".join(off) or "–", because or "–")
    assert registry.kernels is not None
    if not registry.kernels.available:
        config = registry.kernels.config.name
        table.caption = f"kernel={config} takes plain torch everywhere here" + (": " + unavailable_reason() if config != "torch" else "")
        table.caption_justify = "left"
    return table


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in host_parameters(module).values())


def _schedule(trainer: Trainer) -> Table:
    """Earliest and latest step of each stage after germination, and how long it may last."""
    settings = trainer.grow.settings
    ages, per_tick = settings.ages, settings.steps_per_tick
    table = Table(title="Stages, in steps after germination", title_justify="left", title_style="bold")
    for name in ("stage", "earliest", "latest", "lasts at least", "at most"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, earliest, latest in ages.path():
        last = stage is Stage.FOSSILIZED
        lasts = ("for good", "") if last else (str(ages.minimum[stage] * per_tick), str(ages.maximum[stage] * per_tick))
        table.add_row(stage.name, str(earliest * per_tick), str(latest * per_tick), *lasts)
    shortest = ages.path()[-1][1] * per_tick
    table.caption = (
        f"The run has {trainer.total} steps: a seed must germinate by step {max(0, trainer.total - shortest)} to be kept. "
        f"Ramp {ages.ramp * per_tick}, fade {ages.fade * per_tick}, a look at the judge set every {ages.judge_every * per_tick}."
    )
    table.caption_justify = "left"
    return table


def _host(trainer: Trainer, forward: Forward, cost: Cost) -> list[tuple[str, str]]:
    run = cost.step_macs * trainer.total
    return [
        ("host", f"{count(_own_parameters(trainer.model))} parameters, {count(forward.macs)} MACs a sample (forward)"),
        ("training MACs", f"{count(cost.step_macs)} a step, {count(run)} in the run, where nothing grows"),
    ]


def _time(config: RootConfig, trainer: Trainer, cost: Cost) -> list[tuple[str, str]]:
    between = max(1, parse(config.trainer.validate_every).ticks(trainer.total, trainer.steps_per_epoch))
    looks = 2 + trainer.total // between
    one, seeds = trainer.total * cost.step_s + looks * cost.validation_s, trainer.grow.registry.table.rows
    validating = f"{looks} looks at the validation set of {_span(cost.validation_s)}"
    least, most, what = _growth(trainer, cost)
    lines = [
        ("time (estimate)", f"about {duration(one)} where nothing grows: {trainer.total} steps of {_span(cost.step_s)}, {validating}"),
        ("", f"about {duration(one + seeds * most)} where all {seeds} seeds grow and take longest, and what their branches add to a step"),
        ("", f"a seed adds {_span(least)} to {_span(most)}: {what}"),
    ]
    if controls_of(config):
        lines.append(("", f"about {duration(2 * one)} more for the two controls, unless they are kept from an earlier run"))
    return lines


def _growth(trainer: Trainer, cost: Cost) -> tuple[float, float, str]:
    """Seconds that a seed adds until it is kept, at least and at most, and the passes that they consist of."""
    settings = trainer.grow.settings
    ages, steps = settings.ages, settings.steps_per_tick
    judged = (Stage.EVALUATING, Stage.FINE_TUNING) if trainer.grow.judge is not None else ()
    spans = [(ages.maximum[stage] - ages.minimum[stage]) // ages.judge_every for stage in judged]
    shadows = [age[Stage.TRAINING] * steps for age in (ages.minimum, ages.maximum)]
    looks = [len(judged), len(judged) + sum(spans)]
    least, most = (a * cost.step_s + b * 2 * cost.judge_s for a, b in zip(shadows, looks, strict=True))
    what = f"{shadows[0]} to {shadows[1]} steps with a shadow pass, {looks[0]} to {looks[1]} looks at the judge set"
    return least, most, f"{what} of 2 × {_span(cost.judge_s)}"


def _span(seconds: float) -> str:
    """A short time with its unit."""
    if seconds < 1.0:
        return f"{short(1e3 * seconds, 3)} ms"
    return f"{short(seconds, 3)} s" if seconds < 100.0 else duration(seconds)


def _memory(trainer: Trainer, cost: Cost) -> list[tuple[str, str]]:
    registry = trainer.grow.registry
    blueprint = registry.blueprints[registry.default_blueprint]
    grown = 0
    for site in registry.sites:
        if isinstance(blueprint, Block):
            grown += _own_parameters(site.module)
        elif blueprint.misfit(site.geometry) is None:
            grown += sum(blueprint.parameters(site.geometry, seed) for seed in range(site.geometry.seeds))
    parts = ", ".join(f"{name} {_size(size)}" for name, size in cost.bytes.items())
    everything = f"every seed grown at once as {registry.default_blueprint} would add {_size(4 * COPIES * grown)}"
    return [("memory (estimate)", f"{_size(sum(cost.bytes.values()))} beside program and data: {parts}"), ("", everything)]


def _size(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"
