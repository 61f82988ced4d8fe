"""All blueprints by name."""

from __future__ import annotations

import dataclasses

from esper.blueprints.affine import Affine
from esper.blueprints.base import Blueprint
from esper.blueprints.block import Block
from esper.blueprints.config import BlockSettings, BlueprintSettings, HeadsSettings
from esper.blueprints.conv import Conv
from esper.blueprints.glu import GLU
from esper.blueprints.heads import Heads
from esper.blueprints.lora import LoRA
from esper.blueprints.low_rank import LowRank
from esper.blueprints.mlp import MLP
from esper.blueprints.width import Width

BLUEPRINTS: dict[str, type[Blueprint] | type[Block]] = {
    "affine": Affine,
    "low_rank": LowRank,
    "mlp": MLP,
    "glu": GLU,
    "conv": Conv,
    "block": Block,
    "width": Width,
    "heads": Heads,
    "lora": LoRA,
}


def blueprint_of(settings: BlueprintSettings | BlockSettings | HeadsSettings) -> Blueprint | Block:
    """The blueprint that has these settings."""
    return BLUEPRINTS[settings.name](**{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})


def unshardable(blueprint: Blueprint | Block) -> str | None:
    """Why this blueprint cannot grow on a host that FSDP shares out among processes, or None."""
    if isinstance(blueprint, Block) or blueprint.part_of_layer:
        return f"{blueprint.name} works on weights of the host, of which FSDP leaves no process a whole layer"
    return None
