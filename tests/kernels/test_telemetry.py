"""The telemetry op against the reference, on its routes: windows of narrow chunks, whole rows in registers, and means through memory."""

import pytest
import torch

from esper.kernels import launch_rules, reference
from esper.kernels.chunk_layout import feature_owner
from esper.kernels.telemetry import telemetry
from tests.kernels.sites import DEVICE, error

SHAPES = [(64, 32, 4), (37, 30, 7), (33, 10, 10), (20, 8, 1), (9, 300, 2), (40, 64, 64)]


ROUTES = {"windows": (), "whole rows": ("windows",), "means": ("windows", "whole_rows")}
"""The launch rules that say no, by the route that is then taken."""


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "seeds"), SHAPES)
def test_every_route_agrees_with_the_reference(monkeypatch, rows, width, seeds, dtype, route):
    for rule in ROUTES[route]:
        monkeypatch.setattr(launch_rules, rule, lambda *_: None)
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) + 3).to(dtype).to(DEVICE)
    assert error(telemetry(x, seeds, 0.5), reference.telemetry(x.double(), seeds, 0.5)) <= 1e-5


def test_a_large_mean_does_not_cancel_the_variance():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.1 + 1000
    found, expected = telemetry(x, 8, 0.5), reference.telemetry(x.double(), 8, 0.5)
    assert error(found[:, 1], expected[:, 1]) <= 1e-4
    assert error(found[:, 3], expected[:, 3]) <= 1e-2


@pytest.mark.slow
def test_widest_site_and_a_seed_a_feature():
    x = torch.randn(2, 65536, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for seeds in (1, 2048):
        assert error(telemetry(x, seeds, 0.1)[:, :3], reference.telemetry(x.double(), seeds, 0.1)[:, :3]) <= 1e-4
    x = x[:, :2048]
    assert error(telemetry(x, 2048, 0.1)[:, :3], reference.telemetry(x.double(), 2048, 0.1)[:, :3]) <= 1e-4


@pytest.mark.parametrize("row", [0, 50])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_narrow_chunk_alone(value, row):
    x = torch.randn(100, 61, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(DEVICE)
    clean = telemetry(x, 20, 0.1)
    x[row, 30] = value
    spoilt = telemetry(x, 20, 0.1)
    owner = int(feature_owner(61, 20)[30])
    others = [seed for seed in range(20) if seed != owner]
    assert not bool(torch.isfinite(spoilt[owner, 0]))
    torch.testing.assert_close(spoilt[others, :3], clean[others, :3], rtol=0, atol=0)
    assert bool((spoilt[others, 3] == reference.telemetry(x, 20, 0.1)[others, 3]).all()), "the others' mean is unknown"


def test_reading_writes_nothing_into_the_activations():
    x = torch.randn(40, 24, device=DEVICE)
    before = x.clone()
    telemetry(x.view(4, 10, 24), 5, 0.1)
    assert torch.equal(x, before)


def test_nan_shows_in_its_own_chunk_alone():
    x = torch.randn(12, 12, device=DEVICE)
    x[3, 1] = float("nan")
    health = telemetry(x, 3, 0.1)
    assert health[0, 0].isnan()
    assert health[1:, :3].isfinite().all()
