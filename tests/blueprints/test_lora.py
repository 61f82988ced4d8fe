"""Ranks for linear layers: what they compute and learn, that growing them moves nothing, and the plain model they end in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, batch, build, germinate, sample_loss, short
from torch import Tensor, nn

from esper import attach, load_model
from esper.blueprints import LoRA
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.report.end_of_run import closing_lines

RANKS = LoRA(rank=2, scaling=3.0)
LAYERS = ["fc1", "fc2"]


def loop(commands: dict[int, list[Any]] | None = None, **settings: Any) -> Loop:
    given = {"blueprint": RANKS, "sites": LAYERS, "per_site": 1, "lifecycle": short(reseed=True)}
    return Loop(commands=commands or {1: [germinate("fc1"), germinate("fc2")]}, settings=given | settings)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(number=7)[0])


def test_new_ranks_move_no_output_and_no_gradient_of_the_host_by_a_bit() -> None:
    running, alone = loop(lifecycle=short(training_min="50step")), Loop(seeds=False)
    for _ in range(6):
        running.step()
        alone.step()
    assert [branch.stage for branch in running.grow.registry.branches.entries] == [Stage.TRAINING] * 2
    assert torch.equal(outputs(running.model), outputs(alone.model))


def test_outputs_and_gradients_are_those_of_float64() -> None:
    running = loop()
    branch = running.until(Stage.GRAFTING)
    running.run(2)
    registry = running.grow.registry
    bank: Any = registry.layers[0].bank("lora")
    alpha, slot = float(registry.branches.alpha[branch.id]), branch.slot
    assert 0.0 < alpha < 1.0 and bool(bank.stacks["up"][slot].any())
    registry.layers[1].groups = []  # fc1 alone, so that one hook tells all
    plain = build("mlp").double()
    plain.load_state_dict(running.host_state())
    mine = {name: stack.detach()[slot].double().requires_grad_() for name, stack in bank.stacks.items()}
    added = lambda _, inputs, output: output + alpha * 3.0 * (inputs[0] @ mine["down"]) @ mine["up"]  # noqa: E731
    plain.fc1.register_forward_hook(added)
    inputs, targets = batch(number=5)
    running.optimizer.zero_grad()
    bank.stacks.zero_grad()
    there, wanted = running.model(inputs), plain(inputs.double())
    torch.testing.assert_close(there.double(), wanted, rtol=1e-5, atol=1e-6)
    nn.functional.cross_entropy(there, targets).backward()
    nn.functional.cross_entropy(wanted, targets).backward()
    for name, value in mine.items():
        torch.testing.assert_close(bank.stacks[name].grad[slot].double(), value.grad, rtol=1e-4, atol=1e-7)
    for name, gradient in running.host_gradients().items():
        torch.testing.assert_close(gradient.double(), plain.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


def grown() -> Loop:
    """Ranks that were kept on ``fc1`` and ``fc2``, and a second generation that is blended on ``fc1``."""
    running = loop({1: [germinate("fc1"), germinate("fc2")], 40: [germinate("fc1", id="again")]}).run(75)
    assert [branch.stage for branch in running.grow.registry.branches.entries] == [Stage.FOSSILIZED, Stage.FOSSILIZED, Stage.EVALUATING]
    return running


def test_ranks_of_several_generations_end_in_the_layers_own_weight(tmp_path: Path) -> None:
    running = grown()
    plain = running.grow.export()
    assert [type(module) for module in plain.modules()] == [type(module) for module in build("mlp").modules()]
    torch.testing.assert_close(outputs(plain), outputs(running.model), rtol=1e-5, atol=1e-5)
    shift = plain.fc1.weight - running.host_state()["fc1.weight"]
    assert int(torch.linalg.matrix_rank(shift.double(), tol=1e-5)) == 4
    running.grow.save(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, build("mlp"))), outputs(plain))


def test_the_report_says_the_final_rank_of_each_layer() -> None:
    cards = grown().grow.observer.branch_cards()
    assert dict(closing_lines({"branches": cards}))["ranks"] == "fc1 4, fc2 2"
    assert "ranks" not in dict(closing_lines({"branches": [{"site": "fc1"}]}))


class Shared(nn.Module):
    """A layer whose weight is read elsewhere too, and one whose weight is parametrized and whose output a hook changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 3, bias=False)
        nn.utils.parametrizations.weight_norm(self.inner)
        self.inner.register_forward_hook(lambda module, inputs, output: 0.5 * output)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``; the embedding's weight serves a second time, transposed."""
        hidden = torch.tanh(self.inner(torch.tanh(self.embed(x))))
        return self.head(torch.tanh(nn.functional.linear(hidden, self.embed.weight)))


