"""Which controls a run has, and what they depend on; read by sweeps too, so nothing here needs torch."""

from __future__ import annotations

from esper.config import RootConfig

SAME_STEPS, SAME_MACS = "same_steps", "same_macs"
CONTROLS = (SAME_STEPS, SAME_MACS)
DEPENDS_ON = ("model", "task", "optimizer", "scheduler", "trainer", "seed")
"""Parts of a config that a control depends on."""
UNUSED = ("steps", "epochs", "control", "keep", "profile", "debug")
"""Keys of ``trainer`` that it does not depend on; its steps are said apart."""


def controls_of(config: RootConfig) -> tuple[str, ...]:
    """The controls that a run has. A run in which nothing can germinate is its own control, at the same steps and at the same MACs."""
    return () if config.trainer.control is False or config.controller.name == "none" else CONTROLS
