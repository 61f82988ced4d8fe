"""A saved model that came from a stranger, or was damaged, ends in a sentence: never a traceback, a huge allocation, or wrong weights."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, Net, build, germinate
from safetensors.torch import load_file, save_file

from esper import load_model
from esper.blueprints import Block
from esper.errors import UserError
from esper.export.saved_model import load_weights, save_model
from esper.lifecycle import Stage

HOSTS = {"mlp": "mlp", "conv": "cnn_group", "block": "cnn_batch"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of grown models: perceptrons, convolutions, and a block with a folded layer elsewhere."""
    folders = {}
    for case, host in HOSTS.items():
        site = {"mlp": "fc1", "conv": "stem", "block": "stages.0.blocks.0"}[case]
        blueprint: Any = Block(start="copy") if case == "block" else case
        seeds = [0] if case == "block" else [0, 1]
        settings = {"blueprint": blueprint, "sites": [site]}
        loop = Loop(host, {1: [germinate(site, seed) for seed in seeds]}, settings)
        loop.until(Stage.EVALUATING)
        folders[case] = loop.grow.save(tmp_path_factory.mktemp(case))
    return folders


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the folders, to damage."""

    def copied(case: str) -> Path:
        return Path(shutil.copytree(saved[case], tmp_path / "model", dirs_exist_ok=True))

    return copied


def described(folder: Path) -> dict[str, Any]:
    """``model.json``."""
    found: dict[str, Any] = json.loads((folder / "model.json").read_bytes())
    return found


def describe(folder: Path, description: Any) -> None:
    """Write ``model.json``."""
    (folder / "model.json").write_text(json.dumps(description), encoding="utf-8")


def weigh(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write other weights, with the digest that goes with them."""
    save_file(tensors, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    describe(folder, described(folder) | {"sha256": digest})


def test_a_flipped_bit_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("mlp")
    held = bytearray((path / "model.safetensors").read_bytes())
    held[-3] ^= 1
    (path / "model.safetensors").write_bytes(held)
    for load in (lambda: load_model(path, Net()), lambda: load_weights(Net(), str(path / "model.safetensors"))):
        with pytest.raises(UserError, match=r"model\.safetensors is not what was saved: its SHA-256 is not the one in model\.json"):
            load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value * float("nan"), "'fc2.weight' holds numbers that are not finite"),
        (lambda value: value / 0.0, "'fc2.weight' holds numbers that are not finite"),
        (lambda value: value.to(torch.complex64), "'fc2.weight' is torch.complex64 in the file and torch.float32 in the host"),
        (lambda value: value.to(torch.int64), "'fc2.weight' is torch.int64 in the file and torch.float32 in the host"),
        (lambda value: torch.cat([value, value]), r"'fc2.weight' has shape \(14, 8\) in the file and shape \(7, 8\) in the host"),
    ],
)
def test_weights_that_are_no_weights_are_refused(folder: Callable[[str], Path], change: Any, words: str, tmp_path: Path) -> None:
    path = folder("mlp")
    tensors = load_file(path / "model.safetensors")
    weigh(path, tensors | {"fc2.weight": change(tensors["fc2.weight"]).contiguous()})
    with pytest.raises(UserError, match=words):
        load_model(path, Net())
    bare = Net().state_dict()
    save_file(bare | {"fc2.weight": change(bare["fc2.weight"]).contiguous()}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=words):
        load_weights(Net(), str(tmp_path / "bare.safetensors"))


def test_a_mask_of_infinities_is_a_buffer_and_stays(tmp_path: Path) -> None:
    def masked() -> Net:
        net = Net()
        net.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        return net

    save_model(tmp_path, masked(), [])
    assert load_model(tmp_path, masked()).mask.isinf().any()


def branch(description: dict[str, Any]) -> dict[str, Any]:
    """The first branch that grew."""
    found: dict[str, Any] = description["grown"][0][0]["branches"][0]
    return found


