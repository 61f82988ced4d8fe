"""Blueprints: the kinds of branch that may grow. One a file; ``docs/own-blueprint.md`` shows how to write another."""

from typing import TYPE_CHECKING

from esper.lazy_imports import names_of

if TYPE_CHECKING:
    from esper.blueprints.affine import Affine
    from esper.blueprints.bank import SlotBank
    from esper.blueprints.base import Blueprint
    from esper.blueprints.block import Block, BlockBank
    from esper.blueprints.catalogue import BLUEPRINTS, blueprint_of, unshardable
    from esper.blueprints.conv import Conv
    from esper.blueprints.geometry import BehindHidden, Geometry, LinearLayer
    from esper.blueprints.glu import GLU
    from esper.blueprints.heads import Heads
    from esper.blueprints.lora import LoRA
    from esper.blueprints.low_rank import LowRank
    from esper.blueprints.mlp import MLP
    from esper.blueprints.width import WideConv, Width

__all__ = [
    "BLUEPRINTS",
    "GLU",
    "MLP",
    "Affine",
    "BehindHidden",
    "Block",
    "BlockBank",
    "Blueprint",
    "Conv",
    "Geometry",
    "Heads",
    "LinearLayer",
    "LoRA",
    "LowRank",
    "SlotBank",
    "WideConv",
    "Width",
    "blueprint_of",
    "unshardable",
]

_MODULES = {
    "esper.blueprints.affine": ("Affine",),
    "esper.blueprints.bank": ("SlotBank",),
    "esper.blueprints.base": ("Blueprint",),
    "esper.blueprints.block": ("Block", "BlockBank"),
    "esper.blueprints.catalogue": ("BLUEPRINTS", "blueprint_of", "unshardable"),
    "esper.blueprints.conv": ("Conv",),
    "esper.blueprints.geometry": ("BehindHidden", "Geometry", "LinearLayer"),
    "esper.blueprints.glu": ("GLU",),
    "esper.blueprints.heads": ("Heads",),
    "esper.blueprints.lora": ("LoRA",),
    "esper.blueprints.low_rank": ("LowRank",),
    "esper.blueprints.mlp": ("MLP",),
    "esper.blueprints.width": ("WideConv", "Width"),
}
__getattr__ = names_of(__name__, {name: module for module, names in _MODULES.items() for name in names})
