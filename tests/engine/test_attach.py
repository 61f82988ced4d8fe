"""What cannot be attached is refused with a sentence that says what to do; ticks may be epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, Net, batch, build, germinate, sample_loss, short
from torch import Tensor, nn

from esper.blueprints import Block
from esper.engine.attach import attach
from esper.errors import UserError
from esper.lifecycle import LifecycleConfig, Stage
from esper.seeds import find_sites

S = Stage


def attached(model: nn.Module | None = None, **changes: Any) -> Any:
    given: dict[str, Any] = {"loss": sample_loss, "total_steps": 400, "judge": [batch()], "lifecycle": short(), "per_site": 2}
    return attach(model or Net(), **(given | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pattern": ({"sites": "conv*"}, r"No module .*'conv\*'; there are: fc1, norm, act1"),
    "one of several": ({"sites": ["fc1", "nowhere"]}, "'nowhere'"),
    "no pattern": ({"sites": []}, "give patterns, or auto"),
    "too many seeds": ({"per_site": 8}, "per_site=8 is more than the 7 features of site 'fc2'; ask for at most 7"),
    "blueprint": ({"blueprint": "moss"}, "no blueprint 'moss'; there are affine, low_rank, mlp, glu, conv, block, width, heads"),
    "fits nowhere": ({"blueprint": "conv"}, "'conv' fits none of the 2 sites; at 'fc1': .*convolution"),
    "no block": ({"blueprint": "block"}, "residual block"),
    "not a block": ({"blueprint": Block(), "sites": ["fc*"]}, "fits none of the 2 sites"),
    "strategy": ({"grafting": "hope"}, "no grafting strategy 'hope'; there are linear"),
    "objective": ({"lifecycle": LifecycleConfig(objective="luck")}, "lifecycle.objective=luck is not accepted; it takes shadow"),
    "clock": ({"lifecycle": LifecycleConfig(clock="hour")}, "lifecycle.clock=hour is not accepted; it takes step or epoch"),
    "schedule": ({"lifecycle": short(training_min="90step")}, "^TRAINING can never be left"),
    "ramp": ({"lifecycle": short(grafting_max="39step"), "grafting": "drift"}, "^GRAFTING may never be left by its gate.*41 ticks"),
    "short run": ({"total_steps": 20, "lifecycle": LifecycleConfig(training_min="50step", training_max="60step")}, "can never be left"),
    "no batch": ({"judge": None}, "pass judge=.* or sample="),
    "judge of one look": ({"judge": (batch() for _ in range(3)), "sample": batch()}, "is a generator, .*only once; give a list of batches"),
    "judge's iterator": ({"judge": iter([batch()])}, "is a list_iterator, .* or a DataLoader"),
    "empty judge": ({"judge": []}, "holds no batch"),
    "data parallel": ({"model": nn.DataParallel(Net())}, "train it on one device"),
    "nothing": ({"model": nn.Flatten()}, "no parameters"),
    "one layer": ({"model": nn.Sequential(nn.Linear(6, 3))}, "no hidden layer"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_is_refused_in_words(name: str):
    changes, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as refusal:
        attached(**changes)
    assert str(refusal.value).endswith(".")


def test_seeds_are_attached_once():
    model = Net()
    attached(model)
    with pytest.raises(UserError, match="carries seeds already"):
        attached(model)


def test_an_optimizer_without_a_finite_rate_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(UserError, match="learning rate is nan"):
        attached(model, optimizer=optimizer)


def test_branches_learn_at_the_rate_of_an_adam_and_else_at_their_own():
    for made, rate, decay in ((torch.optim.AdamW, 0.02, 0.01), (torch.optim.SGD, 1e-3, 0.0)):
        model = Net()
        learning = attached(model, optimizer=made(model.parameters(), 0.02)).settings.learning
        assert (learning.lr, learning.weight_decay) == (rate, decay)
    assert attached().settings.learning.lr == 1e-3


class Odd(nn.Module):
    """Outputs of every kind: a tuple, a list, none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc, self.unused = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x[:, None])[0][:, -1])


def test_a_module_that_gives_several_tensors_carries_seeds_on_the_first():
    torch.manual_seed(0)
    model = Odd()
    grow = attached(model, sites=["lstm"])
    assert grow.registry.sites[0].geometry.width == 4
    out, (hidden, cell) = model.lstm(torch.randn(2, 1, 6))
    assert out.shape == (2, 1, 4) and hidden.shape == cell.shape
    with pytest.raises(UserError, match="'unused' cannot carry seeds: it is not called when the host runs"):
        attached(Odd(), sites=["unused"])


