"""The engine: ``attach`` seeds to a model and train it, in esper's loop or in any other (``esper.training.attach``)."""

from esper.training.config import OptimizerConfig, TrainerConfig
from esper.training.schedule import SCHEDULES

CONFIGS: dict[str, dict[str, type]] = {
    "trainer": {"default": TrainerConfig},
    "optimizer": {"adamw": OptimizerConfig, "sgd": OptimizerConfig},
    "scheduler": SCHEDULES,
}

__all__ = ["CONFIGS", "OptimizerConfig", "TrainerConfig"]
