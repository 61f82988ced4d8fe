"""Settings of the blueprints (config group ``blueprint``). Each blueprint derives from its settings and adds its function."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import UserError
from esper.setting_fields import setting

ACTIVATION_NAMES = ("relu", "gelu", "silu")
WIDTH_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
STARTS = ("copy", "zero_copy", "fresh", "random", "shared")
STATES = ("reset", "zero", "copied")


@dataclass
class BlueprintSettings:
    """The settings of every blueprint but ``block``."""

    name: str = ""
    receptive_field: str = setting("layer", choices=("chunk", "layer"), help="what a branch reads: its chunk or the whole layer")


@dataclass
class AffineSettings(BlueprintSettings):
    """Two numbers a feature with the field ``chunk``; with ``layer`` a matrix from the whole site to the chunk."""

    name: str = "affine"
    receptive_field: str = setting("chunk", choices=("chunk", "layer"), help="chunk: a scale a feature; layer: a matrix")


@dataclass
class LowRankSettings(BlueprintSettings):
    """A linear map of rank ``rank`` from the features that the branch reads to its chunk."""

    name: str = "low_rank"
    rank: int = setting(4, low=1, high=2**20, help="rank of the product")


@dataclass
class LoRASettings(BlueprintSettings):
    """Ranks for linear layers of the host, as LoRA adds them; every seed that is kept adds ``rank`` more."""

    name: str = "lora"
    receptive_field: str = setting("layer", choices=("layer",), help="new ranks read what the layer reads")
    rank: int = setting(4, low=1, high=2**20, help="ranks that one branch adds to its layer")
    scaling: float = setting(1.0, help="factor of the product, the same for all ranks of a layer: lora_alpha / r of peft")


@dataclass
class MLPSettings(BlueprintSettings):
    """One hidden layer of ``hidden`` units."""

    name: str = "mlp"
    hidden: int = setting(16, low=1, high=2**20, help="hidden units")
    activation: str = setting("relu", choices=ACTIVATION_NAMES, help="activation of the hidden layer")


@dataclass
class GLUSettings(BlueprintSettings):
    """One gated hidden layer of ``hidden`` units."""

    name: str = "glu"
    hidden: int = setting(32, low=1, high=2**20, help="hidden units")


@dataclass
class ConvSettings(BlueprintSettings):
    """δ(x) = pointwise(act(norm(depthwise(x)))); one normalization group a branch, over channels and positions."""

    name: str = "conv"
    kernel: int = setting(3, low=1, high=1023, unit="positions", help="width of the depthwise kernel, odd")
    expand: int = setting(2, low=1, high=1024, help="depthwise outputs a channel")
    activation: str = setting("relu", choices=ACTIVATION_NAMES, help="activation after the norm")


@dataclass
class WidthSettings:
    """Hidden units of the host itself: the hidden layer before the site gets wider, and the site's own layer reads more."""

    name: str = "width"
    receptive_field: str = setting("layer", choices=("layer",), help="new units read what the hidden layer reads")
    units: int = setting(16, low=1, high=2**20, help="hidden units of one branch")
    start: str = setting(
        "zero",
        choices=("zero", "paired", "gradmax", "tiny"),
        help="zero: no outgoing weights; paired: pairs with opposite ones; gradmax, tiny: directions from the gradient",
    )
    spread: str = setting("host", choices=("host", "fan_in"), help="size of drawn weights: as the layers' present ones, or 1/√fan_in")
    activation: str = setting("auto", choices=("auto", *WIDTH_ACTIVATIONS), help="of the new units; auto: the hidden layer's")

    def __post_init__(self) -> None:
        """Refuse half a pair."""
        if self.start == "paired" and self.units % 2:
            raise UserError(f"blueprint.start=paired grows units in pairs, and blueprint.units={self.units} is odd; use an even number.")


@dataclass
class BlockSettings:
    """Depth growth: blocks behind a block of the host, copies of it or of the whole stack, fresh ones, or the same one run again."""

    name: str = "block"
    receptive_field: str = setting("layer", choices=("layer",), help="a block reads and writes the whole site")
    start: str = setting(
        "zero_copy",
        choices=STARTS,
        help="copy: as the host's; zero_copy, fresh: with zero output; random: fresh without that; shared: the host's weights themselves",
    )
    blocks: int = setting(1, low=1, high=1000, help="blocks of one branch, one behind the other: grown, judged and kept as one")
    source: str = setting("site", choices=("site", "stack"), help="copies of the site's block, or of all in its list up to it, in turn")
    state: str = setting(
        "reset", choices=STATES, help="optimizer state of the copies: reset: none, and branch_warmup; zero: none; copied: the originals'"
    )
    untie: str = setting("", unit="duration or empty", help="start=shared: time of blending after which it becomes a copy; empty: never")
    output_layers: list[str] = setting([], help="layers to zero; empty: the host block's own output_layers")

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.untie and self.start != "shared":
            raise UserError(f"blueprint.untie={self.untie} is for blocks that share weights; add blueprint.start=shared or leave it out.")
        if self.state == "copied" and self.start in ("fresh", "random"):
            raise UserError(f"blueprint.state=copied needs copies, and blueprint.start={self.start} has none; use reset or zero.")


@dataclass
class HeadsSettings:
    """Attention heads of the host itself, as large as the present ones."""

    name: str = "heads"
    receptive_field: str = setting("layer", choices=("layer",), help="new heads read what the layer reads")
    heads: int = setting(1, low=1, high=1024, help="heads of one branch")


CONFIGS: dict[str, type] = {
    "affine": AffineSettings,
    "low_rank": LowRankSettings,
    "mlp": MLPSettings,
    "glu": GLUSettings,
    "conv": ConvSettings,
    "block": BlockSettings,
    "width": WidthSettings,
    "heads": HeadsSettings,
    "lora": LoRASettings,
}
