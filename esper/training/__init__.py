"""The engine: ``attach`` seeds to a model and train it, in esper's loop or in any other."""

from esper.training.attach import attach
from esper.training.config import OptimizerConfig, SchedulerConfig, TrainerConfig
from esper.training.grow import Grow

CONFIGS: dict[str, dict[str, type]] = {
    "trainer": {"default": TrainerConfig},
    "optimizer": {"adamw": OptimizerConfig, "sgd": OptimizerConfig},
    "scheduler": {
        "constant": SchedulerConfig,
        "constant_then_decay": SchedulerConfig,
        "cosine": SchedulerConfig,
        "warmup_cosine": SchedulerConfig,
    },
}

__all__ = ["CONFIGS", "Grow", "OptimizerConfig", "SchedulerConfig", "TrainerConfig", "attach"]
