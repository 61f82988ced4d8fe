"""A folder of class folders: ``<path>/<class>/*.png`` (or jpg, bmp, npy), one sample a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from esper.errors import UserError
from esper.tasks.base import Task
from esper.tasks.classification import classification, divide
from esper.tasks.config import FolderConfig

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
ARRAYS = (".npy",)


def build(config: FolderConfig) -> Task:
    """Read every file into memory.

    Raises:
        UserError: no such folder, fewer than two classes, a file that cannot be read, sizes that differ.
    """
    folder = Path(config.path).expanduser()
    if not config.path or not folder.is_dir():
        raise UserError(f"task.path={config.path or '(empty)'} is no folder; give one that holds a folder of files for each class.")
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    files = [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]
    if len(classes) < 2 or len({label for _, label in files}) < len(classes):
        found = f"{len(classes)} folders, {len(files)} files" if classes else "no folder"
        raise UserError(
            f"task.path={config.path} holds {found}; it must hold two class folders or more, with {', '.join(IMAGES + ARRAYS)} in each."
        )
    inputs = _stacked(config, [_read(config, file) for file, _ in files], [file for file, _ in files])
    targets = torch.tensor([label for _, label in files])
    wanted = {which: round(len(files) * share) for which, share in _shares(config).items()}
    sets = divide(config.name, (inputs, targets), config.split_seed, {"train": 0, **wanted})
    return classification(config.name, sets, len(classes), f"{folder.name}: {', '.join(classes[:10])}")


def _shares(config: FolderConfig) -> dict[str, float]:
    return {"judge": config.judge, "validation": config.validation, "test": config.test}


def _read(config: FolderConfig, file: Path) -> Tensor:
    import numpy

    try:
        if file.suffix.lower() in ARRAYS:
            array = numpy.load(file, allow_pickle=False)
            return torch.from_numpy(array if array.ndim > 2 else array[None])
        from PIL import Image

        with Image.open(file) as opened:
            image = opened.convert("L" if config.channels == 1 else "RGB")
            if config.size:
                image = image.resize((config.size, config.size))
            pixels = torch.from_numpy(numpy.asarray(image).copy())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _stacked(config: FolderConfig, samples: list[Tensor], files: list[Path]) -> Tensor:
    for sample, file in zip(samples, files, strict=True):
        if sample.shape != samples[0].shape:
            shapes = f"{tuple(sample.shape)}, and {files[0].name} {tuple(samples[0].shape)}"
            raise UserError(f"{file} has the shape {shapes}; all must be alike: set task.size to scale images.")
    return torch.stack(samples)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES + ARRAYS)
