"""A grown model on disk: ``model.safetensors`` and ``model.json``, which together build it again without the trainer.

The description holds the host (the model group's settings and the shape of its task, where esper built it), what was
built in at which site, and which names share a tensor. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import esper
from esper.errors import UserError

if TYPE_CHECKING:
    from esper.blueprints import Blueprint

FORMAT, VERSION = "esper model", 2
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FOLDER = "model"

#: Attribute of a loaded host: the branches that had grown in it, run after run. A new save includes them.
GROWN_BEFORE = "grown_before"

Description = dict[str, Any]


def save_model(folder: str | Path, model: nn.Module, cards: list[Any], host: Description | None = None) -> Path:
    """Write an exported ``model`` and its description into ``folder``; returns the folder.

    ``cards`` come with the model from ``esper.seeds.exporting.export_with_cards``; ``host`` is ``{"model": …, "task": …}``.
    """
    from safetensors.torch import save

    from esper.atomic_files import replacing

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    description = {"format": FORMAT, "version": VERSION, "esper": esper.__version__, "host": host}
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in tensors and name not in tied}
    dtypes = {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in unsaved.items()}
    description |= {"grown": [*getattr(model, GROWN_BEFORE, []), cards], "tied": tied, "unsaved": dtypes}
    weights = save(tensors)  # an OSError where save_file has an error of its own
    description["sha256"] = hashlib.sha256(weights).hexdigest()
    for name, held in ((WEIGHTS, weights), (DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())):
        with replacing(folder / name) as aside:
            aside.write_bytes(held)
    return folder


def load_model(path: str | Path, host: nn.Module | None = None, blueprints: Iterable[type[Blueprint]] = ()) -> nn.Module:
    """The model saved in a folder (or a run's folder), in the dtypes it had, on the CPU, in evaluation mode.

    Args:
        host: a fresh module of the host's class, which is changed and returned; needed where esper did not build the host.
        blueprints: your own classes of branches that grew, known again by their names; else their packages must be allowed.

    Raises:
        UserError: nothing saved there, another format, a host that does not fit, or a branch whose class is not known.
    """
    folder = model_folder(path)
    description = read_description(folder / DESCRIPTION)
    if host is None:
        host = build_host(description, folder)
    return load_into(host, folder / WEIGHTS, description, tuple(blueprints), as_saved=True).eval()


def model_folder(path: str | Path) -> Path:
    """Where the model of ``path`` lies: the folder itself, or ``model`` in a run's folder. Raises UserError where it is in neither."""
    for folder in (Path(path), Path(path) / FOLDER):
        if (folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file():
            return folder
    when = "a run writes one when it has finished; before that, esper export takes it from a checkpoint"
    raise UserError(f"{path} holds no saved model ({WEIGHTS} and {DESCRIPTION}); {when}.")


def read_description(path: Path) -> Description:
    """The description, every part of the kind that it must be. Raises UserError for one that is damaged, foreign or newer."""
    from esper.export.description import Wrong, check

    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as the description of a model: {error}.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{path} is not the description of a model that esper saved.")
    if description.get("version") not in (1, VERSION):
        stated = str(description.get("version"))[:40]
        raise UserError(f"{path} has version {stated}; this esper reads version {VERSION}: use the one that wrote it.")
    try:
        check(description)
    except Wrong as wrong:
        raise UserError(f"{path} is not what esper wrote: {wrong}.") from wrong
    return description


def load_weights(host: nn.Module, path: str) -> nn.Module:
    """``host`` as the model saved at ``path`` (``model.weights``): a run's folder, a saved model's, or a ``.safetensors`` file.

    Raises:
        UserError: nothing there, or tensors that are not this host's.
    """
    given = Path(path).expanduser()
    if given.suffix == ".safetensors":
        if not given.is_file():
            raise UserError(f"model.weights={path}: there is no such file.")
        beside = given.with_suffix(".json")
        return load_into(host, given, read_description(beside) if beside.is_file() else {"grown": [], "tied": {}})
    if not given.is_dir():
        raise UserError(f"model.weights={path}: there is no such folder; give a run's folder or a .safetensors file.")
    folder = model_folder(given)
    return load_into(host, folder / WEIGHTS, read_description(folder / DESCRIPTION))


def load_into(
    host: nn.Module, path: Path, description: Description, blueprints: tuple[type[Blueprint], ...] = (), as_saved: bool = False
) -> nn.Module:
    """Build the branches into ``host`` and load the tensors, every name strictly; ``as_saved``: the host takes the dtypes of the file."""
    from safetensors.torch import load_file

    from esper.export.description import Budget, unfit
    from esper.seeds.exporting import rebuild_branches

    _refuse_changed(path, description.get("sha256"))
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has errors of several kinds for a file that is damaged
        raise UserError(f"{path} cannot be read as weights: {_words(error)}.") from error
    try:
        budget = Budget(tensors, description["tied"])
        if any(description["grown"]):
            budget.spend(tuple(value.shape) for value in host.state_dict().values())
        for cards in description["grown"]:
            rebuild_branches(host, cards, lambda entry: _blueprint(entry, blueprints), budget)
    except UserError:
        raise
    except Exception as error:  # whatever a blueprint's or a host's own code says to settings that are not its own
        raise UserError(f"{path} does not fit this host: {_words(error)}; build the host that was trained.") from error
    tensors |= {name: tensors[source] for name, source in description["tied"].items() if source in tensors}
    own, learnt = host.state_dict(), {name for name, _ in host.named_parameters(remove_duplicate=False)}
    wrong = sorted({*own} ^ {*tensors})
    if wrong:
        holder, other = ("the file", "the host") if wrong[0] in tensors else ("the host", "the file")
        raise UserError(f"{path} does not fit this host: {holder} has a tensor '{wrong[0]}', and {other} has none.")
    for name, value in own.items():
        reason = unfit(name, tensors[name], value, name in learnt)
        if reason is not None:
            raise UserError(f"{path} does not fit this host: {reason}.")
    if as_saved:
        _take_dtypes(host, tensors, description)
    host.load_state_dict(tensors)
    setattr(host, GROWN_BEFORE, description["grown"])
    return host


def _refuse_changed(path: Path, digest: str | None) -> None:
    """Raise UserError where the weights are not those that were described."""
    if not digest:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if found != digest:
        raise UserError(f"{path} is not what was saved: its SHA-256 is not the one in {DESCRIPTION}. Take it from where it was saved.")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _take_dtypes(host: nn.Module, tensors: dict[str, torch.Tensor], description: Description) -> None:
    """Give the host's floating-point tensors the dtypes of those that were saved; buffers that no file holds, those they had."""
    unsaved = description.get("unsaved", {})
    for name, own in itertools.chain(host.named_parameters(), host.named_buffers()):
        dtype = tensors[name].dtype if name in tensors else getattr(torch, unsaved.get(name, ""), own.dtype)
        if own.is_floating_point() and own.dtype != dtype:
            own.data = own.data.to(dtype)


def host_card(model: Description, task: Any) -> Description:
    """The description that rebuilds the host: the model group's settings and the task's shape."""
    shape = {"name": task.name, "inputs": task.inputs, "input_shape": list(task.input_shape), "outputs": task.outputs}
    return {"model": {**model, "weights": ""}, "task": shape}


def build_host(description: Description, folder: Path) -> nn.Module:
    """The host with initial weights. Raises UserError where the description knows no host."""
    from esper.config import options, structure
    from esper.randomness import generator

    card = description["host"]
    if card is None:
        raise UserError(f"{folder} was saved from a model that esper did not build: pass a fresh one, load_model(path, host=MyNet()).")
    shape = card["task"]
    task = SimpleNamespace(**{**shape, "input_shape": tuple(shape["input_shape"])})
    known = options("model")
    name = card["model"]["name"]
    if name not in known:
        raise UserError(f"{folder} was saved from model={name[:40]}, which this esper does not have.")
    config = structure(known[name], card["model"], "model")
    try:
        if name != "custom":  # its class is the user's own, and may not be made without memory
            _refuse_larger(config, task, folder / WEIGHTS)
        host: nn.Module = config.build(task, generator(0, "host"))
    except UserError:
        raise
    except Exception as error:  # whatever torch says to sizes that nothing has
        raise UserError(f"{folder} describes a host that cannot be built: {_words(error)}.") from error
    return host


def _refuse_larger(config: Any, task: Any, weights: Path) -> None:
    """Raise UserError where the host would hold more numbers than the file of its weights; nothing is allocated to find out."""
    from esper.randomness import generator

    with torch.device("meta"):
        described: nn.Module = config.build(task, generator(0, "host"))
    size = weights.stat().st_size
    numbers = sum(parameter.numel() for parameter in described.parameters())
    if numbers > size:  # a number fills a byte at least
        raise UserError(f"{weights.parent} describes a host of {numbers} parameters, and its weights fill {size} bytes: it is damaged.")


def _blueprint(entry: Description, known: tuple[type[Blueprint], ...]) -> Blueprint:
    from esper.blueprints import BLUEPRINTS, Blueprint
    from esper.user_code import make

    if not entry["target"]:
        built = BLUEPRINTS[entry["blueprint"]](**entry["settings"])
        assert isinstance(built, Blueprint), "the description was checked"
        return built
    name = entry["target"].replace(":", ".").rpartition(".")[2]
    for kind in known:
        if kind.__name__ == name:
            return kind(**entry["settings"])
    try:
        made: Blueprint = make(entry["target"], entry["settings"], "blueprint")
    except UserError as error:
        raise UserError(f"{error} In a program of yours, load_model(…, blueprints=[{name}]) does without.") from error
    return made
