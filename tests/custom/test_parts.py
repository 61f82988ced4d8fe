"""Refusals of own parts, each in words, without starting a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, germinate

from esper.app import main
from esper.config import options, structure
from esper.errors import UserError
from esper.grafting import CustomStrategy
from esper.lifecycle import Stage
from esper.tasks import task_of
from esper.tasks.config import FolderConfig
from esper.trainer.config import TrainerConfig
from esper.user_code import CustomBlueprint, CustomController, CustomGrafting, CustomModel, CustomTask, locate

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("ESPER_ALLOW", "my_pkg, esper")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("", r"=\(empty\) is not accepted"),
        ("my_pkg.nets", "takes package.module:Name"),
        ("subprocess:run", "would import 'subprocess', which nobody allowed"),
        ("my_pkgs.nets:MyNet", "nobody allowed"),
        ("my_pkg.net:MyNet", "there is no module 'my_pkg.net'"),
        ("my_pkg.nets:YourNet", "the module 'my_pkg.nets' has no 'YourNet'"),
    ],
)
def test_a_target_that_is_not_there_or_not_allowed_is_refused(target: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        locate(target, "model.target")


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (CustomModel(target="my_pkg.nets:MyNet", args={"widht": 3}), "unexpected keyword argument 'widht'; it takes width, classes"),
        (CustomModel(target="esper.setting_fields:setting", args={"default": 3}), "a host is a torch.nn.Module"),
        (CustomTask(target="my_pkg.nets:MyNet"), "make a Task with esper.tasks.task_of"),
        (CustomBlueprint(target="my_pkg.nets:MyNet"), "derive it from esper.blueprints.Blueprint"),
        (CustomGrafting(target="my_pkg.nets:MyNet"), "is no grafting rule"),
        (CustomController(target="my_pkg.nets:MyNet"), "has no method observe"),
    ],
)
def test_a_target_of_the_wrong_kind_is_refused(part: Any, sentence: str) -> None:
    given = {CustomModel: (None, torch.Generator()), CustomController: (0,)}.get(type(part), ())
    with pytest.raises(UserError, match=sentence):
        part.build(*given)


@pytest.mark.parametrize("words", [["check"], ["tracking=none", "trainer.steps=60", "output=out"]], ids=["check", "run"])
def test_a_model_that_gives_a_dict_is_told_what_the_loss_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    net = "class Dict(MyNet):\n    def forward(self, inputs):\n        return {'logits': super().forward(inputs)}\n"
    (tmp_path / "dict_net.py").write_text(f"from my_pkg.nets import MyNet\n{net}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ESPER_ALLOW", "dict_net")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "model=custom", "model.target=dict_net:Dict", "sites.match=[fc1,fc2]"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("esper: The model gave a dict where the task's loss reads a tensor of logits; have its forward return")
    assert "Traceback" not in "".join(told)


def test_a_broken_esper_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("allow: my_pkg", "- my_pkg", "allow: [1]", "allow: ["):
        (tmp_path / "esper.yaml").write_text(text)
        with pytest.raises(UserError, match=r"esper\.yaml"):
            locate("my_pkg.nets:MyNet", "model.target")


def test_own_weights_come_from_the_seed_alone() -> None:
    part = structure(options("model")["custom"], {"name": "custom", "target": "my_pkg.nets:MyNet", "args": {"width": 4}}, "model")
    first, second, third = (part.build(None, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.fc1.weight, second.fc1.weight) and not torch.equal(first.fc1.weight, third.fc1.weight)


def test_an_own_rule_climbs_holds_and_ends_within_the_shared_bounds() -> None:
    rule = CustomGrafting(target="my_pkg.ramps:Calm", ramp="6step").build()
    assert isinstance(rule, CustomStrategy)
    loop = Loop("mlp", {1: [germinate()]}, {"grafting": rule})
    loop.until(Stage.STABILIZATION)
    assert loop.grow.registry.branches.alpha[0] == 1.0
    assert (
        "there is no grafting strategy 'custom'" in Loop("mlp", {1: [germinate(strategy="custom")]}).run(2).port.acks["germinate-fc1-0"][1]
    )


def test_a_task_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    pairs = [(torch.zeros(3), torch.tensor(0))] * 4
    for changes, sentence in (
        ({"metrics": {"a": ("up", len)}}, "the direction of 'a' is 'up'"),
        ({"primary": "b"}, "primary='b' is no metric"),
        ({"collate": lambda samples: samples}, "a sample must be"),
    ):
        with pytest.raises(UserError, match=sentence):
            task_of("mine", pairs, pairs, pairs, pairs, outputs=2, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the judge set is empty"):
        task_of("mine", pairs, [], pairs, pairs, outputs=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is no folder"):
        FolderConfig().build()
    with pytest.raises(UserError, match="it must hold two class folders"):
        FolderConfig(path=str(tmp_path)).build()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        FolderConfig(path=str(tmp_path)).build()


def test_a_folder_of_class_folders_is_a_task_and_files_of_another_size_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    draws = torch.Generator().manual_seed(0)
    for label, level in (("dark", 60), ("light", 190)):
        (tmp_path / label).mkdir()
        for number in range(30):
            pixels = (level + 30 * torch.randn(6, 7, generator=draws)).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(tmp_path / label / f"{number}.png")
    task = FolderConfig(path=str(tmp_path), channels=1).build()
    assert (task.input_shape, task.outputs) == ((1, 6, 7), 2)
    assert [len(getattr(task, which)) for which in ("train", "judge", "validation", "test")] == [33, 9, 9, 9]
    Image.new("L", (9, 9)).save(tmp_path / "dark" / "odd.png")
    with pytest.raises(UserError, match=r"all must be alike: set task.size"):
        FolderConfig(path=str(tmp_path), channels=1).build()
    assert FolderConfig(path=str(tmp_path), size=8).build().input_shape == (3, 8, 8)


def test_a_frozen_host_under_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="no gradient for fp16's loss scaling"):
        TrainerConfig(freeze_host=True, precision="fp16")
