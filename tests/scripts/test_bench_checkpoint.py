"""The benchmark of rollbacks measures what it says: a branch that is at fault is there, is looked for and is removed."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmarks.checkpoint_parts import running


@pytest.mark.parametrize("host", running.HOSTS)
@pytest.mark.slow
def test_a_rollback_is_measured_with_a_culprit_too(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GROWN", 30)
    name = f"{host}: rollback with a culprit / step"
    assert running.LIMITS[name] == running.LIMITS[f"{host}: rollback / step"] == 2.0
    (ratio,) = running.rollback_with_a_culprit(host, 1, torch.device("cpu"))
    assert ratio.wall > 0.0
