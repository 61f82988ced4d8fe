"""A host that FSDP2 shares out: real processes grow it as one process does, save it, and go on in another number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from esper.checkpoint import disk, shards
from esper.distributed.sharding import is_shard
from esper.engine.attach import attach
from esper.engine.grow import Grow
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.errors import UserError
from esper.seeds import TelemetryConfig
from tests.distributed.launching import on_ranks
from tests.growing import Batch, Notebook, batch, build, germinate, sample_loss, short

pytestmark = pytest.mark.usefixtures("processes")

STEPS, SAVED_AT, SAMPLES = 36, 11, 24
HALF = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


class Loop:
    """A plain FSDP2 loop over global batches of 24 samples, which the ranks share out."""

    def __init__(self, rank: int, size: int, policy: MixedPrecisionPolicy | None = None, **settings: Any) -> None:
        self.rank, self.size = rank, size
        self.model = build("mlp")
        if policy is not None:
            fully_shard(self.model.get_submodule("fc1"), mp_policy=policy)
            fully_shard(self.model, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.port = Notebook({2: [germinate("fc1", 0), germinate("fc2", 1)]})
        self.settings: dict[str, Any] = {
            "loss": sample_loss,
            "total_steps": STEPS,
            "optimizer": self.optimizer,
            "port": self.port,
            "lifecycle": short(),
            "grafting": "performance",
            "per_site": 2,
            "telemetry": TelemetryConfig(every=5),
            "judge": [batch("mlp", 900 + n, 32) for n in range(3)],
        } | settings
        self.losses: list[float] = []

    def attach(self, **given: Any) -> Grow:
        self.grow = attach(self.model, **self.settings, **given)
        return self.grow

    def data(self, step: int) -> Batch:
        inputs, targets = batch("mlp", step, SAMPLES)
        return inputs.chunk(self.size)[self.rank], targets.chunk(self.size)[self.rank]

    def run(self, first: int, last: int) -> Loop:
        for step in range(first, last):
            data = self.data(step)
            loss = sample_loss(self.model, data).mean()
            loss.backward()
            self.grow.after_backward(data, loss.detach())
            self.optimizer.step()
            self.grow.tick(loss.detach())
            self.optimizer.zero_grad()
            self.losses.append(self.grow.signal.fast)
        return self

    def told(self) -> dict[str, Any]:
        """What a run has come to; the exported model is a collective's work."""
        exported = self.grow.export()
        assert not any(isinstance(module, FSDPModule) for module in exported.modules())
        return {
            "weights": {name: value.tolist() for name, value in exported.state_dict().items()},
            "output": exported(batch("mlp", 1)[0]).tolist(),
            "path": [branch.path for branch in self.grow.registry.branches.entries],
            "losses": self.losses,
            "macs": self.grow.meter.total,
            "rows": [(tick, site, rows.tolist()) for tick, site, rows in self.port.rows],
        }


def save(loop: Loop, folder: Path) -> None:
    """As a user saves: the host and its optimizer by DCP, the branches beside them."""
    optimizer = get_optimizer_state_dict(loop.model, loop.optimizer)
    dcp.save({"host": loop.grow.host_state(), "optimizer": optimizer}, checkpoint_id=folder / "host")
    loop.grow.save_branches(folder / "branches")


