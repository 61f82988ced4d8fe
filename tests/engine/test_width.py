"""Width growth of the host itself: units found, added, started, learnt and exported, against plain torch in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import HOSTS, Loop, Notebook, batch, build, germinate, sample_loss, short
from torch import Tensor, nn

from esper import load_model
from esper.blueprints import MLP, BehindHidden, Width
from esper.engine.attach import attach
from esper.errors import UserError
from esper.grafting.config import LinearConfig
from esper.lifecycle import Stage
from esper.seeds.hidden_layers import hidden_layers
from esper.seeds.sites import find_sites
from tests.engine.widening import AT_ONCE, X, deep, grown, series


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOSTS, "deep", deep)
    monkeypatch.setitem(HOSTS, "series", series)


def test_hidden_layers_are_found_by_what_they_compute() -> None:
    model = deep().eval()
    found = hidden_layers(dict(model.named_modules()), lambda: model(X))
    assert {name: (layer.name, layer.activation) for name, layer in found.items()} == {"b": ("a", "gelu"), "c": ("b", "tanh")}
    net = build("mlp").eval()
    pairs = hidden_layers(dict(net.named_modules()), lambda: net(X))
    assert {name: (layer.name, layer.activation) for name, layer in pairs.items()} == {"fc2": ("fc1", "relu"), "head": ("fc2", "relu")}
    decoder = build("decoder").eval()
    pairs = hidden_layers(dict(decoder.named_modules()), lambda: decoder(batch("decoder")[0]))
    assert {name: layer.name for name, layer in pairs.items()} == {f"blocks.{n}.mlp.fc2": f"blocks.{n}.mlp.fc1" for n in range(3)}


def test_layers_that_share_weights_or_run_twice_are_left_alone() -> None:
    model: Any = deep().eval()
    model.extra = nn.Linear(5, 4, bias=False)
    model.extra.weight = model.b.weight
    assert not hidden_layers(dict(model.named_modules()), lambda: model(X))
    once: Any = deep().eval()
    assert not hidden_layers(dict(once.named_modules()), lambda: [once(X) for _ in range(2)])


class Reused(nn.Module):
    """The second of two hidden layers is looked at from elsewhere, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(torch.tanh(self.a(x)))
        answer = self.c(torch.tanh(hidden))
        return answer + (hidden if self.how == "skip" else hidden.mean(1, keepdim=True))


@pytest.mark.parametrize("how", ["skip", "mean"])
def test_a_hidden_layer_that_serves_elsewhere_too_is_not_widened(how: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reused(how).eval()
    x, before = torch.randn(9, 6), {name: id(parameter) for name, parameter in model.named_parameters()}
    assert list(hidden_layers(dict(model.named_modules()), lambda: model(x))) == ["b"]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert [(layer.in_features, layer.out_features) for layer in (model.a, model.b, model.c)] == [(6, 5), (5, 4), (4, 4)]


def test_auto_takes_the_layers_behind_hidden_layers() -> None:
    model = deep()
    sites = find_sites(model, ["auto"], 1, lambda: model(X), widths=True)
    assert [(site.name, site.geometry) for site in sites] == [
        ("b", BehindHidden(4, 1, source=6, activation="gelu", bias=True)),
        ("c", BehindHidden(3, 1, source=5, activation="tanh", bias=False)),
    ]
    with pytest.raises(UserError, match="blueprint=width finds no hidden layer"):
        find_sites(nn.Sequential(nn.Linear(6, 3)), ["auto"], 1, lambda: None, widths=True)


def test_a_narrow_hidden_layer_is_found_although_all_its_units_are_on_for_the_first_sample() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
    inputs, labels = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [2.0, -1.0]]), torch.tensor([0, 1, 2])
    grow = attach(net, loss=sample_loss, judge=[(inputs, labels)], total_steps=200, blueprint=Width(units=2), controller="heuristic")
    assert [site.name for site in grow.registry.sites] == ["2"]


