"""A site in a compiled host's graph: tensors at fixed addresses, and registered ops over them.

α, routes and the parameters' stacks are inputs of the graph, which the engine writes between two steps. The results of a forward and
backward are written to tensors that the engine reads. Therefore the graph has no breaks, and no event in the life of a seed compiles it
again. A site that is asleep is not in the graph, unless telemetry is due. A host has therefore at most five graphs
(see ``esper.seeds.shadow_sites`` for the fifth).

A compiled graph must reach these tensors through ``SITES``, because sizes of attributes of torch's own modules are compiled in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import Blueprint, Geometry
from esper.blueprints.block_call import BlockCall
from esper.kernels.branch_kinds import split_banks
from esper.kernels.chunk_layout import as_rows, gather_chunks
from esper.kernels.torch_ops import branches as reference_branches
from esper.kernels.torch_ops import reference_telemetry
from esper.seeds.blocks_in_graph import GraphBlock, add_block
from esper.seeds.layer_branches import LayerBranches
from esper.seeds.traced_branches import TracedBank, traced_branches

Bank = tuple[str, list[Tensor]]
"""A bank's kind and its stacks, in the kind's order."""

SITES: dict[int, GraphSite] = {}
"""By the number of the seed layer; an entry goes with its layer."""

_ON_FIRST_GRAPH: dict[int, Callable[[], None]] = {}
_numbers = count()


@dataclass(eq=False)
class GraphSite:
    """One site's tensors, ``[S]`` float32 unless said otherwise.

    In: ``alpha``; ``route`` int32 ``[S, 3]`` as ``esper.kernels`` has it; ``parameters``, the stacks of the banks that ``kinds`` names;
    ``layer_route``, ``layer_kinds`` and ``layer_parameters``, the same of branches that read the whole layer; ``traced_route`` and
    ``traced``, the same of branches for which there is no kernel; ``block``, a grown one.
    Out: ``contained``, forwards in which the seed's branch was contained, and ``forwards`` ``[1]``, all of them; ``health`` ``[S, 4]``;
    ``power``, Σ(αδ)² of the branch; ``rows``, of how many rows; and, as the gradient of ``probe``, the sum of squares of the
    gradient at every chunk.
    """

    geometry: Geometry
    near_zero: float
    alpha: Tensor
    route: Tensor
    layer_route: Tensor
    traced_route: Tensor
    triton: bool
    kinds: str = ""
    parameters: list[Tensor] = field(default_factory=list)
    layer_kinds: str = ""
    layer_parameters: list[Tensor] = field(default_factory=list)
    traced: list[TracedBank] = field(default_factory=list)
    block: GraphBlock | None = None
    contained: Tensor = field(init=False)
    forwards: Tensor = field(init=False)
    health: Tensor = field(init=False)
    power: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    probe: Tensor = field(init=False)
    squares: Tensor | None = None
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Every stack with the tensor that stands for it in the graph."""

    def __post_init__(self) -> None:
        seeds, device = self.geometry.seeds, self.alpha.device
        self.contained, self.power = torch.zeros(seeds, device=device), torch.zeros(seeds, device=device)
        self.forwards, self.rows = torch.zeros(1, device=device), torch.zeros(1, device=device)
        self.health = torch.full((seeds, 4), float("nan"), device=device)
        self.probe = torch.zeros(seeds, device=device, requires_grad=True)
        take = weakref.WeakMethod(self._take)  # no collector sees through a tensor's hooks
        self.probe.register_post_accumulate_grad_hook(lambda probe: (take() or _nothing)(probe))
        for tensor in [value for value in vars(self).values() if isinstance(value, Tensor)]:
            stays_where_it_is(tensor)

    def _take(self, probe: Tensor) -> None:
        self.squares, probe.grad = probe.grad, None

    def set_parameters(self, chunk: list[Bank], layer: list[Bank], traced: list[tuple[Blueprint, dict[str, Tensor]]]) -> None:
        """Hand stacks to the graph, whose slots may double without compiling anything.

        ``chunk`` and ``layer`` are the banks of a kind each, ``traced`` those of a blueprint each.
        """
        before = {id(stack): leaf for stack, leaf in self.leaves if stack.data_ptr() == leaf.data_ptr()}
        self.leaves = []

        def leaf(stack: Tensor) -> Tensor:
            self.leaves.append((stack, before[id(stack)] if id(stack) in before else _leaf(stack)))
            return self.leaves[-1][1]

        self.kinds, self.layer_kinds = (",".join(kind for kind, _ in banks) for banks in (chunk, layer))
        self.parameters, self.layer_parameters = ([leaf(stack) for _, stacks in banks for stack in stacks] for banks in (chunk, layer))
        self.traced = [TracedBank(blueprint, {name: leaf(stack) for name, stack in stacks.items()}) for blueprint, stacks in traced]


def _nothing(probe: Tensor) -> None:
    """Of a site that is gone."""


def stays_where_it_is(tensor: Tensor) -> None:
    """Tell captured graphs (``mode="reduce-overhead"``) that they may read and write this memory itself, and need no copy of it."""
    from torch._dynamo import mark_static_address  # a compiler is at work, so it is there

    mark_static_address(tensor, guard=False)


