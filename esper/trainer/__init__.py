"""esper's own training loop: the trainer, its learning-rate schedules, and the governor that keeps the host from harm."""

from esper.trainer.config import OptimizerConfig, TrainerConfig
from esper.trainer.schedule import SCHEDULES

CONFIGS: dict[str, dict[str, type]] = {
    "trainer": {"default": TrainerConfig},
    "optimizer": {"adamw": OptimizerConfig, "sgd": OptimizerConfig},
    "scheduler": SCHEDULES,
}

__all__ = ["CONFIGS", "OptimizerConfig", "TrainerConfig"]
