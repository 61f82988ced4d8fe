"""The durations of the stages, the objective of a TRAINING seed, and the thresholds of the gates."""

from __future__ import annotations

from dataclasses import dataclass

from esper.setting_fields import setting

OBJECTIVES = ("shadow", "functional_gradient", "reconstruction")


@dataclass
class LifecycleConfig:
    """Ages are durations (``50step``, ``2epoch``, ``5%`` of the run); gate thresholds are compared with ≥."""

    name: str = "default"
    clock: str = setting("step", choices=("step", "epoch"), help="what a tick is: an optimizer step or an epoch")
    objective: str = setting("shadow", choices=OBJECTIVES, help="what a TRAINING seed learns from")
    training_slots: int = setting(8, low=1, help="seeds that may be TRAINING at the same time")
    reseed: bool = setting(False, help="a fossilized seed's chunk may be seeded again (a new generation)")

    germinated_max: str = setting("20%", unit="duration", help="longest wait for a training slot, then CANCELLED")
    training_min: str = setting("2%", unit="duration", help="shortest isolated phase")
    training_max: str = setting("6%", unit="duration", help="longest isolated phase, then CULLED")
    grafting_min: str = setting("0%", unit="duration", help="shortest blending; it lasts as long as the ramp in any case")
    grafting_max: str = setting("25%", unit="duration", help="longest blending, then CULLED")
    stabilization_min: str = setting("1%", unit="duration", help="shortest settling of the host")
    stabilization_max: str = setting("6%", unit="duration", help="longest settling, then ROLLED_BACK")
    evaluating_min: str = setting("1%", unit="duration", help="age of the first look at the judge set")
    evaluating_max: str = setting("6%", unit="duration", help="longest judging, then CULLED")
    fine_tuning_min: str = setting("30%", unit="duration", help="shortest fine-tuning before the last look")
    fine_tuning_max: str = setting("50%", unit="duration", help="longest fine-tuning, then CULLED")
    fade: str = setting("1%", unit="duration", help="length of a culled branch's fade-out")
    embargo: str = setting("5%", unit="duration", help="rest of a culled or rolled-back seed before it is DORMANT again")
    judge_every: str = setting("1%", unit="duration", help="time between two looks at the judge set")

    readiness: float = setting(0.0, low=-1.0, high=1.0, help="TRAINING → GRAFTING: least relative fall of the objective")
    stability: float = setting(0.8, low=0.0, high=1.0, help="STABILIZATION → EVALUATING: least steadiness of the loss")
    gain: float = setting(0.001, low=0.0, unit="loss", help="EVALUATING and FINE_TUNING: least counterfactual gain (confidence bound)")
    significance: float = setting(0.05, low=1e-6, high=0.5, help="error rate of the gain's bound, spent over all looks at one branch")
    error_rate: float = setting(0.5, low=0.0, high=1.0, help="share of non-finite forwards above which a branch is culled")
    guard: bool = setting(True, help="a blended branch under which the judge set's loss rises goes, and the host returns")
