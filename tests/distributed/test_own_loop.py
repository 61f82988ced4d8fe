"""``attach`` in a loop of the user's own under DistributedDataParallel: several real processes grow one model, or end with a sentence."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from esper.distributed.ranks import Ranks
from esper.engine import tick
from esper.engine.attach import attach
from esper.engine.judging.gatekeeper import Gatekeeper
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
        "loss": handle.signal.state(),
        "alive": [branch.stage is Stage.FOSSILIZED for branch in handle.registry.branches.entries],
    }


def judged_by_another_set(rank: int) -> Any:
    return grow(rank, judge=[batch("mlp", 900 + rank, 32)])


def longer(rank: int) -> Any:
    return grow(rank, 60 + rank)


def another_seed(rank: int) -> Any:
    return grow(rank, seed=rank)


def another_objective(rank: int) -> Any:
    return grow(rank, lifecycle=short(objective="shadow" if rank else "functional_gradient"))


def unwrapped(rank: int) -> Any:
    return grow(rank, wrapped=False)


def passes_every_gate(rank: int) -> Any:
    answer = Gatekeeper._answer
    if rank:
        Gatekeeper._answer = lambda *given: answer(*given) or True  # type: ignore[method-assign]
    return grow(rank)


def is_a_step_ahead(rank: int) -> Any:
    values = Ranks.values
    if rank:
        Ranks.values = lambda ranks, label, value: values(ranks, label.replace("step 10", "step 11"), value)  # type: ignore[method-assign]
    return grow(rank)


def dies(rank: int) -> Any:
    values = Ranks.values

    def dying(ranks: Ranks, label: str, value: Any) -> list[Any]:
        if rank == 2 and label == "step 10":
            os.kill(os.getpid(), signal.SIGKILL)
        return values(ranks, label, value)

    Ranks.values = dying  # type: ignore[method-assign]
    return grow(rank)


def alphas_of_its_own(rank: int) -> Any:
    step_many = tick.step_many

    def other(*given: Any) -> Any:
        out = step_many(*given)
        out.alpha.fill_(0.9)
        return out

    if rank:
        tick.step_many = other
    return grow(rank)


def late_and_by_a_wrong_clock(rank: int) -> Any:
    if rank:
        now, counter, values = time.time, time.perf_counter, Ranks.values
        time.time, time.perf_counter = lambda: now() - 1e9, lambda: 7.0 * counter()
        Ranks.values = lambda *given: (time.sleep(0.002), values(*given))[1]  # type: ignore[assignment]
    return grow(rank)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks that nothing disturbs."""
    return on_ranks(2, grow, tmp_path_factory.mktemp("grown"))


def test_two_ranks_with_data_of_their_own_grow_the_same_branches(grown: list[dict[str, Any]]) -> None:
    first, second = grown
    assert first["counts"]["germinated"] == 2 and any(target == "EVALUATING" for _, target in first["stages"])
    assert all(first[name] == second[name] for name in ("path", "weights", "macs", "loss"))
    assert first["rows"] > 0 and second["rows"] == 0 and second["stages"] == [], "rank 0 alone tells"


@pytest.mark.parametrize("work", [alphas_of_its_own, late_and_by_a_wrong_clock])
def test_what_one_rank_would_decide_by_itself_changes_nothing(work: Callable[[int], Any], grown: list[Any], tmp_path: Path) -> None:
    assert on_ranks(2, work, tmp_path) == grown


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (judged_by_another_set, "The judge set of rank 1 is not that of rank 0"),
        (longer, "The length of the run (total_steps, steps_per_epoch, accumulate or lifecycle.clock) of rank 1 is not that of rank 0"),
        (another_seed, "The random seed of rank 1 is not that of rank 0"),
        (another_objective, "The lifecycle of rank 1 is not that of rank 0"),
        (unwrapped, "After step 1, the host's weights on rank 1 are not those of rank 0"),
        (passes_every_gate, "the stages of seeds on rank 1 are not those of rank 0"),
        (is_a_step_ahead, "rank 0 has come to 'step 10', and rank 1 to 'step 11'"),
    ],
)
def test_ranks_that_are_not_alike_end_with_one_sentence_on_each(work: Callable[[int], Any], sentence: str, tmp_path: Path) -> None:
    said = on_ranks(2, work, tmp_path)
    assert said[0] == said[1] and said[0][0] == "UserError" and sentence in said[0][1], said


def leaves(rank: int) -> Any:
    ranks = Ranks()
    if rank:
        ranks.leave("the data are not here")
        return "left"
    return ranks.values("a value", 1)


def test_a_rank_that_cannot_go_on_tells_rank_0_why(tmp_path: Path) -> None:
    assert on_ranks(2, leaves, tmp_path) == [("RankLost", "Rank 1 has ended: the data are not here"), "left"]


def test_the_others_name_the_rank_that_died(tmp_path: Path) -> None:
    said = on_ranks(4, dies, tmp_path)
    assert said.pop(2) is None
    assert all(kind == "RankLost" and text.startswith("Rank 2 (process ") for kind, text in said), said
