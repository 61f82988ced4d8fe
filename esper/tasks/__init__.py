"""Data sets (config group ``task``). A task imports torch, and the libraries that read its data, when it is built."""

from typing import TYPE_CHECKING

from esper.lazy_imports import names_of
from esper.tasks.config import CONFIGS

if TYPE_CHECKING:
    from esper.tasks.base import Metric, Task
    from esper.tasks.user_tasks import task_of

__all__ = ["CONFIGS", "Metric", "Task", "task_of"]

_BASE = "esper.tasks.base"
__getattr__ = names_of(__name__, {"Metric": _BASE, "Task": _BASE, "task_of": "esper.tasks.user_tasks"})
