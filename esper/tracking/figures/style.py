"""Colours and fonts that readers with any colour vision can distinguish; in grey, a letter helps where it matters."""

from __future__ import annotations

from typing import Any

from esper.lifecycle.stages import Stage

# Okabe and Ito, "Color Universal Design", 2008; greys for what neither learns nor blends.
STAGE_COLOURS: dict[str, str] = {
    Stage.GERMINATED.name: "#BBBBBB",
    Stage.TRAINING.name: "#56B4E9",
    Stage.GRAFTING.name: "#F0E442",
    Stage.STABILIZATION.name: "#CC79A7",
    Stage.EVALUATING.name: "#E69F00",
    Stage.FINE_TUNING.name: "#009E73",
    Stage.FOSSILIZED.name: "#0B4F8A",
    Stage.CULLED.name: "#D55E00",
    Stage.CANCELLED.name: "#777777",
    Stage.ROLLED_BACK.name: "#333333",
}
STAGE_LETTERS: dict[str, str] = {
    Stage.GERMINATED.name: "g",
    Stage.TRAINING.name: "T",
    Stage.GRAFTING.name: "G",
    Stage.STABILIZATION.name: "S",
    Stage.EVALUATING.name: "E",
    Stage.FINE_TUNING.name: "F",
    Stage.FOSSILIZED.name: "kept",
    Stage.CULLED.name: "×",
    Stage.CANCELLED.name: "c",
    Stage.ROLLED_BACK.name: "r",
}
DARK = {Stage.FOSSILIZED.name, Stage.ROLLED_BACK.name, Stage.FINE_TUNING.name, Stage.CANCELLED.name, Stage.CULLED.name}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def readable(stage: str) -> str:
    """``FINE_TUNING`` → ``fine tuning``."""
    return stage.lower().replace("_", " ")


def tidy(axes: Any, x: str = "", y: str = "", title: str = "", above: float = 6.0) -> None:
    """No box, a light grid behind, labels that can be read; the title stands so many points above the axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    if title:
        axes.set_title(title, fontsize=11, loc="left", pad=above)
