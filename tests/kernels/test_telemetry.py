"""The telemetry op against the reference, on both of its routes: whole rows in registers, and means through memory."""

import pytest
import torch

from esper.kernels import launch_rules, reference
from esper.kernels.telemetry import telemetry
from tests.kernels.sites import DEVICE, error

SHAPES = [(64, 32, 4), (37, 30, 7), (33, 10, 10), (20, 8, 1), (9, 300, 2), (40, 64, 64)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "seeds"), SHAPES)
def test_both_routes_agree_with_the_reference(monkeypatch, rows, width, seeds, dtype, whole):
    if not whole:
        monkeypatch.setattr(launch_rules, "whole_rows", lambda *_: None)
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) + 3).to(dtype).to(DEVICE)
    assert error(telemetry(x, seeds, 0.5), reference.telemetry(x.double(), seeds, 0.5)) <= 1e-5


def test_a_large_mean_does_not_cancel_the_variance():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.1 + 1000
    found, expected = telemetry(x, 8, 0.5), reference.telemetry(x.double(), 8, 0.5)
    assert error(found[:, 1], expected[:, 1]) <= 1e-4
    assert error(found[:, 3], expected[:, 3]) <= 1e-2


def test_widest_site_and_a_seed_a_feature():
    x = torch.randn(2, 65536, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for seeds in (1, 65536):
        assert error(telemetry(x, seeds, 0.1)[:, :3], reference.telemetry(x.double(), seeds, 0.1)[:, :3]) <= 1e-4


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
