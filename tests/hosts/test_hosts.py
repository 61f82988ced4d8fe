"""Every host: initialised from the given generator alone, at home on its tasks, refusing the others in a sentence."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from esper.errors import UserError
from esper.hosts import CONFIGS
from esper.hosts.base import initialise
from esper.randomness import generator
from esper.tasks import CONFIGS as TASKS
from esper.tasks.base import SETS, Task
from esper.tasks.classification import classification
from esper.tasks.loading import Batches


def task_of(*shape: int) -> Task:
    drawn = torch.Generator().manual_seed(0)
    return classification("toy", dict.fromkeys(SETS, (torch.randn(12, *shape, generator=drawn), torch.arange(12) % 3)), 3, "")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("".join(f"{number} bottles on the wall, " for number in range(2000)), encoding="utf-8")
    return TASKS["text"](path=str(file), context=16, stretches=50).build()


CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("mlp", {}, (1, 8, 8)),
    ("mlp", {"width": 5, "depth": 1, "activation": "gelu"}, (1, 40)),
    ("cnn", {}, (3, 16, 16)),
    ("cnn", {"norm": "batch", "channels": [6], "blocks": 2}, (1, 9, 7)),
    ("cnn", {"kernel": 5, "stride": 1}, (1, 40)),
    ("cnn", {"norm": "batch"}, (2, 21)),
    ("transformer", {}, (16,)),
    ("transformer", {"tied": True, "dropout": 0.2, "depth": 3}, (16,)),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[2]}-{case[1]}")
def made(request: pytest.FixtureRequest, text: Task) -> tuple[Any, Task]:
    name, settings, shape = request.param
    return CONFIGS[name](**settings), text if name == "transformer" else task_of(*shape)


def state(host: nn.Module) -> list[torch.Tensor]:
    return list(host.state_dict().values())


def test_logits_fit_the_task_and_every_parameter_learns(made: tuple[Any, Task]) -> None:
    config, task = made
    host = config.build(task, generator(0, "host"))
    batch = task.train.__getitems__([0, 1, 2, 3])
    loss = task.sample_loss(host(batch[0]), batch)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert [name for name, part in host.named_parameters() if part.grad is None] == []


def test_the_generator_alone_decides_the_start(made: tuple[Any, Task]) -> None:
    config, task = made
    torch.manual_seed(1)
    first = state(config.build(task, generator(0, "host")))
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, state(config.build(task, generator(0, "host"))), strict=True))
    other = state(config.build(task, generator(1, "host")))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_building_draws_nothing_from_the_global_generator(made: tuple[Any, Task]) -> None:
    config, task = made
    before = torch.random.get_rng_state()
    config.build(task, generator(0, "host"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_growth_site_pattern_finds_what_enters_or_leaves_a_layer_with_weights(made: tuple[Any, Task]) -> None:
    config, task = made
    host = config.build(task, generator(0, "host"))
    modules = dict(host.named_modules())
    assert host.growth_sites
    for pattern in host.growth_sites:
        found = [part for name, part in modules.items() if fnmatchcase(name, pattern)]
        assert found and all(isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Flatten)) for part in found)
    assert "head" not in host.growth_sites


def test_a_block_with_silent_output_is_the_identity_and_a_reset_one_is_not(made: tuple[Any, Task]) -> None:
    config, task = made
    host = config.build(task, generator(0, "host")).eval()
    blocks = {name: host.get_submodule(name) for name in getattr(host, "growth_blocks", ())}
    assert bool(blocks) == (config.name != "mlp")
    inputs: dict[str, torch.Tensor] = {}
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0].detach()))
    host(task.train.__getitems__([0, 1])[0])
    for name, block in blocks.items():
        block.zero_output()
        assert torch.equal(block(inputs[name]), inputs[name])
        block.reset(generator(3, name))
        assert not torch.equal(block(inputs[name]), inputs[name])


def test_hosts_name_their_layers_plainly(text: Task) -> None:
    mlp = [name for name, _ in CONFIGS["mlp"]().build(task_of(1, 8, 8), generator(0)).named_children()]
    assert mlp == ["inputs", "fc1", "act1", "fc2", "act2", "head"]
    names = dict(CONFIGS["transformer"]().build(text, generator(0)).named_modules())
    assert {"blocks.0.attention.output", "blocks.1.mlp.fc1", "blocks.1.mlp.act1", "head"} <= set(names)


def test_a_decoder_does_not_see_the_future(text: Task) -> None:
    host = CONFIGS["transformer"]().build(text, generator(0)).eval()
    inputs = text.train.__getitems__([0, 1])[0]
    changed = inputs.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % text.outputs
    before, after = host(inputs), host(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_a_tied_head_is_the_embedding(text: Task) -> None:
    host = CONFIGS["transformer"](tied=True).build(text, generator(0))
    untied = CONFIGS["transformer"]().build(text, generator(0))
    assert host.head.weight is host.characters.weight
    counts = [sum(part.numel() for part in each.parameters()) for each in (untied, host)]
    assert counts[0] - counts[1] == host.head.weight.numel()


def test_dropout_acts_in_training_alone(text: Task) -> None:
    host = CONFIGS["transformer"](dropout=0.5).build(text, generator(0))
    inputs = text.train.__getitems__([0])[0]
    assert not torch.equal(host(inputs), host(inputs))
    host.eval()
    assert torch.equal(host(inputs), host(inputs))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("mlp", {}, "model=mlp needs numbers.*task=text gives characters of shape 16; use model=transformer"),
        ("cnn", {}, "model=cnn needs inputs shaped .*use model=transformer"),
        ("transformer", {"heads": 3}, "model.heads=3 does not divide model.width=64"),
    ],
)
def test_what_does_not_fit_characters_is_refused(text: Task, name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CONFIGS[name](**settings).build(text, generator(0))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("transformer", {}, "model=transformer needs characters.*gives numbers of shape 1×8×8; use model=mlp"),
        ("cnn", {"kernel": 4}, "model.kernel=4 is even"),
        ("cnn", {"channels": []}, "must name a width for each stage"),
        ("cnn", {"channels": [8, 10]}, "model.groups=4 does not divide the width 10"),
    ],
)
def test_what_does_not_fit_images_is_refused(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CONFIGS[name](**settings).build(task_of(1, 8, 8), generator(0))


def test_a_layer_without_a_rule_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError, match="Bilinear has parameters"):
        initialise(nn.Bilinear(2, 2, 2), generator(0))


@pytest.mark.parametrize(("settings", "low", "high"), [({"width": 4}, 0.6, 0.93), ({"width": 64}, 0.94, 1.0)], ids=["small", "grown-up"])
def test_a_small_host_leaves_something_to_win_on_digits(settings: dict[str, int], low: float, high: float) -> None:
    task = TASKS["digits"]().build()
    host = CONFIGS["mlp"](**settings).build(task, generator(0, "host"))
    train(host, task, steps=600, rate=1e-2)
    with torch.no_grad():
        accuracy = float(task.metrics["accuracy"].compute(host(task.test.inputs), (task.test.inputs, task.test.targets)).mean())
    assert low < accuracy <= high


@pytest.mark.slow
def test_a_decoder_learns_its_text(text: Task) -> None:
    host = CONFIGS["transformer"](width=32, depth=1).build(text, generator(0, "host"))
    train(host, text, steps=150, rate=5e-3)
    batch = next(Batches(text.test, 64, 0, text.collate, drop_last=False).epoch())
    with torch.no_grad():
        assert float(text.sample_loss(host(batch[0]), batch).mean()) < 1.5


def train(host: nn.Module, task: Task, steps: int, rate: float) -> None:
    batches = Batches(task.train, 64, seed=0, collate=task.collate)
    optimizer = torch.optim.AdamW(host.parameters(), lr=rate)
    for step in range(steps):
        batch = batches.at(step)
        optimizer.zero_grad()
        task.sample_loss(host(batch[0]), batch).mean().backward()
        optimizer.step()
