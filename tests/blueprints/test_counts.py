"""Parameters and MACs that a blueprint states equal those of real torch modules and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints import BLUEPRINTS, GLU, MLP, Affine, Block, Blueprint, Conv, Geometry, LowRank

FLAT = Geometry(10, 3, positions=4)
IMAGE = Geometry(7, 2, dim=1, spatial=2, positions=20)


def linear_modules(blueprint: Blueprint, reads: int, writes: int) -> list[nn.Module]:
    if isinstance(blueprint, Affine):
        return [nn.Linear(reads, writes)]
    if isinstance(blueprint, LowRank):
        return [nn.Linear(reads, blueprint.rank, bias=False), nn.Linear(blueprint.rank, writes, bias=False)]
    if isinstance(blueprint, MLP):
        return [nn.Linear(reads, blueprint.hidden), nn.Linear(blueprint.hidden, writes)]
    assert isinstance(blueprint, GLU)
    into = [nn.Linear(reads, blueprint.hidden) for _ in range(2)]
    return [*into, nn.Linear(blueprint.hidden, writes)]


def counted(function: object, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)  # type: ignore[operator]
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("field", ["chunk", "layer"])
@pytest.mark.parametrize("kind", [Affine, LowRank, MLP, GLU])
def test_dense_blueprints_count_as_linear_modules_do(kind: type[Blueprint], field: str, seed: int):
    blueprint = kind(receptive_field=field)
    start, end = FLAT.bounds(seed)
    reads = FLAT.width if field == "layer" else end - start
    if kind is Affine and field == "chunk":
        assert blueprint.parameters(FLAT, seed) == 2 * (end - start)
        assert blueprint.macs(FLAT, seed) == 0
        return
    modules = linear_modules(blueprint, reads, end - start)
    assert blueprint.parameters(FLAT, seed) == sum(p.numel() for m in modules for p in m.parameters())
    rows = torch.zeros(FLAT.positions, reads)
    expected = sum(counted(m, rows if m.in_features == reads else torch.zeros(FLAT.positions, m.in_features)) for m in modules)
    assert blueprint.macs(FLAT, seed) == expected > 0


@pytest.mark.parametrize("field", ["chunk", "layer"])
@pytest.mark.parametrize("seed", [0, 1])
def test_conv_counts_as_separable_convolution_does(field: str, seed: int):
    blueprint = Conv(receptive_field=field, kernel=3, expand=2)
    start, end = IMAGE.bounds(seed)
    reads = IMAGE.width if field == "layer" else end - start
    modules = [
        nn.Conv2d(reads, 2 * reads, 3, padding=1, groups=reads, bias=False),
        nn.GroupNorm(1, 2 * reads),
        nn.Conv2d(2 * reads, end - start, 1),
    ]
    assert blueprint.parameters(IMAGE, seed) == sum(p.numel() for m in modules for p in m.parameters())
    assert blueprint.macs(IMAGE, seed) == counted(nn.Sequential(*modules), torch.zeros(1, reads, 4, 5))


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("name", [name for name in BLUEPRINTS if name not in ("block", "width", "heads")])
def test_a_silent_start_gives_exactly_nothing_and_an_ordinary_one_something(name: str, silent: bool):
    blueprint = BLUEPRINTS[name]()
    geometry = IMAGE if blueprint.spatial else FLAT
    values = blueprint.initialise(blueprint.reads(geometry, 4), 4, geometry, torch.Generator().manual_seed(0), silent=silent)
    stacked = {key: value.unsqueeze(0) for key, value in values.items()}
    reads = blueprint.reads(geometry, 4)
    x = torch.randn(2, 1, reads, 4, 5) if blueprint.spatial else torch.randn(1, 6, reads)
    delta = blueprint.forward(stacked, x)
    if name == "affine" and not silent:
        assert not delta.any(), "a scale a feature sums over no inputs: it always starts at zero"
        return
    assert bool(delta.any()) is not silent


def test_start_values_depend_on_the_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (MLP().initialise(5, 3, FLAT, torch.Generator().manual_seed(seed), silent=True) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn from the global generator"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["w1"], other["w1"])
    assert float(first["w1"].abs().max()) <= 5**-0.5


def test_a_blueprint_says_where_it_does_not_fit():
    assert "convolution" in (Conv().misfit(FLAT) or "")
    assert "odd kernel" in (Conv(kernel=4).misfit(IMAGE) or "")
    assert Conv().misfit(IMAGE) is None and MLP().misfit(IMAGE) is None
    assert "residual" in (Block().misfit(FLAT) or "")
    assert Block().misfit(Geometry(8, 1, residual=True)) is None


def test_the_base_computes_nothing_by_itself():
    with pytest.raises(NotImplementedError, match="Blueprint"):
        Blueprint().shapes(1, 1, FLAT)
    with pytest.raises(NotImplementedError, match="Blueprint"):
        Blueprint().forward({}, torch.zeros(1))


def test_chunks_cover_the_width_once():
    for width, seeds in ((8, 3), (7, 7), (5, 1), (64, 10)):
        geometry = Geometry(width, seeds)
        owned = [feature for seed in range(seeds) for feature in range(*geometry.bounds(seed))]
        assert owned == list(range(width))
        assert geometry.chunk == max(end - start for start, end in map(geometry.bounds, range(seeds)))
        index, mask = geometry.features(list(range(seeds)))
        assert index[mask].tolist() == owned and geometry.bounds(-1) == (0, width)
