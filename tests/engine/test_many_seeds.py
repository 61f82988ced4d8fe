"""Seeds by the hundred thousand: what one of them keeps in memory, and what it costs to leave it alone."""

from __future__ import annotations

import torch
from growing import Notebook, short
from torch import nn

from esper.engine.attach import attach
from esper.lifecycle import SeedTable
from esper.messages import Germinate
from esper.seeds import TelemetryConfig

SEEDS = 4096


def _grow(port: Notebook):  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(3, SEEDS), nn.ReLU(), nn.Linear(SEEDS, 2))
    return attach(
        model, loss=lambda model, batch: model(batch).square().mean(1), total_steps=400, sites=["0"], per_site=SEEDS,
        sample=torch.ones(4, 3), lifecycle=short(), telemetry=TelemetryConfig(every=1), port=port, count_macs=False,
    )  # fmt: skip


def test_a_seed_keeps_at_most_64_bytes() -> None:
    grow = _grow(Notebook())
    grow.loss(grow.registry.model, torch.ones(4, 3)).mean().backward()
    grow.tick(1.0)
    observer = grow.observer
    held = sum(rows.untyped_storage().nbytes() for rows in observer.health)
    assert held / SEEDS + grow.registry.table.bytes_per_seed <= 64
    assert observer.row(7)[2] == observer.health[0][7, 0] != 0.0, "the mean of its last activation is at hand all the same"


def test_a_tick_with_nothing_to_do_searches_no_column(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    grow = _grow(Notebook({3: [Germinate(id="g", site="0", seed=9)]}))
    searched = []
    original = SeedTable._fresh

    def counted(table: SeedTable) -> set[int]:
        searched.append(table.columns["stage"]._version != table._known)
        return original(table)

    monkeypatch.setattr(SeedTable, "_fresh", counted)
    for _ in range(6):
        grow.tick(1.0)
    assert grow.registry.branches.entries and searched and not any(searched)
