"""``esper export run=<folder>``: the model of a run as files that other programs read.

A run that has not finished gives the model of its newest checkpoint that is whole.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.atomic_files import replacing
from esper.checkpoint import disk
from esper.config import RootConfig, did_you_mean, listing, plain
from esper.errors import UserError
from esper.export.program import refuse_without_onnx, to_onnx, to_pt2, traced
from esper.export.saved_model import DESCRIPTION, WEIGHTS, build_host, host_card, load_into, model_folder, read_description
from esper.export.saved_model import FOLDER as MODEL
from esper.running.builders import build_trainer
from esper.running.resume import saved_run
from esper.running.run_folder import CONFIG
from esper.tasks.table_columns import FILE as PREPROCESSING
from esper.tasks.table_columns import write_preprocessing

if TYPE_CHECKING:
    from torch.export import ExportedProgram

USAGE = "esper export run=<folder> [format=pt2|onnx|safetensors] [to=<folder>]"

#: Samples of the example batch; the exported programs take any number.
BATCH = 2


def main(arguments: Sequence[str]) -> int:
    """Exports as ``arguments`` say; prints the files.

    Raises:
        UserError: an argument that there is not, a run that has neither finished nor saved a checkpoint, or a package that is
            not installed.
    """
    if {"--help", "-h"} & set(arguments):
        print(f"usage: {USAGE}")
        return 0
    given = _given(arguments)
    folder = _folder(Path(given["run"]), given.get("to", ""))
    target = Path(given.get("to") or folder)
    if not given.get("to") and target.is_symlink():
        raise UserError(f"{target} is a link, through which nothing is written; name a folder: to=<folder>.")
    description = read_description(folder / DESCRIPTION)
    model = load_into(build_host(description, folder), folder / WEIGHTS, description).eval()
    target.mkdir(parents=True, exist_ok=True)
    for file in FORMATS[given.get("format", "pt2")](model, example(description["host"]["task"]), folder, target):
        print(file)
    if (folder / PREPROCESSING).is_file():
        if target != folder:
            with replacing(target / PREPROCESSING) as aside:
                shutil.copyfile(folder / PREPROCESSING, aside)
        print(target / PREPROCESSING)
    return 0


def _folder(place: Path, to: str) -> Path:
    """Where the model lies: where the finished run put it, else where it is put now, from the run's newest checkpoint."""
    if not (place / CONFIG).is_file() and not (place / disk.MANIFEST).is_file():
        return model_folder(place)  # a saved model's folder, or neither, which is refused
    run, chosen, config, ended = saved_run(place)
    written = (run / MODEL / WEIGHTS).is_file()
    if chosen is None and written and ended == "FINISHED":
        return model_folder(run)
    kept = None if chosen is not None else disk.newest(run / disk.FOLDER)
    if chosen is None and kept is None and written:
        return model_folder(run)
    if chosen is None and kept is None:
        raise UserError(f"The run in {run} has neither finished nor saved a checkpoint, so there is no model yet: esper resume={run}.")
    checkpoint, state = disk.read(chosen) if chosen is not None else kept[:2]  # type: ignore[index]
    for refusal in kept[2] if kept else ():
        print(f"esper: {refusal}", file=sys.stderr)
    print(f"esper: this is the model of {run} after step {checkpoint.step}; it is no finished run's", file=sys.stderr)
    return save_state(config, state, Path(to) if to else run / f"{MODEL}-at-{checkpoint.step}")


def save_state(config: RootConfig, state: Any, folder: Path) -> Path:
    """Save the model of a checkpoint's state into ``folder``, as a run's end would; returns the folder."""
    task = config.task.build()
    trainer = build_trainer(config, task, torch.device("cpu"), state=state["trainer"])
    saved = trainer.grow.save(folder, host_card(plain(config)["model"], task))
    write_preprocessing(task.preprocessing, saved)
    return saved


def example(task: dict[str, object]) -> Tensor:
    """A batch of the shape that the host was trained on: numbers, or characters."""
    size, words = task["input_shape"], task["outputs"]
    assert isinstance(size, (list, tuple)) and isinstance(words, int)
    draws = torch.Generator().manual_seed(0)
    if task["inputs"] == "tokens":
        return torch.randint(0, words, (BATCH, *size), generator=draws)
    return torch.randn(BATCH, *size, generator=draws)


def export_pt2(model: nn.Module, inputs: Tensor, path: Path) -> Path:
    """The model as a program of ``torch.export``; ``torch.export.load`` reads it."""
    return to_pt2(_said(model, inputs), path)


def export_onnx(model: nn.Module, inputs: Tensor, path: Path) -> Path:
    """The model as an ONNX graph ``inputs -> outputs``, weights inside. Needs ``pip install esper-grow[onnx]``."""
    refuse_without_onnx()
    return to_onnx(_said(model, inputs), path)


def _said(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    """The model as a program; prints a sentence for each size or layout that only the model takes."""
    try:
        program, remarks = traced(model, inputs)
    except Exception as error:  # the exceptions of torch.export have no common base
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UserError(f"This model cannot be exported by torch.export ({why}); format=safetensors does without.") from error
    for remark in remarks:
        print(f"esper: {remark}", file=sys.stderr)
    return program


def _pt2(model: nn.Module, inputs: Tensor, folder: Path, target: Path) -> list[Path]:
    return [export_pt2(model, inputs, target / "model.pt2")]


def _onnx(model: nn.Module, inputs: Tensor, folder: Path, target: Path) -> list[Path]:
    return [export_onnx(model, inputs, target / "model.onnx")]


def _safetensors(model: nn.Module, inputs: Tensor, folder: Path, target: Path) -> list[Path]:
    for name in (WEIGHTS, DESCRIPTION):
        if target != folder:
            with replacing(target / name) as aside:
                shutil.copyfile(folder / name, aside)
    return [target / WEIGHTS, target / DESCRIPTION]


FORMATS: dict[str, Callable[[nn.Module, Tensor, Path, Path], list[Path]]] = {"pt2": _pt2, "onnx": _onnx, "safetensors": _safetensors}


def _given(arguments: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in arguments:
        key, sign, value = word.partition("=")
        if not sign or key not in ("run", "to", "format"):
            raise UserError(f"'{word}' is not accepted: {USAGE}{did_you_mean(key, ('run', 'to', 'format'))}")
        given[key] = value
    if not given.get("run"):
        raise UserError(f"esper export needs a run: {USAGE}.")
    if given.get("format", "pt2") not in FORMATS:
        raise UserError(f"format={given['format']} is not accepted: it takes {listing(FORMATS)}{did_you_mean(given['format'], FORMATS)}")
    return given
