"""The branches the kernels know: how a blueprint's stacked parameters are handed over, in which order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BranchKind:
    """One sort of branch. ``stack_names`` names its stacks ``[cap, …]`` (esper.blueprints) in the order the ops take them."""

    stack_names: tuple[str, ...]
    activation: str = "identity"
    affine: bool = False
    gated: bool = False
    bias: bool = True


KINDS: dict[str, BranchKind] = {
    "affine": BranchKind(("scale", "shift"), affine=True),
    "low_rank": BranchKind(("down", "up"), bias=False),
    "mlp_relu": BranchKind(("w1", "b1", "w2", "b2"), "relu"),
    "mlp_gelu": BranchKind(("w1", "b1", "w2", "b2"), "gelu"),
    "mlp_silu": BranchKind(("w1", "b1", "w2", "b2"), "silu"),
    "glu": BranchKind(("wv", "bv", "w2", "b2", "wg", "bg"), gated=True),
}


@dataclass(frozen=True)
class BankTensors:
    """One bank's tensors under the kernels' names; an absent one repeats the first, and is never read."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    wg: Tensor
    bg: Tensor

    @property
    def capacity(self) -> int:
        """Slots in the bank."""
        return self.w1.shape[0]

    @property
    def hidden(self) -> int:
        """Hidden units (rank of ``low_rank``); 1 for ``affine``, which has none."""
        return self.w1.shape[2] if self.w1.dim() == 3 else 1


def split_kinds(kinds: str) -> list[str]:
    """``"mlp_relu,glu"`` (how an op's signature carries them) to names."""
    return kinds.split(",") if kinds else []


def bank_tensors(kind: str, tensors: list[Tensor]) -> BankTensors:
    """Name one bank's tensors; ``tensors`` in the order of ``KINDS[kind].stack_names``."""
    spec, first = KINDS[kind], tensors[0]
    assert len(tensors) == len(spec.stack_names), f"{kind} takes {spec.stack_names}"
    if spec.affine:
        return BankTensors(first, first, first, tensors[1], first, first)
    if not spec.bias:
        return BankTensors(first, first, tensors[1], first, first, first)
    gate = tensors[4:] if spec.gated else [first, first]
    return BankTensors(first, tensors[1], tensors[2], tensors[3], gate[0], gate[1])


def split_banks(kinds: str, parameters: list[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """The flat parameter list of an op as ``(kind, its tensors)`` a bank."""
    banks, at = [], 0
    for kind in split_kinds(kinds):
        count = len(KINDS[kind].stack_names)
        banks.append((kind, list(parameters[at : at + count])))
        at += count
    assert at == len(parameters), f"{len(parameters)} tensors given, {kinds} takes {at}"
    return banks
