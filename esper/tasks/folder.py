"""A folder of class folders: ``<path>/<class>/*.png`` (or jpg, bmp, npy), one sample a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import UserError
from esper.fields import setting
from esper.tasks.base import Task
from esper.tasks.classification import classification, divide

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
ARRAYS = (".npy",)


@dataclass
class FolderConfig:
    """Classification of the user's own files; every class is a folder, and its name the class's."""

    name: str = "folder"
    path: str = setting("", help="the folder that holds a folder for each class")
    size: int = setting(0, low=0, unit="pixels", help="images are scaled to size × size; 0: all have one size already")
    channels: int = setting(3, low=1, help="of images: 1 (grey) or 3 (colour)")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    judge: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples that gates are decided on")
    validation: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples of the curves")
    test: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples touched once, at the end")

    def build(self) -> Task:
        """Read every file into memory.

        Raises:
            UserError: no such folder, fewer than two classes, a file that cannot be read, sizes that differ.
        """
        folder = Path(self.path).expanduser()
        if not self.path or not folder.is_dir():
            raise UserError(f"task.path={self.path or '(empty)'} is no folder; give one that holds a folder of files for each class.")
        classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
        files = [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]
        if len(classes) < 2 or len({label for _, label in files}) < len(classes):
            found = f"{len(classes)} folders, {len(files)} files" if classes else "no folder"
            raise UserError(
                f"task.path={self.path} holds {found}; it must hold two class folders or more, with {', '.join(IMAGES + ARRAYS)} in each."
            )
        inputs = self._stacked([self._read(file) for file, _ in files], [file for file, _ in files])
        targets = torch.tensor([label for _, label in files])
        wanted = {which: round(len(files) * share) for which, share in self._shares().items()}
        sets = divide(self.name, (inputs, targets), self.split_seed, {"train": 0, **wanted})
        return classification(self.name, sets, len(classes), f"{folder.name}: {', '.join(classes[:10])}")

    def _shares(self) -> dict[str, float]:
        return {"judge": self.judge, "validation": self.validation, "test": self.test}

    def _read(self, file: Path) -> Tensor:
        import numpy

        try:
            if file.suffix.lower() in ARRAYS:
                array = numpy.load(file, allow_pickle=False)
                return torch.from_numpy(array if array.ndim > 2 else array[None])
            from PIL import Image

            with Image.open(file) as image:
                image = image.convert("L" if self.channels == 1 else "RGB")
                if self.size:
                    image = image.resize((self.size, self.size))
                pixels = torch.from_numpy(numpy.asarray(image).copy())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from error
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    def _stacked(self, samples: list[Tensor], files: list[Path]) -> Tensor:
        for sample, file in zip(samples, files, strict=True):
            if sample.shape != samples[0].shape:
                shapes = f"{tuple(sample.shape)}, and {files[0].name} {tuple(samples[0].shape)}"
                raise UserError(f"{file} has the shape {shapes}; all must be alike: set task.size to scale images.")
        return torch.stack(samples)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES + ARRAYS)