@pytest.mark.parametrize(("host", "site"), [("deep", "b"), ("deep", "c"), ("mlp", "fc2"), ("decoder", "blocks.1.mlp.fc2")])
def test_a_widened_host_has_the_outputs_and_gradients_of_wider_layers(host: str, site: str) -> None:
    """At α = 1 the engine's forward and backward are those of the exported host, whose own layers are wider."""
    loop = grown(host, Width(units=6), site)
    loop.until(Stage.GRAFTING)
    loop.run(12)
    plain, live = loop.grow.export().double().eval(), loop.model.double().eval()
    number = loop.grow.registry.by_name[site]
    changed = loop.grow.registry.sites[number]
    wider, reader = plain.get_submodule(changed.hidden.name), plain.get_submodule(site)  # type: ignore[union-attr]
    before = build(host)
    assert wider.out_features == before.get_submodule(changed.hidden.name).out_features + 6  # type: ignore[union-attr]
    assert type(reader) is nn.Linear and reader.in_features == wider.out_features and type(plain) is type(before)
    assert float(reader.weight.detach()[:, -6:].abs().max()) > 1e-3, "the new units have learnt"
    bank = loop.grow.registry.layers[number].bank("width")
    bank.stacks.double()
    data = loop.batch(50)
    data = (data[0].double(), data[1]) if data[0].is_floating_point() else data
    ours, theirs = sample_loss(live, data).mean(), sample_loss(plain, data).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    live.zero_grad()
    ours.backward()
    theirs.backward()
    assert wider.weight.grad is not None and reader.weight.grad is not None
    torch.testing.assert_close(bank.stacks["w1"].grad[0], wider.weight.grad[-6:].t(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bank.stacks["w2"].grad[0], reader.weight.grad[:, -6:].t(), rtol=1e-5, atol=1e-7)
    assert ("b1" in bank.stacks) == (wider.bias is not None)
    old = wider.out_features - 6
    torch.testing.assert_close(live.get_submodule(changed.hidden.name).weight.grad, wider.weight.grad[:old], rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize(("host", "site", "units"), [("cnn_group", "stages.0.blocks.0.conv2", 4), ("series", "2", 3)])
def test_new_channels_have_the_outputs_and_gradients_of_wider_convolutions(host: str, site: str, units: int, tmp_path: Path) -> None:
    loop = grown(host, Width(units=units), site)
    loop.until(Stage.GRAFTING)
    loop.run(12)
    path = loop.grow.save(tmp_path / "model")
    plain, live = loop.grow.export().double().eval(), loop.model.double().eval()
    number = loop.grow.registry.by_name[site]
    hidden: Any = loop.grow.registry.sites[number].hidden
    wider, reader, before = plain.get_submodule(hidden.name), plain.get_submodule(site), build(host)
    assert (
        type(plain) is type(before) and reader.in_channels == wider.out_channels == before.get_submodule(hidden.name).out_channels + units
    )
    assert float(reader.weight.detach()[:, -units:].abs().max()) > 1e-3, "the new channels have learnt"
    bank = loop.grow.registry.layers[number].bank("width")
    bank.stacks.double()
    data = loop.batch(50)
    inputs = (data[0].double() if host == "cnn_group" else data[0].double().unsqueeze(1), data[1])
    ours, theirs = sample_loss(live, inputs).mean(), sample_loss(plain, inputs).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    live.zero_grad()
    ours.backward()
    theirs.backward()
    pairs = {"w1": wider.weight.grad[-units:], "w2": reader.weight.grad[:, -units:], "b1": wider.bias.grad[-units:]}
    if hidden.norm is not None:
        norm = plain.get_submodule(hidden.norm_name)
        assert norm.num_channels == wider.out_channels and norm.num_channels // norm.num_groups == hidden.group
        pairs |= {"norm_scale": norm.weight.grad[-units:], "norm_shift": norm.bias.grad[-units:]}
    for name, gradient in pairs.items():
        torch.testing.assert_close(bank.stacks[name].grad[0], gradient, rtol=1e-5, atol=1e-7)
    loaded = load_model(path, build(host)).double()
    torch.testing.assert_close(loaded(inputs[0]), plain(inputs[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["zero", "paired"])
def test_new_channels_are_silent_at_first(start: str) -> None:
    loop = grown("cnn_group", Width(units=4, start=start), "stages.0.blocks.0.conv2").run(3)
    bank = loop.grow.registry.layers[loop.grow.registry.by_name["stages.0.blocks.0.conv2"]].bank("width")
    x = torch.randn(3, 1, 4, 8, 8)
    delta = bank.blueprint.forward({name: stack.detach() for name, stack in bank.stacks.items()}, x)
    assert float(delta.abs().max()) < 1e-5 and bool(bank.stacks["w2"].any()) == (start == "paired")


def test_channels_that_a_norm_or_a_start_cannot_bear_are_refused() -> None:
    for blueprint, reason in [
        (Width(units=3), "normalized in groups of 2; blueprint.units must be a multiple of that"),
        (Width(units=2, start="paired"), "must be a multiple of two times that"),
        (Width(units=4, start="gradmax"), "start=gradmax is for linear layers"),
    ]:
        loop = grown("cnn_group", Width(units=12), "stages.0.blocks.0.conv2")
        loop.grow.registry.blueprints["width"] = blueprint
        loop.run(4)
        assert reason in loop.port.acks["germinate-stages.0.blocks.0.conv2-0"][1]
    with pytest.raises(UserError, match="blueprint=width finds no hidden layer"):
        model = build("cnn_batch")
        attach(model, loss=sample_loss, total_steps=9, judge=[batch("cnn_batch")], blueprint=Width())


@pytest.mark.parametrize("ramp", ["0step", "40step"])
def test_layers_widened_on_both_sides_are_exported_as_they_are(ramp: str) -> None:
    commands = {3: [germinate("b"), germinate("c")]}
    settings = AT_ONCE | {"blueprint": Width(units=4), "grafting": LinearConfig(ramp=ramp)}
    loop = Loop("deep", settings=settings, commands=commands).run(24)
    assert (float(loop.grow.registry.branches.alpha[0]) < 0.6) == (ramp != "0step")
    plain: Any = loop.grow.export().eval()
    assert (plain.a.out_features, plain.b.in_features, plain.b.out_features, plain.c.in_features) == (9, 9, 8, 8)
    x = loop.batch(60)[0]
    torch.testing.assert_close(plain(x), loop.model.eval()(x))


def test_a_saved_wide_host_is_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4)}, commands={3: [germinate("b"), germinate("c")]}).run(20)
    path, x = loop.grow.save(tmp_path / "model"), loop.batch(60)[0]
    torch.testing.assert_close(load_model(path, deep())(x), loop.model.eval()(x))
    with pytest.raises(UserError, match="does not fit this host"):
        load_model(path, build("mlp"))
    description = json.loads((path / "model.json").read_text())
    description["grown"][0][0]["units"] = 10**9
    (path / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="would hold more than the file of weights"):
        load_model(path, deep())


@pytest.mark.parametrize(("start", "preserves"), [("zero", True), ("paired", True), ("gradmax", True), ("tiny", False)])
def test_a_start_changes_the_output_or_not_as_it_says(start: str, preserves: bool) -> None:
    loop = grown("deep", Width(units=2, start=start), "b").run(3)
    state = loop.host_state()
    bare = deep().double().eval()
    bare.load_state_dict(state)
    branch = loop.grow.registry.branches[0]
    bank = loop.grow.registry.layers[0].bank("width")
    values = {name: value.double() for name, value in bank.values(branch.slot).items()}
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = bank.blueprint.forward({name: value.unsqueeze(0) for name, value in values.items()}, x.unsqueeze(0))
    assert bool(delta.abs().max() < 1e-7) == preserves
    assert bool(values["w2"].any()) == (start != "zero") and bool(values["w1"].any()) == (start != "gradmax")


def test_drawn_weights_are_as_large_as_the_layers_present_ones() -> None:
    def first(spread: str) -> Any:
        loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4, start="paired", spread=spread)})
        with torch.no_grad():
            loop.model.a.weight.mul_(7.0)
            loop.model.b.weight.mul_(0.2)
        loop.port.script = {1: [germinate("b")]}
        loop.run(1)
        return loop, loop.grow.registry.layers[0].bank("width").stacks

    loop, stacks = first("host")
    torch.testing.assert_close(stacks["w1"].std(correction=0), loop.model.a.weight.std(), rtol=0.05, atol=0.0)
    torch.testing.assert_close(stacks["w2"].std(correction=0), loop.model.b.weight.std(), rtol=0.05, atol=0.0)
    _, plain = first("fan_in")
    assert float(plain["w1"].detach().abs().max()) <= 6**-0.5 and float(plain["w2"].detach().abs().max()) <= 0.5


