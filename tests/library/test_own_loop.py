"""``attach`` in a user's own loop: batches, outputs, schedulers, accumulation, precision, and models as people have them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from growing import Loop, Net, Notebook, batch, build, germinate, same, sample_loss, short
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from esper import attach
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.seeds import TelemetryConfig

SCRIPT = [{"at": "2step", "command": "germinate", "site": "fc1", "count": 1}]
JUDGE = [batch("mlp", 900, 64)]


def scheduled() -> Any:
    """A controller that germinates one seed at the second step."""
    return CONFIGS["scheduled"](script=SCRIPT)


def train(
    model: nn.Module, grow: Grow, optimizer: torch.optim.Optimizer, steps: int, run: Callable[[Any], Any] | None = None
) -> list[float]:
    """The ten lines a user writes; ``run`` is what is called instead of the model."""
    losses = []
    for step in range(steps):
        data = batch("mlp", step)
        loss = functional.cross_entropy((model if run is None else run)(data[0]), data[1])
        loss.backward()
        grow.after_backward(data, loss.detach())
        optimizer.step()
        grow.tick(loss.detach())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def attached(model: nn.Module, **settings: Any) -> tuple[Grow, torch.optim.Optimizer]:
    """AdamW and seeds on a model that takes batches of ``mlp``."""
    parameters = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 0.01)
    given = {"loss": sample_loss, "judge": JUDGE, "lifecycle": short(), "per_site": 2, "sites": ["*fc1"], "controller": scheduled()}
    return attach(model, optimizer=optimizer, total_steps=100, **(given | settings)), optimizer


@pytest.mark.usefixtures("processes")
def test_ten_lines_grow_a_seed_with_neither_hydra_bus_nor_mlflow() -> None:
    model = build("mlp")
    grow, optimizer = attached(model)
    train(model, grow, optimizer, 12)
    assert grow.transitions.counts["germinated"] == 1
    assert grow.registry.branches[0].stage not in (Stage.DORMANT, Stage.GERMINATED)
    program = "import sys, esper.engine; print([m for m in ('hydra', 'mlflow', 'msgspec', 'numpy.testing', 'redis') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_without_a_controller_nothing_grows_and_an_unknown_one_is_refused() -> None:
    grow, optimizer = attached(build("mlp"), controller=None)
    train(grow.registry.model, grow, optimizer, 5)
    assert grow.transitions.counts["germinated"] == 0
    for wrong, sentence in (("tamiyo", "There is no controller 'tamiyo'; there are"), (object(), "no method observe")):
        with pytest.raises(UserError, match=sentence):
            attached(build("mlp"), controller=wrong)


Pair = namedtuple("Pair", "inputs targets")


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "namedtuple"])
@pytest.mark.parametrize("output", ["tensor", "per_sample", "attribute", "mapping"])
def test_batches_and_losses_come_as_users_have_them(kind: str, output: str) -> None:
    inputs, targets = batch("mlp")
    data: Any = {"tuple": (inputs, targets), "list": [inputs, targets], "namedtuple": Pair(inputs, targets)}.get(
        kind, {"inputs": inputs, "targets": targets}
    )

    def loss(model: nn.Module, given: Any) -> Any:
        x, y = given.values() if isinstance(given, dict) else given
        each = functional.cross_entropy(model(x), y, reduction="none")
        return {
            "tensor": each.mean(),
            "per_sample": each,
            "attribute": SimpleNamespace(loss=each.mean()),
            "mapping": {"loss": each.mean()},
        }[output]

    grow = attach(build("mlp"), loss=loss, judge=[data], total_steps=10, sites="fc1")
    assert grow.loss(grow.registry.model, data).mean().isfinite()
    assert [site.geometry.width for site in grow.registry.sites] == [8]


def test_a_loss_that_is_none_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"gave a str; it must give a tensor"):
        attach(build("mlp"), loss=lambda model, data: "low", judge=JUDGE, total_steps=10)


def test_accumulating_four_equals_one_batch_four_times_larger() -> None:
    """Same host and same branch after every step, TRAINING and blended."""
    whole = Loop("mlp", {2: [germinate()]})
    parts = Loop("mlp", {2: [germinate()]}, accumulate=4)
    for step in range(20):
        inputs, targets = batch("mlp", step, 16)
        whole.step((inputs, targets))
        parts.step(*zip(inputs.split(4), targets.split(4), strict=True))
    assert whole.port.stages() == parts.port.stages() and len(whole.port.stages()) > 2
    for (name, one), (_, four) in zip(whole.model.state_dict().items(), parts.model.state_dict().items(), strict=True):
        torch.testing.assert_close(one, four, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_gradient_scaler_train_the_branches(dtype: torch.dtype) -> None:
    model = build("mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)

    def loss(given: nn.Module, data: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return functional.cross_entropy(given(data[0]).float(), data[1], reduction="none")

    grow, optimizer = attached(model, loss=loss, scaler=scaler if dtype is torch.float16 else None)
    for step in range(14):
        value = loss(model, batch("mlp", step)).mean()
        scaler.scale(value).backward()
        grow.after_backward(batch("mlp", step), value.detach())
        scaler.step(optimizer)
        scaler.update()
        grow.tick(value.detach())
        optimizer.zero_grad()
    bank = grow.registry.layers[0].bank("mlp")
    assert all(value.isfinite().all() for value in bank.values(0).values())
    assert bank.values(0)["w2"].abs().sum() > 0


@pytest.mark.slow
def test_a_compiled_model_grows_as_the_eager_one() -> None:
    eager, twin = build("mlp"), build("mlp")
    compiled: Any = torch.compile(twin, backend="aot_eager")
    compiled(batch("mlp")[0])  # compiled before anything hangs on it
    grow, optimizer = attached(eager)
    other, second = attached(compiled)
    losses = train(eager, grow, optimizer, 16)
    again = train(twin, other, second, 16, compiled)
    assert other.registry.branches[0].stage is grow.registry.branches[0].stage
    assert grow.registry.branches.alpha[0] > 0
    assert losses == pytest.approx(again, rel=1e-4)


class Tied(nn.Module):
    """Reads and writes with one weight, and runs one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.fc1, self.write = nn.Linear(6, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 6, bias=False)
        self.last = nn.Linear(6, 3, bias=False)
        self.last.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = self.fc1(functional.relu(self.fc1(self.read(x))))
        return self.last(self.write(hidden))


