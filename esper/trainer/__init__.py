"""esper's own training loop: the trainer, its learning-rate schedules, and the governor that keeps the host from harm."""

from esper.trainer.config import DDPConfig, FSDPConfig, MuonConfig, OptimizerConfig, TrainerConfig
from esper.trainer.schedule import SCHEDULES

CONFIGS: dict[str, dict[str, type]] = {
    "trainer": {"default": TrainerConfig, "ddp": DDPConfig, "fsdp": FSDPConfig},
    "optimizer": {"adamw": OptimizerConfig, "sgd": OptimizerConfig, "muon": MuonConfig},
    "scheduler": SCHEDULES,
}

__all__ = ["CONFIGS", "DDPConfig", "FSDPConfig", "MuonConfig", "OptimizerConfig", "TrainerConfig"]
