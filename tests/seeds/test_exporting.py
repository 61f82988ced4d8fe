"""Exported models: plain modules, the same outputs, linear branches folded, nothing that never grew; saved and built again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from growing import Loop, Net, Notebook, batch, build, germinate, same, sample_loss, short
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from esper import attach, load_model
from esper.blueprints import BLUEPRINTS, Affine, Blueprint, Geometry
from esper.cli.export import export_onnx, export_pt2
from esper.errors import UserError
from esper.export.saved_model import load_weights, save_model
from esper.lifecycle import Stage
from esper.seeds.exported_modules import Deepened, GrownSite, called

GROWN: dict[str, tuple[str, Any, str, type]] = {
    "mlp": ("mlp", "mlp", "fc1", GrownSite),
    "glu": ("mlp", "glu", "fc2", GrownSite),
    "affine": ("mlp", "affine", "fc1", nn.Linear),
    "affine_layer": ("mlp", Affine(receptive_field="layer"), "fc2", nn.Linear),
    "low_rank": ("mlp", "low_rank", "fc1", nn.Linear),
    "conv": ("cnn_group", "conv", "stem", GrownSite),
    "conv_mlp": ("cnn_batch", "mlp", "stages.0.blocks.0.conv1", GrownSite),
    "conv_low_rank": ("cnn_group", "low_rank", "stem", nn.Conv2d),
    "block": ("transformer", "block", "blocks.0", Deepened),
    "tokens": ("transformer", "mlp", "blocks.0.mlp.fc1", GrownSite),
}


def grown(case: str, stage: Stage = Stage.EVALUATING, **settings: Any) -> Loop:
    """A loop whose seeds 0 and, but for blocks, 1 at the case's site are blended in."""
    host, blueprint, site, _ = GROWN[case]
    seeds = [0] if blueprint == "block" else [0, 1]
    sites = [site] if blueprint == "block" else "auto"
    loop = Loop(host, {1: [germinate(site, seed) for seed in seeds]}, {"blueprint": blueprint, "sites": sites, **settings})
    loop.until(stage)
    loop.model.eval()
    return loop


@pytest.mark.parametrize("case", list(GROWN))
def test_the_exported_model_gives_the_same_outputs_from_plain_modules(case: str) -> None:
    loop = grown(case)
    plain = loop.grow.export().eval()
    x = batch(GROWN[case][0], 7)[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), loop.model(x), rtol=1e-5, atol=1e-6)
    assert type(plain.get_submodule(GROWN[case][2])) is GROWN[case][3]
    assert not any("seed_layer" in name for name, _ in plain.named_modules())
    assert not any(module._forward_hooks for module in plain.modules())
    assert all(hook is called for module in plain.modules() for hook in module._forward_pre_hooks.values())
    assert all(
        type(module).__module__.startswith(
            ("torch", "growing", "esper.hosts", "esper.seeds.exported_modules", "esper.blueprints.plain_modules")
        )
        for module in plain.modules()
    )
    if GROWN[case][3] in (nn.Linear, nn.Conv2d):  # folded: no parameter more than the host has
        assert [p.shape for p in plain.parameters()] == [p.shape for p in build(GROWN[case][0]).parameters()]


@pytest.mark.parametrize("case", ["mlp", "affine", "conv"])
def test_alpha_in_the_middle_of_the_ramp_is_exported_too(case: str) -> None:
    loop = grown(case, Stage.GRAFTING)
    loop.step()
    loop.model.eval()
    assert 0 < loop.grow.registry.branches.alpha[0] < 1
    x = batch(GROWN[case][0], 7)[0]
    with torch.no_grad():
        torch.testing.assert_close(loop.grow.export().eval()(x), loop.model(x), rtol=1e-5, atol=1e-6)


def test_seeds_that_never_grew_leave_the_host_bit_for_bit() -> None:
    loop = Loop().run(3)
    same(loop.grow.export().state_dict(), loop.host_state())
    assert repr(loop.grow.export()) == repr(build("mlp"))