@pytest.mark.parametrize("blueprint", ["mlp", "affine"])
def test_shared_modules_and_tied_weights_grow_and_export_the_same(blueprint: str) -> None:
    torch.manual_seed(3)
    model = Tied()
    script = [{"at": "2step", "command": "germinate", "site": "*", "count": 3}]
    grow, optimizer = attached(
        model, sites=["fc1", "last"], blueprint=blueprint, controller=CONFIGS["scheduled"](script=script), per_site=1
    )
    train(model, grow, optimizer, 9)
    assert len(grow.registry.in_stage(Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING)) == 2
    plain = grow.export()
    x = batch("mlp", 5)[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))
    assert plain.read.weight is (plain.last if blueprint == "never" else plain.last.module).weight  # not folded: that would untie it
    assert isinstance(plain.fc1, nn.Linear) is (blueprint == "affine")


def test_frozen_layers_stay_and_a_wholly_frozen_host_trains_as_under_adapters() -> None:
    for frozen in ("some", "all"):
        model = build("batch_norm").eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen == "some" and name.startswith("head"))
        before = {name: value.clone() for name, value in model.state_dict().items() if not (frozen == "some" and name.startswith("head"))}
        grow, optimizer = attached(model)
        train(model, grow, optimizer, 12)
        same(before, {name: model.state_dict()[name] for name in before})
        assert grow.registry.branches.alpha[0] > 0
        grow.gates.judge.look([grow.registry.branches[0]], [0.05])
        assert grow.registry.layers[0].bank("mlp").values(0)["w2"].abs().sum() > 0


