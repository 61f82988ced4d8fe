"""``attach`` in a loop of the user's own under DistributedDataParallel: several real processes grow one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from esper.engine.attach import attach
from esper.lifecycle import Stage
from esper.seeds import TelemetryConfig
from tests.distributed.launching import on_ranks
from tests.growing import Notebook, batch, build, germinate, sample_loss, short

pytestmark = pytest.mark.usefixtures("processes")


def grow(rank: int, steps: int = 60, wrapped: bool = True, **settings: Any) -> dict[str, Any]:
    """A plain DDP loop; every rank has batches of its own."""
    host = settings.pop("host", "mlp")
    model = build(host)
    trained = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    port = Notebook({2: [germinate("fc1", 0), germinate("fc2", 1)]})
    given = {
        "lifecycle": short(),
        "per_site": 2,
        "telemetry": TelemetryConfig(every=10),
        "judge": [batch(host, 900 + n, 32) for n in range(3)],
    }
    handle = attach(trained, loss=sample_loss, total_steps=steps, optimizer=optimizer, port=port, **given | settings)
    for step in range(steps):
        data = batch(host, 2 * step + rank)
        loss = sample_loss(trained, data).mean()
        loss.backward()
        handle.after_backward(data, loss.detach())
        optimizer.step()
        handle.tick(loss.detach())
        optimizer.zero_grad()
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "stages": port.stages(),
        "path": [branch.path for branch in handle.registry.branches.entries],
        "counts": dict(handle.transitions.counts),
        "rows": len(port.rows),
        "macs": handle.meter.total,
        "alive": [branch.stage is Stage.FOSSILIZED for branch in handle.registry.branches.entries],
    }


def test_two_ranks_with_data_of_their_own_grow_the_same_branches(tmp_path: Path) -> None:
    first, second = on_ranks(2, grow, tmp_path)
    assert first["counts"]["germinated"] == 2 and any(target == "EVALUATING" for _, target in first["stages"])
    assert first["path"] == second["path"] and first["weights"] == second["weights"]
    assert first["rows"] > 0 and second["rows"] == 0 and second["stages"] == []