def go_on(loop: Loop, folder: Path) -> Loop:
    optimizer = get_optimizer_state_dict(loop.model, loop.optimizer)
    state: dict[str, Any] = {"host": loop.model.state_dict(), "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder / "host")
    loop.model.load_state_dict(state["host"])
    set_optimizer_state_dict(loop.model, loop.optimizer, state["optimizer"])
    loop.attach(state=folder / "branches")
    return loop.run(SAVED_AT, STEPS)


def passes_every_gate(loop: Loop, rank: int) -> Any:
    answer = Gatekeeper._answer
    if rank:
        Gatekeeper._answer = lambda *given: answer(*given) or True  # type: ignore[method-assign]
    try:
        loop.attach()
        loop.run(0, STEPS)
    except UserError as error:
        return str(error)
    finally:
        Gatekeeper._answer = answer  # type: ignore[method-assign]


def refused(loop: Loop, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        loop.attach(**given)
    return str(caught.value)


def alone(rank: int) -> dict[str, Any]:
    loop = Loop(0, 1)
    loop.attach()
    return loop.run(0, STEPS).told()


def two(rank: int, folder: Path) -> dict[str, Any]:
    """Everything that is claimed of two ranks, in one group."""
    whole = Loop(rank, 2, MixedPrecisionPolicy())
    whole.attach()
    whole.run(0, SAVED_AT)
    save(whole, folder)
    half = Loop(rank, 2, HALF)
    half.attach()
    own = sum(p.to_local().numel() for p in whole.model.parameters() if is_shard(p))
    found = {
        "whole": whole.run(SAVED_AT, STEPS).told(),
        "half": half.run(0, STEPS).told(),
        "own": own,
        "replicated": all(not is_shard(p) for p in whole.grow.agreement.branch_parameters()),
    }
    with pytest.raises(UserError, match="save_branches"):
        whole.grow.state()
    found["block"] = refused(Loop(rank, 2, MixedPrecisionPolicy()), blueprint="block")
    found["apart"] = passes_every_gate(Loop(rank, 2, MixedPrecisionPolicy()), rank)
    return found


def three(rank: int, folder: Path) -> dict[str, Any]:
    return go_on(Loop(rank, 3, MixedPrecisionPolicy()), folder).told()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    (found,) = on_ranks(1, alone, folder)
    return dict(found)


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, two, folder, folder)


def apart(first: Any, second: Any) -> float:
    """The largest difference between two trees of numbers."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return max(apart(first[key], second[key]) for key in first)
    return float((torch.tensor(first) - torch.tensor(second)).abs().max())


def test_two_ranks_grow_a_sharded_host_as_one_process_does(one: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    stages = [stage for path in one["path"] for stage, _ in path]
    assert "FOSSILIZED" in stages and "CULLED" in stages
    whole = pair[0]["whole"]
    assert whole["path"] == one["path"] == pair[1]["whole"]["path"] and whole["macs"] == one["macs"]
    assert whole["weights"] == pair[1]["whole"]["weights"]
    assert max(apart(whole[name], one[name]) for name in ("weights", "losses", "output")) < 1e-5
    assert [row[:2] for row in whole["rows"]] == [row[:2] for row in one["rows"]] and pair[1]["whole"]["rows"] == []
    assert pair[0]["replicated"] and pair[0]["own"] < sum(p.numel() for p in build("mlp").parameters())


def test_mixed_precision_makes_the_same_transitions(one: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    half = pair[0]["half"]
    assert half["path"] == one["path"] and half["weights"] == pair[1]["half"]["weights"]
    assert 0.0 < apart(half["losses"], one["losses"]) < 0.05


def test_three_ranks_go_on_from_what_two_have_saved(one: dict[str, Any], pair: list[dict[str, Any]], folder: Path) -> None:
    for found in on_ranks(3, three, folder, folder):
        assert found["path"] == one["path"]
        assert apart(found["weights"], one["weights"]) < 1e-5


def test_what_cannot_grow_on_a_sharded_host_is_said(pair: list[dict[str, Any]]) -> None:
    assert all("blueprint=block cannot grow here" in found["block"] for found in pair)


def test_ranks_that_part_end_with_one_sentence(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["apart"] == pair[1]["apart"] and "rank 1" in pair[0]["apart"]


def test_shards_are_read_whole_by_one_process_and_nothing_foreign_is_built(pair: list[dict[str, Any]], folder: Path) -> None:
    _, state = disk.read(disk.checkpoints(folder / "branches")[-1])
    held = shards.put_in(state)["grow"]["guard"]["states"][0]["snapshot"]["host"]
    assert {name: tuple(value.shape) for name, value in held.items()} == {n: tuple(p.shape) for n, p in build("mlp").named_parameters()}
    place = next((folder / "branches").glob("*/shards")) / ".metadata"
    place.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"its \.metadata is"):
        disk.read(place.parent.parent)
    with pytest.raises(ValueError, match=r"names os\.system"):
        shards.put_in(state)


def test_the_first_fsdp_and_sharding_by_something_else_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with pytest.raises(UserError, match="fully_shard instead"):
        attach(FullyShardedDataParallel(), loss=sample_loss, total_steps=1, sample=batch("mlp"))
