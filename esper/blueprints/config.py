"""Settings of the blueprints (config group ``blueprint``). Each blueprint derives from its settings and adds its function."""

from __future__ import annotations

from dataclasses import dataclass

from esper.fields import setting

ACTIVATION_NAMES = ("relu", "gelu", "silu")
STARTS = ("copy", "zero_copy", "fresh")


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
class BlockSettings:
    """Depth growth; ``output_layers`` names the layers whose zeroing makes the block the identity (else the host says)."""

    name: str = "block"
    receptive_field: str = setting("layer", choices=("layer",), help="a block reads and writes the whole site")
    start: str = setting("zero_copy", choices=STARTS, help="copy of the host's block, with its output at zero, or fresh")
    output_layers: list[str] = setting([], help="layers to zero; empty: the host block's own output_layers")


CONFIGS: dict[str, type] = {
    "affine": AffineSettings,
    "low_rank": LowRankSettings,
    "mlp": MLPSettings,
    "glu": GLUSettings,
    "conv": ConvSettings,
    "block": BlockSettings,
}
