"""Attention heads for the host itself: added, learnt, exported and saved, against a host with more heads in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, batch, build, germinate, sample_loss, short
from torch import nn

from esper import load_model
from esper.blueprints import Heads
from esper.blueprints.heads import add_heads, is_attention
from esper.engine.attach import attach
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.errors import UserError
from esper.grafting.config import LinearConfig
from esper.lifecycle import Stage

SITE = "blocks.1.attention"
ONCE: dict[str, Any] = {
    "grafting": LinearConfig(ramp="0step"),
    "lifecycle": short(training_min="0step", grafting_min="60step", grafting_max="90step"),
    "learning": BranchLearning(0.01),
}


def grown(blueprint: Heads | None = None, commands: Any = None, **changes: Any) -> Loop:
    settings = ONCE | {"blueprint": blueprint or Heads(heads=3)} | changes
    return Loop("decoder", settings=settings, commands=commands or {3: [germinate(SITE)]})


def test_auto_finds_every_attention_layer() -> None:
    loop = grown()
    assert [site.name for site in loop.grow.registry.sites] == [f"blocks.{number}.attention" for number in range(3)]
    with pytest.raises(UserError, match="blueprint=heads finds no attention layer"):
        attach(build("mlp"), loss=sample_loss, total_steps=9, judge=[batch("mlp")], blueprint="heads")
    with pytest.raises(UserError, match="heads needs an attention layer with linear layers qkv and output"):
        attach(build("decoder"), loss=sample_loss, total_steps=9, judge=[batch("decoder")], blueprint="heads", sites=["blocks.*.mlp"])
    with pytest.raises(UserError, match=r"blueprint=heads learns by lifecycle\.objective=shadow alone"):
        lifecycle = short(objective="functional_gradient")
        attach(build("decoder"), loss=sample_loss, total_steps=9, judge=[batch("decoder")], blueprint="heads", lifecycle=lifecycle)


def test_new_heads_are_as_large_as_the_present_ones_and_silent_at_first() -> None:
    loop = grown().run(3)
    block: Any = loop.grow.registry.layers[1].bank("heads").blocks["0"]
    host: Any = loop.model.blocks[1].attention
    assert is_attention(block) and block.heads == 3 and block.output.in_features // 3 == host.output.in_features // host.heads == 4
    assert bool(block.qkv.weight.any()) and not block.output.weight.any() and block.output.bias is None
    assert float(block.qkv.weight.detach().abs().max()) <= 8**-0.5
    assert not block(torch.randn(2, 6, 8)).any()


def test_a_host_with_new_heads_has_the_outputs_and_gradients_of_one_that_had_them() -> None:
    loop = grown()
    loop.until(Stage.GRAFTING)
    loop.run(12)
    plain, live = loop.grow.export().double().eval(), loop.model.double().eval()
    wide: Any = plain.get_submodule(SITE)
    assert type(wide) is type(build("decoder").get_submodule(SITE)) and wide.heads == 5 and wide.output.in_features == 20
    block = loop.grow.registry.layers[1].bank("heads").blocks["0"].double()
    data = loop.batch(50)
    ours, theirs = sample_loss(live, data).mean(), sample_loss(plain, data).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    live.zero_grad()
    ours.backward()
    theirs.backward()
    mine: Any = dict(block.named_parameters())
    for name, rows in (("qkv.weight", wide.qkv.weight.grad), ("qkv.bias", wide.qkv.bias.grad)):
        expected = torch.cat([part[8:] for part in rows.chunk(3)])
        torch.testing.assert_close(mine[name].grad, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mine["output.weight"].grad, wide.output.weight.grad[:, 8:], rtol=1e-5, atol=1e-7)
    assert float(mine["output.weight"].detach().abs().max()) > 1e-3, "they have learnt"
    host: Any = live.get_submodule(SITE)
    torch.testing.assert_close(host.output.weight.grad, wide.output.weight.grad[:, :8], rtol=1e-5, atol=1e-7)


def test_heads_that_are_half_blended_are_exported_as_they_are_and_loaded_again(tmp_path: Path) -> None:
    loop = grown(grafting=LinearConfig(ramp="40step"), commands={3: [germinate(SITE), germinate("blocks.0.attention")]}).run(24)
    assert 0.0 < float(loop.grow.registry.branches.alpha[0]) < 0.7
    inputs = loop.batch(50)[0]
    expected = loop.model.eval()(inputs)
    torch.testing.assert_close(loop.grow.export().eval()(inputs), expected)
    path = loop.grow.save(tmp_path / "model")
    torch.testing.assert_close(load_model(path, build("decoder"))(inputs), expected)
    description = json.loads((path / "model.json").read_text())
    description["grown"][0][0]["heads"] = 10**9
    (path / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="would hold more than the file of weights"):
        load_model(path, build("decoder"))


class Rigid(nn.Module):
    """Attention that asks its output to be as wide as its input, whatever its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.output = 2, nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.qkv(x)[..., :6].reshape(x.shape) + x)


def test_an_attention_layer_that_bears_no_more_heads_is_refused() -> None:
    model = nn.Sequential(Rigid(), nn.Linear(6, 3))
    with pytest.raises(UserError, match="heads cannot be added at '0': with one head more, a Rigid"):
        attach(model, loss=sample_loss, total_steps=9, judge=[batch("mlp")], blueprint="heads")


def test_added_heads_of_zero_change_nothing() -> None:
    model: Any = build("decoder").double().eval()
    inputs = batch("decoder", 3)[0]
    before = model(inputs)
    add_heads(model.blocks[0].attention, 2)
    assert torch.equal(model(inputs), before) and model.blocks[0].attention.heads == 4
    assert not is_attention(nn.Linear(2, 2))


def test_an_average_of_the_weights_follows_new_heads_and_a_copy_listens_to_nothing() -> None:
    loop = grown()
    averaged = torch.optim.swa_utils.AveragedModel(loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    loop.grow.follow(averaged)
    for _ in range(12):
        loop.step()
        averaged.update_parameters(loop.model)
    inputs = loop.batch(60)[0]
    torch.testing.assert_close(averaged.module.eval()(inputs), loop.model.eval()(inputs))


def test_other_branches_do_not_grow_on_a_layer_that_gets_heads() -> None:
    commands = {
        3: [germinate(SITE)],
        4: [germinate(SITE, id="again", blueprint="mlp")],
        5: [germinate("blocks.0.attention", blueprint="mlp")],
    }
    loop = grown(commands=commands).run(6)
    assert loop.port.acks["again"][0] == "refused" and loop.port.acks["germinate-blocks.0.attention-0"] == ("applied", "")
    other = Loop("decoder", settings=ONCE | {"sites": [SITE], "per_site": 1}, commands={3: [germinate(SITE, blueprint="heads")]}).run(4)
    assert other.port.acks[f"germinate-{SITE}-0"] == ("refused", "heads grow where they are the run's own blueprint (blueprint=heads)")
