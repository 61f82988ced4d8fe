"""Data sets (config group ``task``). Importing this needs torch alone; each task imports its source when built."""

from esper.tasks.base import Metric, Task
from esper.tasks.cifar10 import Cifar10Config
from esper.tasks.digits import DigitsConfig
from esper.tasks.fashion_mnist import FashionMnistConfig
from esper.tasks.folder import FolderConfig
from esper.tasks.mnist1d import Mnist1dConfig
from esper.tasks.own import task_of
from esper.tasks.text import TextConfig

__all__ = ["CONFIGS", "Metric", "Task", "task_of"]

CONFIGS: dict[str, type] = {
    "digits": DigitsConfig,
    "mnist1d": Mnist1dConfig,
    "fashion_mnist": FashionMnistConfig,
    "cifar10": Cifar10Config,
    "text": TextConfig,
    "folder": FolderConfig,
}
