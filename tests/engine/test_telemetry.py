"""What telemetry says of a seed is what an independent reading of the host finds; signals recover from bad values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from growing import HOSTS, Loop, batch, germinate, sample_loss, short
from torch import nn

from esper.blueprints import Geometry
from esper.engine.attach import attach
from esper.engine.costs import Stopwatch
from esper.engine.extra_passes import shapes_of, to_device
from esper.engine.measurements import Measured
from esper.engine.port import NullPort
from esper.engine.signals import LossSignal
from esper.grafting.drift import weight_drift
from esper.lifecycle import Stage
from esper.seeds import Recording, TelemetryConfig
from esper.telemetry_columns import COLUMNS
from esper.trainer.evaluation import untimed

S = Stage


def row(loop: Loop, site: str, seed: int) -> dict[str, float]:
    rows = [rows for _, where, rows in loop.port.rows if where == site][-1]
    return dict(zip(COLUMNS, rows[seed].tolist(), strict=True))


def test_rows_come_when_they_are_due_for_every_site():
    loop = Loop(settings={"telemetry": TelemetryConfig(every=4)}).run(13)
    assert [(tick, site) for tick, site, _ in loop.port.rows] == [(t, s) for t in (4, 8, 12) for s in ("fc1", "fc2")]
    assert all(rows.shape == (2, len(COLUMNS)) and rows.dtype == torch.float32 for _, _, rows in loop.port.rows)


def test_a_dormant_seeds_health_is_its_chunks():
    loop = Loop(settings={"telemetry": TelemetryConfig(every=3, near_zero=0.2), "per_site": 3}).run(2)
    data = batch(number=2)
    seen: list[torch.Tensor] = []
    hook = loop.model.norm.register_forward_hook(lambda m, i, o: (o.register_hook(seen.append), None)[1])  # before the ReLU
    loop.backward(data)
    hook.remove()
    activation, gradient = loop.model.fc1(data[0]).detach(), seen[0]
    loop.optimizer.step()
    loop.grow.tick(1.0)
    start, end = loop.grow.registry.sites[0].geometry.bounds(1)
    chunk, values = activation[:, start:end], row(loop, "fc1", 1)
    others = torch.cat([activation[:, :start], activation[:, end:]], 1).mean(1)
    expected = {
        "stage": 0.0, "alpha": 0.0, "age": 3.0, "generation": 0.0, "branch_rms_ratio": 0.0,
        "mean": float(chunk.mean()),
        "near_zero": float((chunk.abs() < 0.2).float().mean()),
        "correlation": float(torch.corrcoef(torch.stack([chunk.mean(1), others]))[0, 1]),
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-5), name
    assert math.isnan(values["gain"]) and math.isnan(values["grad_ratio"])
    assert values["grad_norm"] == pytest.approx(float(gradient[:, start:end].norm()), rel=1e-4)


def test_a_living_branch_tells_its_share_and_its_gradient():
    loop = Loop(settings={"telemetry": TelemetryConfig(every=1)}, commands={1: [germinate()]})
    loop.until(S.GRAFTING)
    loop.run(8)
    bank: Any = loop.grow.registry.layers[0].bank("mlp")
    data = batch(number=50)
    loop.backward(data)
    with torch.no_grad():
        blended = loop.model.fc1(data[0])
        with loop.grow.registry.without(loop.grow.registry.branches[0]):
            host = loop.model.fc1(data[0])
    mine = torch.cat([stack.grad[0].flatten() for stack in bank.stacks.values()])
    beside = torch.cat([loop.model.fc1.weight.grad.flatten(), loop.model.fc1.bias.grad])
    ratio = float((mine.square().mean() / beside.square().mean()).sqrt())
    alpha = float(loop.grow.registry.branches.alpha[0])
    loop.optimizer.step()
    loop.grow.tick(1.0)
    values = row(loop, "fc1", 0)
    assert values["grad_norm"] > 0.0, "also where an in-place activation follows what is blended"
    assert values["branch_rms_ratio"] == pytest.approx(float((blended - host)[:, :4].norm() / host[:, :4].norm()), rel=1e-4)
    assert values["grad_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert values["alpha"] == pytest.approx(alpha + 0.05) and values["stage"] == float(S.GRAFTING)
    assert row(loop, "fc1", 1)["alpha"] == 0.0


def test_new_gradients_are_measured_against_old_ones_also_where_the_host_has_no_parameters(monkeypatch: pytest.MonkeyPatch):
    """At flattened inputs against the layer that reads them, behind the last layer against the whole host."""
    layers = (nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Identity())
    monkeypatch.setitem(HOSTS, "plain", lambda: nn.Sequential(*layers))
    settings = {"telemetry": TelemetryConfig(every=1), "sites": ["0", "4"], "per_site": 1}
    loop = Loop("plain", settings=settings, commands={1: [germinate("0"), germinate("4")]})
    loop.until(S.GRAFTING)
    loop.run(8)
    loop.backward(batch(number=50))
    host = [parameter.grad for layer in (layers[1], layers[3]) for parameter in (layer.weight, layer.bias)]
    ratios = []
    for site, beside in ((0, host[:2]), (1, host)):
        bank: Any = loop.grow.registry.layers[site].bank("mlp")
        mine = torch.cat([stack.grad[0].flatten() for stack in bank.stacks.values()])
        ratios.append(float((mine.square().mean() / torch.cat([grad.flatten() for grad in beside]).square().mean()).sqrt()))
    loop.optimizer.step()
    loop.grow.tick(1.0)
    assert [row(loop, site, 0)["grad_ratio"] for site in ("0", "4")] == pytest.approx(ratios, rel=1e-4)
    assert all(math.isfinite(ratio) and ratio > 0.0 for ratio in ratios)


def test_sites_and_branches_introduce_themselves():
    loop = Loop("cnn_group", settings={"sites": ["stages.0.blocks.0"], "per_site": 1})
    (card,) = loop.grow.observer.site_cards()
    assert (card["name"], card["kind"], card["width"], card["seeds"]) == ("stages.0.blocks.0", "ConvBlock", 4, 1)
    assert set(card["blueprints"]) == {"affine", "low_rank", "mlp", "glu", "conv", "block"}
    block = sum(p.numel() for p in loop.model.stages[0].blocks[0].parameters())
    assert card["blueprints"]["block"]["parameters"] == block
    assert card["host_parameters"] == sum(p.numel() for p in loop.model.parameters())
    loop.port.script = {1: [germinate("stages.0.blocks.0", blueprint="block")]}
    loop.run(3)
    (branch,) = loop.grow.observer.branch_cards()
    assert branch["parameters"] == block and branch["path"] == [["GERMINATED", 1], ["TRAINING", 2]]


def test_a_gradient_that_never_came_is_nan():
    recording = Recording(Geometry(6, 2), 1e-3)
    recording.keep_gradient(None)
    assert bool(recording.gradient_norms().isnan().all())


def test_held_out_metrics_reach_the_strategies_turned_so_that_more_is_better():
    loop = Loop().run(1)
    loop.grow.observe({"validation/loss": 2.0}, primary="validation/loss", maximize=False)
    assert loop.grow.measurements.metric == -2.0 and loop.port.values == [(1, {"validation/loss": 2.0})]
    loop.run(1)
    assert loop.grow.measurements.metric is None, "a measurement counts once"


def test_the_loss_signal_follows_the_loss_and_recovers_from_what_is_not_finite():
    signal = LossSignal()
    assert math.isnan(signal.steadiness())
    for loss in (2.0, 2.0, 2.0):
        signal.update(loss)
    assert (signal.fast, signal.slow, signal.variance, signal.steadiness()) == (2.0, 2.0, 0.0, 1.0)
    signal.update(4.0)
    assert signal.fast == pytest.approx(2.2) and signal.slow == pytest.approx(2.04) and signal.variance == pytest.approx(0.36)
    assert signal.steadiness() == pytest.approx(1.0 - 0.16 / 2.04)
    other = LossSignal()
    other.load(signal.state())
    assert other.state() == signal.state()
    for bad in (math.inf, math.nan):
        signal.update(bad)
        assert not signal.steadiness() >= 0.0
        signal.update(3.0)
        signal.update(3.0)
        assert (signal.fast, signal.variance, signal.steadiness()) == (3.0, 0.0, 1.0)


def test_drift_is_measured_for_whom_it_is_asked_and_forgotten_after():
    loop = Loop(settings={"grafting": "drift", "lifecycle": short(grafting_max="90step")}, commands={1: [germinate()]})
    loop.until(S.GRAFTING)
    loop.run(4)
    averages = loop.grow.strategy_signals.weights.averages
    assert list(averages) == [0]
    now = [value.unsqueeze(0) for value in loop.grow.registry.layers[0].bank("mlp").values(0).values()]
    expected, _ = weight_drift(now, averages[0])
    measured = loop.grow.strategy_signals.weights.drift(loop.grow.registry, loop.grow.registry.branches.entries)
    assert measured.tolist() == pytest.approx(expected.tolist())
    loop.until(S.STABILIZATION)
    loop.run(1)
    assert not loop.grow.strategy_signals.weights.averages


def test_asking_about_one_branch_as_a_change_of_strategy_does_forgets_no_other():
    commands = {1: [germinate("fc1"), germinate("fc2")]}
    loop = Loop(settings={"grafting": "drift", "lifecycle": short(grafting_max="90step")}, commands=commands)
    loop.until(S.GRAFTING)
    loop.run(4)
    signals = loop.grow.strategy_signals
    signals.context(loop.grow.registry.in_stage(S.GRAFTING)[:1], Measured())
    assert list(signals.weights.averages) == [0, 1]


def test_drift_of_a_block_is_measured_too():
    loop = Loop("transformer", settings={"blueprint": "block", "grafting": "drift", "lifecycle": short(grafting_max="90step")})
    loop.port.script = {1: [germinate("blocks.0")]}
    loop.until(S.GRAFTING)
    loop.run(2)
    grown = loop.grow.registry.layers[0].bank("block").blocks["0"]
    assert len(loop.grow.strategy_signals.weights.averages[0]) == len(list(grown.parameters()))


def test_rows_are_written_where_the_port_wants_them_whatever_was_there():
    loop, given = Loop(settings={"telemetry": TelemetryConfig(every=2)}), []

    def slot(site: str, seeds: int) -> torch.Tensor:
        given.append(torch.full((seeds, len(COLUMNS)), 777.0))
        return given[-1]

    said: list[torch.Tensor] = []
    loop.port.slot, loop.port.telemetry = slot, lambda tick, site, rows: said.append(rows)
    loop.run(4)
    assert len(said) == 4 and all(rows is place for rows, place in zip(said, given, strict=True))
    assert not any((rows == 777.0).any() for rows in said)


def test_a_state_from_before_a_column_was_appended_is_taken_over_and_the_column_is_not_measured_yet():
    observer = Loop(settings={"telemetry": TelemetryConfig(every=1)}).run(2).grow.observer
    saved = [rows.clone() for rows in observer.state()]
    observer.load([rows[:, :-1] for rows in saved])
    for rows, before in zip(observer.health, saved, strict=True):
        assert torch.equal(rows[:, :-1].nan_to_num(), before[:, :-1].nan_to_num()) and rows[:, -1].isnan().all()


def test_nobody_needs_to_listen():
    port = NullPort()
    port.started(0, 1, [])
    port.end_tick(1)
    port.close()
    assert port.commands(1) == []
    loop = Loop(seeds=False)
    grow = attach(loop.model, loss=sample_loss, total_steps=400, sample=batch(), lifecycle=short(), per_site=2)
    loop._grow = grow
    loop.run(3)
    assert grow.tick_number == 3 and grow.registry.table.counts()["DORMANT"] == 4


def test_batches_of_any_make_are_moved_and_keyed():
    nested = {"x": torch.zeros(2, 3), "rest": [torch.zeros(4), ("word", torch.zeros(1))]}
    moved = to_device(nested, torch.device("meta"))
    assert moved["x"].device.type == "meta" and moved["rest"][1][0] == "word"
    assert shapes_of(nested) == (("x", (2, 3)), ("rest", ((4,), ((), (1,)))))
    assert shapes_of(nested) == shapes_of(moved)


def test_the_stopwatch_adds_up_by_name():
    clock = Stopwatch()
    for _ in range(2):
        with clock.timing("judge"):
            pass
    assert 0.0 <= clock.seconds["judge"] <= clock.total
    assert untimed([(1, "cost/judge_seconds", 1.0)]) == []


def test_age_is_the_ticks_in_the_stage_of_resting_seeds_too():
    """At every tick of a run in which seeds are culled, rest, and become fossils; the last rows as a command's predicate sees them."""
    loop = Loop(settings={"telemetry": TelemetryConfig(every=1), "lifecycle": short(fade="2step")}, commands={1: [germinate()]})
    loop.until(S.GRAFTING)
    loop.port.script |= {loop.grow.tick_number + 1: [germinate("fc2", 1)]}
    loop.run(80)
    entered: dict[tuple[str, int], int] = {(site, seed): 0 for site in ("fc1", "fc2") for seed in range(2)}
    moved = [(said.tick, said.site, said.seed) for said in loop.port.transitions]
    seen = set()
    for tick, site, rows in loop.port.rows:
        for seed in range(2):
            entered |= {(at, number): when for when, at, number in moved if when <= tick and (at, number) == (site, seed)}
            found = dict(zip(COLUMNS, rows[seed].tolist(), strict=True))
            assert found["age"] == tick - entered[site, seed], (tick, site, seed, S(int(found["stage"])).name)
            seen.add(S(int(found["stage"])))
    assert {S.DORMANT, S.CULLED, S.FOSSILIZED} <= seen
    ages = COLUMNS.index("age")
    registry = loop.grow.registry
    assert [loop.grow.observer.row(n)[ages] for n in range(2)] == [float(loop.grow.tick_number - entered["fc1", n]) for n in range(2)]
    assert registry.table.age.max() <= loop.grow.tick_number
