"""Blueprints: what may grow. One a file; ``docs/own-blueprint.md`` shows how to write another."""

from esper.blueprints.affine import Affine
from esper.blueprints.bank import SlotBank
from esper.blueprints.base import Blueprint
from esper.blueprints.block import Block, BlockBank
from esper.blueprints.conv import Conv
from esper.blueprints.geometry import Geometry
from esper.blueprints.glu import GLU
from esper.blueprints.low_rank import LowRank
from esper.blueprints.mlp import MLP

CONFIGS: dict[str, type] = {"affine": Affine, "low_rank": LowRank, "mlp": MLP, "glu": GLU, "conv": Conv, "block": Block}

__all__ = ["CONFIGS", "GLU", "MLP", "Affine", "Block", "BlockBank", "Blueprint", "Conv", "Geometry", "LowRank", "SlotBank"]