def test_the_linear_layer_of_gpt2_is_folded_into_and_exporting_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=20, bos_token_id=0, eos_token_id=0)
    ).eval()
    from esper.seeds import SeedRegistry, find_sites

    ids = torch.arange(16).reshape(2, 8)
    registry = SeedRegistry(model, find_sites(model, ["mlp_hidden"], 2, lambda: model(ids)), BLUEPRINTS["affine"](), seed=0)
    branch = registry.germinate(1, "affine", "linear")
    registry.layers[0].bank("affine").stacks["scale"].data.fill_(0.3)
    branch.stage = Stage.FOSSILIZED
    registry.branches.alpha[0] = 0.5
    registry.mark_changed(0)
    registry.refresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from esper.seeds.exporting import export

    plain = export(registry)
    same(before, model.state_dict())
    assert type(plain.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    assert plain.lm_head.weight is plain.transformer.wte.weight


class Autoencoder(nn.Module):
    """Reads and writes with one weight, the second time through a function; the other layers' weights say only of what kind a tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = self.fc1(x.to(self.fc2.weight)).relu()
        return self.head(self.fc2(functional.linear(hidden, self.fc1.weight.t()).type_as(self.fc2.weight)))


def halved(module: nn.Module, inputs: object, named: object, output: torch.Tensor) -> torch.Tensor:
    """A user's forward hook that takes the named arguments too, and is not linear."""
    return (0.5 * output).clamp(-0.2, 0.2)


def trained(model: nn.Module, blueprint: str, sites: list[str], hooked: str = "") -> nn.Module:
    """The exported model after seeds grew on all sites, asserted to give what the live one gives."""
    if hooked == "before":
        model.get_submodule(sites[0]).register_forward_hook(halved, with_kwargs=True)
    port = Notebook({1: [germinate(site) for site in sites]})
    settings: dict[str, Any] = {"per_site": 1, "total_steps": 100, "lifecycle": short(), "blueprint": blueprint, "port": port}
    grow = attach(model, loss=sample_loss, judge=[batch("mlp", 900)], sites=sites, **settings)
    if hooked == "after":
        model.get_submodule(sites[0]).register_forward_hook(halved, with_kwargs=True)
    for step in range(12):
        sample_loss(model, batch("mlp", step)).mean().backward()
        grow.after_backward(batch("mlp", step))
        grow.tick(1.0)
    plain, x = grow.export(), batch("mlp", 7)[0]
    with torch.no_grad(), grow.registry.without(*grow.registry.branches.living()):
        host = model(x)
    with torch.no_grad():
        assert (model(x) - host).abs().max() > 1e-4, "what grew is felt"
        torch.testing.assert_close(plain(x), model(x))
    return plain


def test_a_weight_that_is_used_through_a_function_is_not_folded_into() -> None:
    torch.manual_seed(1)
    plain = trained(Autoencoder(), "affine", ["fc1", "fc2"])
    assert type(plain.fc1) is GrownSite and type(plain.fc2) is nn.Linear


@pytest.mark.parametrize("blueprint", ["affine", "mlp"])
@pytest.mark.parametrize("hooked", ["before", "after"])
def test_hooks_of_ones_own_see_in_the_exported_model_what_they_saw_before(hooked: str, blueprint: str) -> None:
    torch.manual_seed(1)
    plain = trained(build("mlp"), blueprint, ["fc1"], hooked)
    assert (type(plain.fc1) is nn.Linear) is (blueprint == "affine" and hooked == "after")


@pytest.mark.parametrize("case", ["mlp", "conv", "block"])
def test_torch_export_runs_the_exported_model_for_any_batch(case: str, tmp_path: Path) -> None:
    loop = grown(case)
    example, x = batch(GROWN[case][0], 1, 2)[0], batch(GROWN[case][0], 7, 5)[0]
    program = torch.export.load(export_pt2(loop.grow.export().eval(), example, tmp_path / "model.pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), loop.model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_onnx_runs_the_exported_model_for_any_batch(case: str, tmp_path: Path) -> None:
    import onnxruntime

    loop = grown(case)
    plain = loop.grow.export().eval()
    example, x = batch(GROWN[case][0], 1, 2)[0], batch(GROWN[case][0], 7, 5)[0]
    with torch.no_grad():
        expected = loop.model(x)
    session = onnxruntime.InferenceSession(export_onnx(plain, example, tmp_path / "model.onnx"))
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", list(GROWN))
def test_saved_as_safetensors_it_is_built_again_without_the_trainer(case: str, tmp_path: Path) -> None:
    loop = grown(case)
    loop.grow.save(tmp_path)
    again = load_model(tmp_path, build(GROWN[case][0]))
    same(again.state_dict(), loop.grow.export().state_dict())
    x = batch(GROWN[case][0], 7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), loop.grow.export().eval()(x))


def test_a_loaded_model_is_a_host_that_grows_on_and_is_saved_again(tmp_path: Path) -> None:
    grown("mlp").grow.save(tmp_path / "first")
    host = load_weights(build("mlp"), str(tmp_path / "first"))
    save_model(tmp_path / "second", host, [])
    same(load_model(tmp_path / "second", build("mlp")).state_dict(), host.state_dict())
    data = batch("mlp", 7)
    before = host(data[0]).detach().clone()
    grow = attach(host, loss=sample_loss, total_steps=200, sample=data)
    assert grow.registry.sites and torch.equal(host(data[0]), before), "seeds find their places, and change nothing yet"


@dataclass
class Wave(Blueprint):
    """A branch of the user's own, written in the script that trains."""

    name: str = "wave"
    hidden: int = 4
    gains: list[float] = field(default_factory=lambda: [1.0, 2.0])
    act: object = "sin"
    output = "w2"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {"w1": (reads, self.hidden), "w2": (self.hidden, writes)}

    def forward(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.matmul(getattr(torch, str(self.act))(torch.matmul(x, parameters["w1"])), parameters["w2"])


def test_an_own_branch_is_loaded_with_its_class_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wave, "__module__", "__main__")  # as where the training script defines it
    loop = Loop("mlp", {1: [germinate("fc1", 0)]}, {"blueprint": Wave(hidden=3)})
    loop.until(Stage.EVALUATING)
    loop.grow.save(tmp_path)
    with pytest.raises(UserError, match=r"would import '__main__'.*load_model\(…, blueprints=\[Wave\]\) does without\.$"):
        load_model(tmp_path, build("mlp"))
    monkeypatch.setattr(Wave, "__module__", "other")  # another program imports it
    again = load_model(tmp_path, build("mlp"), blueprints=[Affine, Wave])
    x = batch("mlp", 7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), loop.grow.export().eval()(x))


def test_a_setting_that_no_file_could_hold_is_refused_before_the_training() -> None:
    words = r"^The setting act of blueprint 'wave' is a builtin_function_or_method, with which no model could be saved; .*looks? up"
    with pytest.raises(UserError, match=words):
        attach(build("mlp"), loss=sample_loss, total_steps=200, sample=batch("mlp"), blueprint=Wave(act=torch.sin))


class Half(nn.Module):
    """A host in bfloat16 but for its norm, with a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = Net(), nn.LayerNorm(6)
        self.register_buffer("shift", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x.float()).to(self.shift.dtype) + self.shift).float()


def test_a_model_comes_back_in_the_dtypes_it_was_saved_in(tmp_path: Path) -> None:
    model = Half().bfloat16()
    model.norm.float()
    optimizer, port = torch.optim.AdamW(model.parameters(), 0.01), Notebook({1: [germinate("net.fc1", 0)]})
    settings: dict[str, Any] = {"lifecycle": short(), "port": port, "per_site": 2, "sites": ["net.fc1"]}
    grow = attach(model, loss=sample_loss, optimizer=optimizer, judge=[batch("mlp", 900)], total_steps=200, **settings)
    for step in range(10):
        sample_loss(model, batch("mlp", step)).mean().backward()
        grow.after_backward(batch("mlp", step))
        optimizer.step()
        grow.tick(1.0)
        optimizer.zero_grad()
    assert grow.registry.branches.alpha[0] > 0
    grow.save(tmp_path)
    plain, again = grow.export().eval(), load_model(tmp_path, Half())
    same(again.state_dict(), plain.state_dict())
    assert {name: value.dtype for name, value in again.state_dict().items()} == {n: v.dtype for n, v in plain.state_dict().items()}
    assert (again.net.fc2.weight.dtype, again.norm.weight.dtype, again.shift.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    x = batch("mlp", 7)[0]
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))
    assert {p.dtype for p in load_weights(Half(), str(tmp_path)).parameters()} == {torch.float32}, "a host to train on keeps its own"


def test_tied_weights_stay_tied_on_disk_and_off_it(tmp_path: Path) -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=20, bos_token_id=0, eos_token_id=0))
    save_model(tmp_path, model, [])
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again: Any = load_model(tmp_path, hf.GPT2LMHeadModel(model.config))
    same(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    grown("mlp").grow.save(tmp_path)
    with pytest.raises(UserError, match=r"holds no saved model"):
        load_model(tmp_path / "nothing", build("mlp"))
    with pytest.raises(UserError, match="esper did not build: pass a fresh one"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="does not fit this host"):
        load_model(tmp_path, build("cnn_group"))
    with pytest.raises(UserError, match="there is no such file"):
        load_weights(build("mlp"), str(tmp_path / "none.safetensors"))
    save_file(Net().state_dict(), tmp_path / "bare.safetensors")
    same(load_weights(build("mlp"), str(tmp_path / "bare.safetensors")).state_dict(), load_file(tmp_path / "bare.safetensors"))
    (tmp_path / "model.json").write_text(json.dumps({"format": "esper model", "version": 99}), encoding="utf-8")
    with pytest.raises(UserError, match="has version 99; this esper reads version 2"):
        load_model(tmp_path, build("mlp"))