def _leaf(stack: Tensor) -> Tensor:
    """The same memory as a tensor whose first size is free for the compiler; its gradients go to the stack."""
    from torch._dynamo import maybe_mark_dynamic

    leaf = stack.detach().requires_grad_()
    maybe_mark_dynamic(leaf, 0)
    stays_where_it_is(leaf)

    def hand_over(of: Tensor) -> None:
        stack.grad = of.grad if stack.grad is None or of.grad is None else stack.grad + of.grad
        of.grad = None

    leaf.register_post_accumulate_grad_hook(hand_over)
    return leaf


def register_layer(begin: Callable[[], None]) -> int:
    """A number for a seed layer; ``begin`` is called when a graph with the layer awake is about to be made."""
    number = next(_numbers)
    _ON_FIRST_GRAPH[number] = begin
    return number


def unregister_layer(number: int) -> None:
    """The layer is gone."""
    _ON_FIRST_GRAPH.pop(number, None)
    SITES.pop(number, None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_ready(number: int) -> bool:
    """Called by the compiler itself, once a graph: from here on the site's tensors are kept up to date."""
    if number not in SITES:
        _ON_FIRST_GRAPH[number]()
    return True


def forward_in_graph(
    x: Tensor, number: int, awake: bool, due: bool, forces_grad: bool, inputs: tuple[Any, ...], named: dict[str, Any]
) -> Tensor:
    """The output of the seed layer of this number for ``x``, for the compiler to trace; ``inputs`` and ``named`` are its module's."""
    _make_ready(number)
    site = SITES[number]
    dim = site.geometry.dim
    last = x if dim == -1 else x.movedim(dim, -1)
    y = last
    if awake and (site.kinds or site.layer_kinds or site.traced or site.block is not None):
        y = _blended(last, site, due, inputs, named)
    elif due:
        site.health.copy_(_health(last, site))
    if (due and x.requires_grad) or forces_grad:
        y = GradientProbe.apply(y, site.probe)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    return y if dim == -1 else y.movedim(-1, dim)


def _uses_triton(x: Tensor, site: GraphSite) -> bool:
    return site.triton and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _blended(x: Tensor, site: GraphSite, due: bool, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    y, live, power, health = x, torch.zeros_like(site.alpha), torch.zeros_like(site.alpha), None
    if site.kinds:
        y, live, power, health = _with_chunk_branches(x, site, due)
    elif due:
        health = _health(x, site)
    rows = x.reshape(-1, x.shape[-1])
    for number, (name, stacks) in enumerate(split_banks(site.layer_kinds, site.layer_parameters)):
        added, mine, squares = LayerBranches.apply(rows, site.alpha, site.layer_route, number, name, *stacks)  # type: ignore[no-untyped-call]
        y, live, power = y + added.view(x.shape), live + mine, power + squares
    for number, bank in enumerate(site.traced):
        added, mine, squares = traced_branches(x, site.alpha, site.traced_route, number, bank)
        y, live, power = y + added, live + mine, power + squares
    if site.block is not None:
        dim = site.geometry.dim
        whole, mine, squares = add_block(y.movedim(-1, dim), site.block, site.alpha, BlockCall.of(inputs, named), due)
        y, live, power = whole.movedim(dim, -1), live + mine, power + squares
    with torch.no_grad():
        site.contained.add_((site.alpha > 0) & (live.detach() == 0))
        site.forwards.add_(1.0)
        if health is not None:
            site.health.copy_(health.detach())
            site.power.copy_(power.detach() * site.alpha.square())  # α of this forward: the next one's may be there when it is read
            site.rows.fill_(x.numel() // x.shape[-1])
    return y


def _with_chunk_branches(x: Tensor, site: GraphSite, due: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``x`` with what the branches add that read their chunk, their ``live`` and ``power``, and the health of ``x`` if it is due."""
    if not _uses_triton(x, site):
        y, live, power = reference_branches(x.reshape(-1, x.shape[-1]), site.alpha, site.route, site.kinds, site.parameters)
        return y.view(x.shape), live, power, _health(x, site) if due else None
    if due:
        from esper.kernels.branches import branches

        y, *rest = branches(as_rows(x), site.alpha, site.route, None, site.kinds, site.parameters, True, site.near_zero)
        return y.view(x.shape), *rest
    from esper.kernels.branches_in_place import BranchesInPlace

    y, live, power = BranchesInPlace.apply(as_rows(x), site.alpha, site.route, site.kinds, *site.parameters)  # type: ignore[no-untyped-call]
    return y.view(x.shape), live, power, None


def _health(x: Tensor, site: GraphSite) -> Tensor:
    if not _uses_triton(x, site):
        measured: Tensor = reference_telemetry(x.detach(), site.geometry.seeds, site.near_zero)
        return measured
    from esper.kernels.telemetry import telemetry

    return telemetry(x, site.geometry.seeds, site.near_zero)


class GradientProbe(torch.autograd.Function):
    """``x`` itself; backward gives ``probe`` the sum of squares of every chunk's gradient, and lets the gradient pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> Tensor:
        """``x [..., W]`` and ``probe [S]``. A copy, because the host may continue in place; a compiler reads ``x`` instead."""
        ctx.seeds = probe.shape[0]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and ``[S]``."""
        (gradient,) = gradients
        squares = gradient.float().square().sum(tuple(range(gradient.dim() - 1)))
        return gradient, gather_chunks(squares[None], ctx.seeds).sum((0, 2))
