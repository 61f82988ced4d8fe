"""Every scheduler of torch in a user's own loop: it survives germination, and branches follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import batch, build, sample_loss, short
from test_own_loop import JUDGE, scheduled
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from esper import attach
from esper.engine.grow import Grow

Optimizer = torch.optim.Optimizer
Scheduled = Callable[[Optimizer], Any]

SCHEDULERS: dict[str, Scheduled] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 8]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=60),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, 0.002, anneal_epochs=5),
}


def rates(make: Callable[[Any], Optimizer], schedule: Scheduled, first: bool) -> tuple[list[float], list[list[float]], Grow]:
    """(rates of the branches, those of the host's groups) over 12 steps, the scheduler made before attaching or after."""
    model = build("mlp")
    optimizer = make(model)
    scheduler = schedule(optimizer) if first else None
    settings: dict[str, Any] = {"lifecycle": short(), "sites": "fc1", "controller": scheduled()}
    grow = attach(model, loss=sample_loss, optimizer=optimizer, judge=JUDGE, total_steps=60, **settings)
    scheduler = scheduler or schedule(optimizer)
    seen, host = [], []
    for step in range(12):
        loss = sample_loss(model, batch("mlp", step)).mean()
        loss.backward()
        grow.after_backward(batch("mlp", step), loss.detach())
        optimizer.step()
        host.append([float(group["lr"]) for group in optimizer.param_groups])
        grow.tick(loss.detach())
        seen.append(grow.settings.learning.lr * grow.host_rate.factor())
        optimizer.zero_grad()
        scheduler.step(*([float(loss.detach())] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert grow.transitions.counts["germinated"] == 1 and len(optimizer.param_groups) == len(host[0])
    return seen, host, grow


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_of_torch_survives_germination_and_branches_follow_it(name: str, first: bool) -> None:
    """Beside an Adam the branches learn at its rate; beside SGD at their own, times the host's share of its highest rate so far."""
    seen, host, _ = rates(lambda model: torch.optim.AdamW(model.parameters(), 0.01), SCHEDULERS[name], first)
    assert seen == pytest.approx([rate for (rate,) in host], rel=1e-5)
    seen, host, _ = rates(lambda model: torch.optim.SGD(model.parameters(), 0.01), SCHEDULERS[name], first)
    start = 0.001 if name == "CyclicLR" else 0.01  # nobody who sees only the optimizer can tell how high a cycle will climb
    highest = [max(start, *(rate for (rate,) in host[: step + 1])) for step in range(12)]
    assert seen == pytest.approx([1e-3 * rate / top for (rate,), top in zip(host, highest, strict=True)], rel=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["CosineAnnealingLR", "OneCycleLR", "LambdaLR", "SWALR"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_group_with_the_highest_rate_is_followed_not_a_frozen_one_before_it(kind: Any, name: str, first: bool) -> None:
    def groups(model: Any) -> Optimizer:
        backbone, rest = model.fc1.parameters(), [*model.fc2.parameters(), *model.head.parameters()]
        frozen, learning = {"lr": 0.0, "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 0.3}
        return kind([{"params": backbone, **frozen}, {"params": rest, **learning}], lr=0.001)

    each = {"OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.0, 0.01], total_steps=60)}
    seen, host, grow = rates(groups, each.get(name, SCHEDULERS[name]), first)
    adam = kind is torch.optim.AdamW
    assert seen == pytest.approx([(rate if adam else rate / 0.01 * 1e-3) for _, rate in host], rel=1e-5) and seen[-1] > 0
    assert grow.settings.learning.weight_decay == (0.3 if adam else 0.0)


def test_a_cycle_that_climbs_a_hundredfold_never_drives_branches_beyond_their_own_rate() -> None:
    def cycle(optimizer: Optimizer) -> Any:
        return lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, step_size_up=4, cycle_momentum=False)

    made = [rates(lambda model: torch.optim.SGD(model.parameters(), 0.05), cycle, first) for first in (True, False)]
    (seen, host, grow), (again, _, _) = made
    assert seen == again and max(seen) == 1e-3
    assert seen[4:] == pytest.approx([1e-3 * rate / 0.1 for (rate,) in host[4:]])
    given: dict[str, Any] = {"optimizer": grow.optimizer, "total_steps": 60, "lifecycle": short(), "controller": scheduled()}
    second = attach(build("mlp"), loss=sample_loss, judge=JUDGE, sites="fc1", state=grow.state(), **given)
    assert second.host_rate.peak == grow.host_rate.peak == pytest.approx(100.0)