def test_ranks_stay_beside_a_weight_that_serves_elsewhere_or_is_parametrized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared()
    fresh = copy.deepcopy(model)
    grow = attach(model, loss=sample_loss, total_steps=90, blueprint=RANKS, sites=["embed", "inner"], judge=[batch(size=64)])
    for site in (0, 1):
        grow.registry.germinate(site, "lora", "linear")
        branch = grow.registry.branches[site]
        grow.registry.layers[site].bank("lora").stacks["up"].data.normal_()
        branch.stage, grow.registry.branches.alpha[branch.id] = Stage.FOSSILIZED, 0.5
        grow.registry.mark_changed(site)
    grow.registry.refresh()
    plain, expected = grow.export(), outputs(model)
    assert not torch.allclose(expected, outputs(fresh))
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain.embed.weight, fresh.embed.weight)
    grow.save(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, fresh)), outputs(plain))


@pytest.mark.parametrize(
    ("host", "settings", "words"),
    [
        ("mlp", {"blueprint": LoRA(rank=9)}, "a matrix of 6×8 has no 9 ranks; lower blueprint.rank"),
        ("cnn_group", {"sites": "conv_out"}, "lora adds ranks to linear layers"),
        ("mlp", {"lifecycle": short(objective="functional_gradient")}, "blueprint=lora learns by lifecycle.objective=shadow alone"),
    ],
)
def test_what_cannot_be_is_refused_in_words(host: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Loop(host, settings={"blueprint": RANKS, "sites": "fc1"} | settings)


def test_where_ranks_grow_nothing_else_does_and_elsewhere_they_do_not() -> None:
    running = loop({1: [germinate("fc1")], 4: [germinate("fc2", id="other", blueprint="mlp")], 8: [germinate("fc1", seed=1, id="more")]})
    running.run(10)
    assert running.port.acks["other"] == ("applied", ""), "at a layer without ranks another kind may grow"
    assert running.port.acks["more"][0] == "refused" and "seeds 0 to 0" in running.port.acks["more"][1]
    other = Loop(commands={1: [germinate("fc1", blueprint="lora")]}).run(2)
    assert "run's own blueprint (blueprint=lora)" in other.port.acks[germinate("fc1").id][1]
    again = loop({1: [germinate("fc2", blueprint="mlp")], 3: [germinate("fc2", id="ranks")]}, lifecycle=short(reseed=True)).run(45)
    again.port.script[46] = [germinate("fc2", id="late")]
    again.run(2)
    assert "cannot both grow at 'fc2'" in again.port.acks["late"][1]


def test_a_layer_whose_input_a_hook_changes_is_refused() -> None:
    model = build("mlp")
    model.fc2.register_forward_pre_hook(lambda module, inputs: (2.0 * inputs[0],))
    with pytest.raises(UserError, match="'fc2' cannot carry seeds: a forward pre-hook changes what it reads"):
        attach(model, loss=sample_loss, total_steps=90, blueprint=RANKS, sites=["fc1", "fc2"], judge=[batch(size=64)])


def test_auto_means_every_linear_layer_but_the_last() -> None:
    assert [site.name for site in loop(sites="auto").grow.registry.sites] == ["fc1", "fc2"]
    names = [site.name for site in Loop("transformer", settings={"blueprint": RANKS, "sites": "auto"}).grow.registry.sites]
    assert names and all(name.startswith("blocks.0.") for name in names)