@pytest.mark.parametrize(
    "ask",
    [
        lambda d: branch(d)["settings"].update(hidden=10**12),
        lambda d: d["grown"][0][0].update(width=10**14) or [b["geometry"].update(width=10**14) for b in d["grown"][0][0]["branches"]],
        lambda d: d["grown"][0][0]["branches"].extend([branch(d)] * 2000),
    ],
)
def test_a_few_bytes_that_ask_for_terabytes_are_refused_before_anything_is_made(
    folder: Callable[[str], Path], ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("mlp")
    description = described(path)
    ask(description)
    describe(path, description)
    made = torch.zeros

    def watched(shape: Any, **named: Any) -> torch.Tensor:
        assert torch.Size(shape).numel() < 10_000
        return made(shape, **named)

    monkeypatch.setattr(torch, "zeros", watched)
    with pytest.raises(UserError, match="would hold more than the file of weights"):
        load_model(path, Net())


def test_copies_of_copies_do_not_double_on(folder: Callable[[str], Path]) -> None:
    path = folder("block")
    description = described(path)
    description["grown"] *= 60
    describe(path, description)
    with pytest.raises(UserError, match="would hold more than the file of weights"):
        load_model(path, build("cnn_batch"))


def test_a_host_larger_than_its_weights_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("mlp")
    task = {"name": "digits", "inputs": "real", "input_shape": [1, 8, 8], "outputs": 10}
    for model, shape in (({"name": "mlp", "width": 65536, "depth": 64}, task), ({"name": "mlp"}, task | {"outputs": 10**13})):
        describe(path, described(path) | {"host": {"model": model, "task": shape}})
        with pytest.raises(UserError, match=r"describes a host of \d+ parameters, and its weights fill \d+ bytes: it is damaged"):
            load_model(path)
    describe(path, described(path) | {"host": {"model": {"name": "mlp"}, "task": task | {"outputs": 10**30}}})
    with pytest.raises(UserError, match="describes a host that cannot be built"):
        load_model(path)


NASTY: list[Any] = [None, True, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), [], [1], [[]], {}, {"a": 1}]
NASTY += ["", "x", "fc1", "fc2", "load", "..", "os:system"]


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a nest of dicts and lists something stands."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += spots(part, (*path, key))
    return found


def spoiled(description: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """The description with one or two of its parts replaced, taken away or doubled."""
    changed = copy.deepcopy(description)
    for _ in range(draws.randint(1, 2)):
        *way, last = draws.choice(spots(changed))
        place: Any = changed
        for key in way:
            place = place[key]
        match draws.randrange(4):
            case 0 if isinstance(place, dict):
                del place[last]
            case 1 if isinstance(place, list):
                place.append(copy.deepcopy(place[last]))
            case _:
                place[last] = draws.choice(NASTY)
    return changed


@pytest.mark.parametrize("case", list(HOSTS))
def test_whatever_the_description_says_there_is_a_model_or_a_sentence(folder: Callable[[str], Path], case: str) -> None:
    path, draws, refused = folder(case), random.Random(case), 0
    description = described(path)
    for _ in range(150):
        describe(path, spoiled(description, draws))
        for load in (lambda: load_model(path, build(HOSTS[case])), lambda: load_model(path)):
            try:
                load()
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 150


def test_whatever_the_bytes_are_there_is_a_model_or_a_sentence(folder: Callable[[str], Path]) -> None:
    path, draws = folder("mlp"), random.Random(0)
    whole = {name: (path / name).read_bytes() for name in ("model.json", "model.safetensors")}
    for _ in range(150):
        name = draws.choice(list(whole))
        held = bytearray(whole[name])
        for _ in range(draws.randint(1, 4)):
            held[draws.randrange(min(len(held), 900))] = draws.randrange(256)
        del held[draws.choice([len(held), draws.randrange(len(held))]) :]
        (path / name).write_bytes(held)
        if name == "model.safetensors":
            describe(path, json.loads(whole["model.json"]) | {"sha256": hashlib.sha256(held).hexdigest()})
        try:
            load_model(path, Net())
        except UserError as error:
            assert "\n" not in str(error)
        (path / name).write_bytes(whole[name])
        (path / "model.json").write_bytes(whole["model.json"])
    (path / "model.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as the description of a model"):
        load_model(path, Net())


def test_saving_writes_through_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    target = tmp_path / "model"
    target.mkdir()
    for name in ("model.safetensors", "model.json"):
        (target / name).symlink_to(precious)
    save_model(target, Net(), [])
    assert precious.read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in target.iterdir() if not path.is_symlink()) == ["model.json", "model.safetensors"]
    load_model(target, Net())