class Checkpointed(Net):
    """The same net with its hidden layers recomputed in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = checkpoint(lambda given: self.drop(self.act1(self.fc1(given))), x, use_reentrant=False)
        return self.head(functional.relu(self.fc2(hidden)))


def test_gradient_checkpointing_changes_nothing() -> None:
    states = []
    for kind in (Net, Checkpointed):
        torch.manual_seed(7)
        model = kind(dropout=0.3)
        torch.manual_seed(9)
        grow, optimizer = attached(model)
        train(model, grow, optimizer, 14)
        assert grow.registry.branches.alpha[0] > 0
        states.append(model.state_dict())
    same(*states)


class Reentrant(Net):
    """The same net with one hidden layer recomputed by the checkpointing that cannot give gradients to chosen tensors."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = x.detach().requires_grad_()
        for name in ("fc1", "fc2"):
            module = self.get_submodule(name)
            hidden = checkpoint(module, hidden, use_reentrant=True) if name == self.layer else module(hidden)
            hidden = functional.relu(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_reentrant_gradient_checkpointing_is_refused_in_words_wherever_it_is(layer: str, counts: bool) -> None:
    model = Reentrant(layer)
    grow, optimizer = attached(model, count_macs=counts)
    with pytest.raises(UserError, match=r"uses reentrant gradient checkpointing.*with use_reentrant=False"):
        train(model, grow, optimizer, 8)


def test_channels_last_gives_the_same_and_keeps_its_format() -> None:
    plain, last = Loop("cnn_group", {2: [germinate("stem")]}), Loop("cnn_group", {2: [germinate("stem")]})
    last.model.to(memory_format=torch.channels_last)
    for step in range(12):
        inputs, targets = batch("cnn_group", step)
        assert plain.step((inputs, targets)) == pytest.approx(last.step((inputs.to(memory_format=torch.channels_last), targets)), rel=1e-4)
    assert plain.grow.registry.branches.alpha[0] > 0
    hidden = last.model.stem(batch("cnn_group")[0].to(memory_format=torch.channels_last))
    assert hidden.is_contiguous(memory_format=torch.channels_last)


class Packed(Tensor):
    """Stands in for the tensors of torchao or quanto, which hold integers and say that they are float32."""


def test_models_on_which_seeds_cannot_live_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="train it on one device"):
        attached(nn.DataParallel(build("mlp")))
    quantized = build("mlp")
    quantized.fc1.weight = nn.Parameter(quantized.fc1.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"'fc1' .Linear. is quantized; seeds need layers in floating point"):
        attached(quantized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own quantization says that it is going away
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(build("mlp")), {nn.Linear})
    with pytest.raises(UserError, match="is quantized"):
        attach(nn.Sequential(nn.Linear(6, 6), dynamic), loss=sample_loss, judge=JUDGE, total_steps=10)
    packed = build("mlp")
    packed.fc2.weight = nn.Parameter(packed.fc2.weight.detach().as_subclass(Packed))
    assert packed.fc2.weight.dtype is torch.float32
    with pytest.raises(
        UserError, match=r"'fc2' .Linear. keeps its weight in a Packed, .*in floating point: attach .*before it is quantized"
    ):
        attached(packed)
    for mark in ({"is_quantized": True}, {"hf_quantizer": object()}):
        loaded = build("mlp")
        vars(loaded).update(mark)
        with pytest.raises(UserError, match=r"This model .Net. is quantized; seeds need layers in floating point"):
            attached(loaded)
    carrying = build("mlp")
    attached(carrying)
    with pytest.raises(UserError, match="carries seeds already"):
        attached(carrying)


@pytest.mark.parametrize("given", ["tick", "after_backward", "never"])
def test_the_stability_gate_hears_the_loss_wherever_it_is_given_and_says_when_it_never_is(given: str) -> None:
    model, port = build("mlp"), Notebook({1: [germinate()]})
    grow, optimizer = attached(model, controller=None, port=port, lifecycle=short(stability=0.1), accumulate=2)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(30):
            for part in range(2):
                data = batch("mlp", 2 * step + part)
                loss = functional.cross_entropy(model(data[0]), data[1])
                (loss / 2).backward()
                grow.after_backward(data, loss.detach() if given == "after_backward" else None)
            optimizer.step()
            grow.tick(loss.detach() if given == "tick" else None)
            optimizer.zero_grad()
    reached = [name for name, _ in grow.registry.branches[0].path]
    said = [str(one.message) for one in heard if "esper" in str(one.message)]
    alerts = [alert for alert in port.alerts if alert.code == "no_training_loss"]
    assert ("EVALUATING" in reached) is (given != "never")
    assert len(said) == len(alerts) == (given == "never")
    assert given != "never" or "the gate 'stability' stays shut: give it to grow.tick(loss)" in said[0]


class Words(nn.Module):
    """A host whose embedding gives sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, sparse=True)
        self.fc1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc1(self.words(x).mean(1))))


@pytest.mark.parametrize("site", ["words", "fc1"])
@pytest.mark.parametrize("objective", ["shadow", "functional_gradient"])
def test_a_host_with_sparse_gradients_grows(site: str, objective: str, tmp_path: Path) -> None:
    def words(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 20, (12, 4), generator=torch.Generator().manual_seed(number))
        return x, x[:, 0] % 3

    model, port = Words(), Notebook({1: [germinate(site)]})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)  # its momentum is sparse too
    settings = {"lifecycle": short(objective=objective), "telemetry": TelemetryConfig(every=2), "judge": [words(900)]}
    grow = attach(model, loss=sample_loss, optimizer=optimizer, total_steps=100, sites=[site], per_site=2, port=port, **settings)
    for number in range(40):
        loss = sample_loss(model, words(number)).mean()
        loss.backward()
        grow.after_backward(words(number), loss.detach())
        optimizer.step()
        grow.tick(loss.detach())
        optimizer.zero_grad()
        if grow.registry.in_stage(Stage.EVALUATING):
            break
    assert port.stages()[-1] == ("STABILIZATION", "EVALUATING") and not port.alerts
    snapshot = grow.guard.baselines[0].kept.snapshot  # type: ignore[union-attr]
    before = model.words.weight.detach().clone()
    snapshot.restore(model, optimizer, grow.registry)
    assert not torch.equal(before, model.words.weight) and grow.save_branches(tmp_path).is_dir()
    sample_loss(model, words(1)).mean().backward()
    optimizer.step()
