"""Any sequence of commands, ticks and broken signals leaves the table of seeds and branches in order."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from growing import Loop, batch, germinate, short
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esper.blueprints import BlockBank
from esper.engine.judging.judge import Gain
from esper.grafting import STRATEGY_NAMES
from esper.lifecycle import Stage
from esper.lifecycle.history import LENGTH
from esper.lifecycle.transitions import BLENDED, EXITS
from esper.messages import (
    ApplyTogether,
    Cancel,
    ChangeStrategy,
    EmergencyStop,
    Germinate,
    PauseGrafting,
    ReplaceBranch,
    ResumeGrafting,
    Selector,
    SetStage,
)
from tests.examples import examples

S = Stage
SITES = ("fc1", "fc2", "fc*", "nowhere")
SEEDS = st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=1, max_size=2))
SELECTORS = st.builds(
    lambda site, seeds, stage: Selector(site=site, seeds=seeds, stage=stage),
    st.sampled_from(SITES),
    SEEDS,
    st.sampled_from((None, 0, 2, 3)),
)
BLUEPRINTS = ("", "mlp", "glu", "affine", "conv", "nothing")
PARTS = st.one_of(
    st.builds(
        lambda site, seed, blueprint: Germinate(id="g", site=site, seed=seed, blueprint=blueprint),
        st.sampled_from(SITES[:2]), st.integers(0, 2), st.sampled_from(BLUEPRINTS),
    ),
    st.builds(lambda select, target: SetStage(id="s", select=select, target=target), SELECTORS, st.integers(0, 11)),
    st.builds(lambda select: Cancel(id="c", select=select), SELECTORS),
    st.builds(
        lambda site, seed, start: ReplaceBranch(id="b", site=site, seed=seed, start=start),
        st.sampled_from(SITES[:2]), st.integers(0, 1), st.sampled_from(("fresh", "copy")),
    ),
    st.builds(lambda select: PauseGrafting(id="p", select=select), SELECTORS),
    st.builds(lambda select: ResumeGrafting(id="r", select=select), SELECTORS),
    st.builds(lambda s, name: ChangeStrategy(id="x", select=s, strategy=name), SELECTORS, st.sampled_from((*STRATEGY_NAMES, "none"))),
)  # fmt: skip
COMMANDS = st.one_of(PARTS, PARTS, st.builds(lambda parts: ApplyTogether(id="t", commands=parts), st.lists(PARTS, min_size=1, max_size=3)))


class AnyCommands(RuleBasedStateMachine):
    """The real engine on a small host; ``picture`` is the table before a command."""

    @initialize(reseed=st.booleans(), slots=st.integers(1, 3))
    def begin(self, reseed: bool, slots: int) -> None:
        lifecycle = short(
            reseed=reseed, training_slots=slots, germinated_max="6step", training_max="8step", grafting_max="30step",
            stabilization_max="6step", evaluating_max="6step", fine_tuning_max="8step",
        )  # fmt: skip
        self.loop = Loop(settings={"lifecycle": lifecycle, "per_site": 2}, total=80)
        self.loop.run(1)
        self.ages = self.loop.grow.settings.ages
        self.fossils: set[int] = set()

    @rule(command=COMMANDS)
    def command(self, command: Any) -> None:
        registry, grow = self.loop.grow.registry, self.loop.grow
        before = registry.table.state()
        branches = [(b.stage, b.alive, b.strategy, len(b.path)) for b in registry.branches.entries]
        said = len(self.loop.port.transitions)
        status, reason = grow.executor.apply(command, grow.tick_number)
        registry.refresh()
        if status == "refused":
            assert reason
            asked = ("looks", "score")  # asking the judge by command is a look, and looks are paid for
            assert all(
                torch.equal(before[k].nan_to_num(9.0), v.nan_to_num(9.0)) for k, v in registry.table.columns.items() if k not in asked
            )
            assert branches == [(b.stage, b.alive, b.strategy, len(b.path)) for b in registry.branches.entries]
            assert said == len(self.loop.port.transitions)
        else:
            assert status == "applied"

    @rule(steps=st.integers(1, 6))
    def ticks(self, steps: int) -> None:
        self.loop.run(steps)

    @rule(site=st.sampled_from(("fc1", "fc2")), seed=st.integers(0, 1))
    def grow_one(self, site: str, seed: int) -> None:
        self.loop.grow.executor.apply(germinate(site, seed), self.loop.grow.tick_number)
        self.loop.grow.registry.refresh()
        self.loop.run(8)

    @rule(steps=st.integers(1, 25))
    def long(self, steps: int) -> None:
        self.loop.run(steps)

    @rule(blueprint=st.sampled_from(BLUEPRINTS[:3]))
    def keep_one(self, blueprint: str) -> None:
        """Whatever the judge would say: a fossil is rare otherwise."""
        grow = self.loop.grow
        grow.executor.apply(germinate("fc1", 0, blueprint=blueprint), grow.tick_number)
        grow.registry.refresh()
        grow.gates.look = lambda branches, tick: [True] * len(branches)  # type: ignore[method-assign]
        self.loop.run(18)
        del grow.gates.look

    @rule(row=st.integers(0, 3), start=st.sampled_from(("fresh", "copy")), bound=st.sampled_from((-1.0, 1.0)), steps=st.integers(1, 12))
    def replace_one(self, row: int, start: str, bound: float, steps: int) -> None:
        grow = self.loop.grow
        assert grow.judge is not None
        grow.judge.exchange = lambda *_: Gain(bound, bound, 64)  # type: ignore[method-assign]
        site = grow.registry.sites[grow.registry.site_of(row)].name
        grow.executor.apply(ReplaceBranch(id="b", site=site, seed=grow.registry.seed_of(row), start=start), grow.tick_number)
        grow.registry.refresh()
        grow._prepare()
        self.loop.run(steps)

    @rule()
    def stop(self) -> None:
        assert self.loop.grow.executor.apply(EmergencyStop(id="e"), self.loop.grow.tick_number)[0] == "applied"
        self.loop.grow.registry.refresh()
        assert not self.loop.grow.replacing.trials()

    @rule(select=SELECTORS)
    def stop_some(self, select: Selector) -> None:
        registry = self.loop.grow.registry
        before = registry.table.columns["stage"].clone()
        status, reason = self.loop.grow.executor.apply(EmergencyStop(id="e", select=select), self.loop.grow.tick_number)
        registry.refresh()
        assert status == "applied" or "no site" in reason or "has seeds 0 to 1" in reason
        for row in range(4):
            named = registry.sites[registry.site_of(row)].name.startswith(select.site.rstrip("*"))
            chosen = named and (select.seeds is None or registry.seed_of(row) in select.seeds)
            chosen = chosen and (select.stage is None or int(before[row]) == select.stage)
            if status == "applied" and chosen:
                assert registry.table.stage_of(row) in (S.DORMANT, S.FOSSILIZED, S.CULLED, S.CANCELLED, S.ROLLED_BACK)
            else:
                assert int(registry.table.stage[row]) == int(before[row])

    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        living = self.loop.grow.registry.branches.living()
        if living:
            branch = data.draw(st.sampled_from(living))
            bank: Any = self.loop.grow.registry.layers[branch.site].bank(branch.blueprint)
            with torch.no_grad():
                next(iter(bank.stacks.values()))[branch.slot] = float("nan")

    @rule()
    def metric_of_nan(self) -> None:
        self.loop.backward(batch())
        self.loop.optimizer.zero_grad()
        self.loop.grow.tick(float("nan"))

    @invariant()
    def branches_are_numbered_and_owned(self) -> None:
        registry = self.loop.grow.registry
        assert [branch.id for branch in registry.branches.entries] == list(range(len(registry.branches)))
        owners = [b for b in registry.branches.living() if b.stage is not S.FOSSILIZED and not b.excluded]
        assert len({b.row for b in owners}) == len(owners), "one living owner a chunk"
        for branch in owners:
            assert int(registry.table.branch[branch.row]) == branch.id
            assert registry.table.stage_of(branch.row) is branch.stage
        for row in registry.table.rows_in(S.DORMANT):
            assert int(registry.table.branch[row]) == -1
        for branch in registry.branches.entries:
            assert branch.path[0][0] == "GERMINATED" and branch.path[-1][0] == branch.stage.name
            names = [Stage[name] for name, _ in branch.path]
            assert all(b in EXITS[a] for a, b in pairwise(names)) or branch.replaces >= 0 or self._replaced(branch.id)
        assert len({b.row for b in self.loop.grow.replacing.trials()}) == len(self.loop.grow.replacing.trials())

    def _replaced(self, branch: int) -> bool:
        return any(b.replaces == branch and S.FOSSILIZED.name in dict(b.path) for b in self.loop.grow.registry.branches.entries)

    @invariant()
    def the_last_transitions_lead_to_the_present_stage(self) -> None:
        registry = self.loop.grow.registry
        for row in range(registry.table.rows):
            ring = registry.history.of(row)
            assert len(ring) <= LENGTH and all(a.target is b.source and a.tick <= b.tick for a, b in pairwise(ring))
            assert (ring[-1].target if ring else S.DORMANT) is registry.table.stage_of(row)

    @invariant()
    def slots_used_are_living_branches(self) -> None:
        registry = self.loop.grow.registry
        for number in range(len(registry.sites)):
            for name, bank in registry.banks(number).items():
                assert not isinstance(bank, BlockBank)
                living = sorted(b.slot for b in registry.branches.living() if b.site == number and b.blueprint == name)
                assert living == [slot for slot, used in enumerate(bank.used) if used]
                free = [slot for slot, used in enumerate(bank.used) if not used]
                assert not any(bool(stack[free].any()) for stack in bank.stacks.values())

    @invariant()
    def alphas_are_in_range_and_only_where_something_is_blended(self) -> None:
        registry = self.loop.grow.registry
        assert bool(((registry.branches.alpha >= 0) & (registry.branches.alpha <= 1)).all())
        for branch in registry.branches.entries:
            if branch.stage not in (*BLENDED, S.CULLED):
                assert float(registry.branches.alpha[branch.id]) == 0.0
        for number, layer in enumerate(registry.layers):
            planned = sorted(id for group in layer.groups for id in group.branches)
            assert planned == sorted(b.id for b in registry.blended(number))

    @invariant()
    def ages_and_slots_are_kept(self) -> None:
        registry, table = self.loop.grow.registry, self.loop.grow.registry.table
        for row in range(table.rows):
            stage = table.stage_of(row)
            if stage not in (S.DORMANT, S.FOSSILIZED):
                assert int(table.age[row]) < self.ages.maximum[stage]
        assert len(table.rows_in(S.TRAINING)) <= self.loop.grow.machine.training_slots
        assert sum(table.counts().values()) == table.rows == 4
        assert not registry.released

    @invariant()
    def fossils_stay(self) -> None:
        now = {b.id for b in self.loop.grow.registry.in_stage(S.FOSSILIZED)}
        assert all(self._replaced(branch) for branch in self.fossils - now)
        self.fossils = now

    @invariant()
    def the_host_is_sound(self) -> None:
        assert all(bool(torch.isfinite(value).all()) for value in self.loop.host_state().values())


TestAnyCommands = AnyCommands.TestCase
TestAnyCommands.settings = settings(
    max_examples=examples(25), stateful_step_count=25, derandomize=True, suppress_health_check=list(HealthCheck)
)