@pytest.mark.parametrize(
    ("module", "shape", "dim", "width", "positions"),
    [
        (nn.Conv2d(3, 5, 3), (2, 3, 8, 8), 1, 5, 36),
        (nn.Conv1d(3, 5, 3), (2, 3, 8), 1, 5, 6),
        (nn.BatchNorm2d(3), (2, 3, 4, 4), 1, 3, 16),
        (nn.ReLU(), (2, 3, 4, 5), 1, 3, 20),
        (nn.MaxPool1d(2), (2, 3, 8), 1, 3, 4),
        (nn.Linear(6, 4), (2, 7, 6), -1, 4, 7),
        (nn.Linear(6, 4), (2, 6), -1, 4, 1),
        (nn.LayerNorm(6), (2, 7, 6), -1, 6, 7),
    ],
)
def test_features_lie_where_the_layer_puts_them(module: nn.Module, shape: tuple[int, ...], dim: int, width: int, positions: int):
    model = nn.ModuleDict({"site": module, "other": nn.Linear(1, 1)})
    (site,) = find_sites(model, ["site"], 2, lambda: model["site"](torch.randn(shape)))
    geometry = site.geometry
    assert (geometry.dim, geometry.width, geometry.positions, geometry.residual) == (dim, width, positions, False)


def test_hosts_say_where_they_may_grow():
    assert [s.name for s in attached(build("transformer"), judge=[batch("transformer")]).registry.sites] == ["blocks.0.mlp.fc1"]
    blocks = attached(build("cnn_group"), judge=[batch("cnn_group")], blueprint="block").registry.sites
    assert [s.name for s in blocks] == ["stages.0.blocks.0", "stages.1.blocks.0"] and blocks[0].geometry.seeds == 1


def test_rows_are_numbered_site_by_site():
    registry = attached(per_site=3).registry
    assert [registry.row("fc1", 2), registry.row("fc2", 0), registry.row("fc2", 3), registry.row("fc3", 0)] == [2, 3, None, None]
    assert (registry.site_of(3), registry.seed_of(5)) == (1, 2)


def test_a_tick_may_be_an_epoch():
    lifecycle = short(
        clock="epoch", training_min="10step", training_max="9epoch", grafting_max="9epoch", stabilization_max="9epoch",
        germinated_max="9epoch", evaluating_max="9epoch", fine_tuning_max="9epoch", fade="1epoch", embargo="1epoch",
    )  # fmt: skip
    loop = Loop(settings={"lifecycle": lifecycle, "steps_per_epoch": 5}, commands={1: [germinate()]})
    assert loop.grow.settings.total_ticks == 80 and loop.grow.settings.ages.minimum[S.TRAINING] == 2
    loop.run(4)
    assert loop.grow.tick_number == 0 and not loop.port.transitions
    loop.run(1)
    assert loop.grow.tick_number == 1 and loop.port.stages() == [("DORMANT", "GERMINATED")]
    loop.run(50)
    path = dict(loop.grow.registry.branches[0].path)
    assert loop.grow.tick_number == 11 and path["TRAINING"] == 2 and path["GRAFTING"] == 4 and path["STABILIZATION"] == 8
    assert {tick for tick, _, _ in loop.port.rows} == {2, 4, 6, 8, 10}, "telemetry is as often in steps: every 10 of 5 a tick"


class Changing(nn.Module):
    """A host whose first layer's output loses features once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Identity()
        self.fc = nn.Linear(6, 3)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.cut(x[:, :4] if self.narrow else x)
        return self.fc(nn.functional.pad(seen, (0, 6 - seen.shape[1])))


def test_a_site_whose_width_changes_is_told_in_words() -> None:
    model = Changing()
    given = {"loss": sample_loss, "judge": [batch(number=900)], "total_steps": 100, "lifecycle": short()}
    grow = attach(model, sites=["cut"], per_site=2, **given)
    grow.executor.apply(germinate("cut"), 0)
    grow.registry.branches[0].stage = Stage.GRAFTING
    grow.registry.mark_changed(0)
    grow.registry.refresh()
    model.narrow = True
    with pytest.raises(UserError, match=r"The site 'cut' gave \[12, 4\].*its last axis had 6 features"):
        sample_loss(model, batch(number=1))


def test_a_run_too_short_to_keep_anything_is_refused_only_where_something_may_grow() -> None:
    given = {"loss": sample_loss, "judge": [batch(number=900)], "total_steps": 5, "sites": ["fc1"], "per_site": 2}
    with pytest.raises(UserError, match="The run has 5 ticks"):
        attach(build("mlp"), controller="heuristic", **given)
    assert attach(build("mlp"), controller="none", **given).settings.total_ticks == 5