def test_a_layer_is_widened_or_grown_upon_not_both() -> None:
    commands = {2: [germinate("b")], 3: [germinate("b", id="again", blueprint="mlp")], 4: [germinate("c", blueprint="mlp", id="other")]}
    loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4)}, commands=commands).run(6)
    assert loop.port.acks["germinate-b-0"][0] == loop.port.acks["other"][0] == "applied"
    assert loop.port.acks["again"][0] == "refused"
    commands = {2: [germinate("c")], 3: [germinate("b", blueprint="mlp", id="hidden")]}
    loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4)}, commands=commands).run(5)
    assert loop.port.acks["hidden"] == ("refused", "'b' is being widened by what grew at 'c'")
    commands = {2: [germinate("b", blueprint="mlp")], 3: [germinate("c", id="wide")]}
    loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4)}, commands=commands).run(5)
    assert loop.port.acks["wide"] == ("refused", "branches that grew on 'b' would not fit it when it is wider")


def test_what_cannot_be_widened_is_refused_before_training() -> None:
    data: Any = [batch("mlp")]
    with pytest.raises(UserError, match="fits none of the 1 sites; at 'a': width needs a layer behind a hidden layer"):
        attach(deep(), loss=sample_loss, total_steps=9, judge=data, sites=["a"], blueprint=Width())
    with pytest.raises(UserError, match=r"learns by lifecycle\.objective=shadow alone"):
        attach(deep(), loss=sample_loss, total_steps=9, judge=data, blueprint="width", lifecycle=short(objective="reconstruction"))
    with pytest.raises(UserError, match=r"grows units in pairs, and blueprint\.units=3 is odd"):
        Width(units=3, start="paired")


