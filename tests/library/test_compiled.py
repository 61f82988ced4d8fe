"""Under ``torch.compile`` a host is compiled once asleep and once awake: no stage, α, branch or telemetry compiles it anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import Notebook, batch, build, germinate, sample_loss, short
from test_own_loop import attached, train
from torch._dynamo.testing import CompileCounterWithBackend

from esper import attach
from esper.blueprints import MLP
from esper.engine.grow import Grow
from esper.engine.port import NullPort
from esper.lifecycle import Stage


class Commands(NullPort):
    """Germinates three seeds, two of them late, on two sites."""

    def commands(self, tick: int) -> list[Any]:
        asked = {1: germinate("fc1"), 45: germinate("fc2", 1), 60: germinate("fc1", 1)}
        return [asked[tick]] if tick in asked else []


def grow(model: torch.nn.Module) -> tuple[Grow, torch.optim.Optimizer]:
    """Seeds on both hidden layers, with telemetry every ten ticks."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    given: dict[str, Any] = {"loss": sample_loss, "judge": [batch("mlp", 900, 64)], "lifecycle": short(), "per_site": 2}
    return attach(model, optimizer=optimizer, total_steps=400, sites=["fc1", "fc2"], port=Commands(), **given), optimizer


def learn(step: int, model: Any, handle: Grow, optimizer: torch.optim.Optimizer, host: str = "mlp") -> None:
    """One step of a user's loop."""
    data = batch(host, step)
    loss = sample_loss(model, data).mean()
    loss.backward()
    handle.after_backward(data, loss.detach())
    optimizer.step()
    handle.tick(loss.detach())
    optimizer.zero_grad()


@pytest.mark.slow
def test_a_seed_that_lives_through_all_stages_compiles_nothing_anew() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, twin = build("mlp"), build("mlp")
    compiled: Any = torch.compile(model, backend=counter)
    handle, optimizer = grow(model)
    other, second = grow(twin)
    frames, stages = {}, set()
    for step in range(110):
        learn(step, compiled, handle, optimizer)
        learn(step, twin, other, second)
        stages |= {entry.stage for entry in handle.registry.branches.entries}
        frames[step] = counter.frame_count
    assert {Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING} <= stages
    assert Stage.FOSSILIZED in stages and len(handle.registry.branches.entries) == 3
    assert frames[109] == frames[25] <= 5, f"{frames[109]} graphs"  # asleep and awake, telemetry due or not; in shadow
    assert handle.observer.branch_cards()[0]["path"] == other.observer.branch_cards()[0]["path"]
    for name, value in twin.state_dict().items():  # in a graph every site has at least two slots
        found = model.state_dict()[name]
        torch.testing.assert_close(found[: len(value)] if value.dim() else found, value, rtol=1e-3, atol=1e-4, msg=name)


def test_asleep_the_host_is_one_graph() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model = build("mlp")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    handle, optimizer = attached(model, sites=["fc1", "fc2"], controller=None)
    train(model, handle, optimizer, 5, compiled)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.GRAFTING])
def test_compiled_and_eager_agree_for_a_model_that_draws_dropout_in_eager(stage: Stage) -> None:
    """``backend="eager"`` keeps torch's own dropout: the shadow forward replays its masks through the compiled host."""
    torch.compiler.reset()
    results, steps = [], {Stage.TRAINING: 3, Stage.GRAFTING: 9}[stage]
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = build("dropout")
        handle, optimizer = grow(model)
        torch.manual_seed(3)
        train(model, handle, optimizer, steps, wrap(model))
        assert handle.registry.branches[0].stage is stage
        results.append(model.state_dict())
    eager, compiled = results  # in a graph every site has a bank of the blueprint
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name][: len(value)] if value.dim() else compiled[name], value, rtol=1e-5, atol=1e-7, msg=name)


def in_place(model: torch.nn.Module) -> None:
    model.compile(backend="aot_eager")


def one_by_one(model: torch.nn.Module) -> None:
    blocks: Any = model.get_submodule("blocks")
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiling", [in_place, one_by_one])
def test_a_model_that_carries_its_graphs_keeps_them_and_is_judged_without_them(compiling: Callable[[torch.nn.Module], None]) -> None:
    """Extra passes run the model itself, whose graphs know the live forward alone, and counting costs would have torch give them up."""
    torch.compiler.reset()
    plain, model = build("decoder"), build("decoder")
    compiling(model)
    ran = []
    for one in (plain, model):
        optimizer = torch.optim.AdamW(one.parameters(), 0.01)
        sites: Any = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
        script = {1: [germinate(sites[0]), germinate(sites[1])]}
        handle = attach(
            one, loss=sample_loss, optimizer=optimizer, total_steps=400, sites=sites, lifecycle=short(), port=Notebook(script),
            judge=[batch("decoder", 900, 64)], per_site=2, blueprint=MLP(receptive_field="chunk", hidden=4),
        )  # fmt: skip
        for step in range(40):
            learn(step, one, handle, optimizer, "decoder")
        ran.append(handle)
    assert len(ran[1].registry.compiled.sites) == 2, "the graph holds the sites"
    paths = [[entry.path for entry in handle.registry.branches.entries] for handle in ran]
    gains = [[gate.value for gate in handle.port.gates if gate.gate == "gain"] for handle in ran]
    assert paths[0] == paths[1] and gains[0] and gains[0] == pytest.approx(gains[1], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_step_that_was_compiled_before_anything_was_attached_feels_the_branches() -> None:
    torch.compiler.reset()
    model, data = build("mlp"), batch("mlp", 7)[0]
    step: Any = torch.compile(lambda x: model(x), backend="eager")
    step(data).sum().backward()  # compiled while nothing hangs on the model
    model.zero_grad()
    handle, optimizer = attached(model)
    train(model, handle, optimizer, 14, step)
    felt = model(data)
    assert torch.equal(step(data), felt)  # with gradients, as it was compiled
    with handle.registry.without(*handle.registry.branches.living()):
        assert not torch.equal(model(data), felt)


@pytest.mark.usefixtures("heavy_libraries")
def test_a_layer_that_is_compiled_inside_the_host_is_one_site_under_its_own_name_and_exported_plain() -> None:
    torch.compiler.reset()
    plain, model, x = build("mlp"), build("mlp"), batch("mlp", 7)[0]
    model.fc1 = torch.compile(model.fc1, backend="eager")
    model.fc1.register_forward_hook(lambda module, inputs, output: output.clamp(max=1.0))  # on the wrapper
    plain.fc1.register_forward_hook(lambda module, inputs, output: output.clamp(max=1.0))
    handle, optimizer = attached(model, sites=["fc1*"])
    assert [site.name for site in handle.registry.sites] == ["fc1"]
    train(model, handle, optimizer, 14)
    exported = handle.export()
    assert [name for name, _ in exported.named_modules() if "_orig_mod" in name or "seed_layer" in name] == []
    with torch.no_grad():
        felt = model(x)
        torch.testing.assert_close(exported(x), felt)
        with handle.registry.without(*handle.registry.branches.living()):
            assert not torch.equal(model(x), felt)
    assert [site.name for site in attached(torch.compile(plain), sites="auto")[0].registry.sites] == ["fc1", "fc2"]