def test_units_train_in_isolation_and_a_resumed_loop_goes_on_with_the_same_bits() -> None:
    lifecycle = short(training_min="6step", training_max="40step")
    settings = AT_ONCE | {"blueprint": Width(units=4, start="gradmax"), "lifecycle": lifecycle}

    def end(loop: Loop, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loop.run(steps)
        return loop.host_state(), loop.grow.export().state_dict()

    whole = end(Loop("deep", settings=settings, commands={3: [germinate("b")]}), 30)
    first = Loop("deep", settings=settings, commands={3: [germinate("b")]}).run(14)
    rng = torch.get_rng_state()
    second = Loop("deep", seeds=False)
    second.model.load_state_dict(first.host_state())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step_number = first.step_number
    second._grow = attach(
        second.model, loss=sample_loss, total_steps=400, optimizer=second.optimizer, port=Notebook(), judge=[first.batch(900, 64)],
        per_site=2, telemetry=None, state=first.grow.state(), **settings,
    )  # fmt: skip
    torch.set_rng_state(rng)
    for mine, theirs in zip(end(second, 16), whole, strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_average_of_the_weights_follows_new_units() -> None:
    loop = grown("deep", Width(units=4), "b")
    averaged = torch.optim.swa_utils.AveragedModel(loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    loop.grow.follow(averaged)
    for _ in range(12):
        loop.step()
        averaged.update_parameters(loop.model)
    x = loop.batch(60)[0]
    torch.testing.assert_close(averaged.module.eval()(x), loop.model.eval()(x))
    copy.deepcopy(loop.model)(x)


def test_mlp_branches_beside_a_host_that_could_be_widened_are_exported_as_ever() -> None:
    loop = Loop("deep", settings=AT_ONCE | {"blueprint": Width(units=4)}, commands={2: [germinate("c", blueprint="mlp")]}).run(12)
    assert isinstance(loop.grow.registry.layers[1].bank("mlp").blueprint, MLP)
    x = loop.batch(60)[0]
    torch.testing.assert_close(loop.grow.export().eval()(x), loop.model.eval()(x))
