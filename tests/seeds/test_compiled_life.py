"""A compiled host is one graph in every state of its seeds, whatever becomes of them: asleep or awake, with telemetry or not, in shadow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from growing import Net, batch, build, germinate, sample_loss, set_stage, short
from torch._dynamo.testing import CompileCounterWithBackend

from esper import attach
from esper.blueprints import MLP, Affine, Block, Conv
from esper.engine.extra_passes import DropoutReplay
from esper.engine.grow import Grow
from esper.engine.port import NullPort
from esper.lifecycle import Stage
from esper.seeds import TelemetryConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"
"""Where Triton runs kernels go through the compiler; on a CPU what is counted is the same, and compiling costs a second less."""


@pytest.fixture(autouse=True)
def same_kernels() -> Iterator[None]:
    """The compiler chooses no kernel by its speed: a graph that is made twice would have other sums when others use the GPU too."""
    from torch._inductor import config as compiler

    with compiler.patch(deterministic=True):
        yield


class Commands(NullPort):
    """Gives the commands of its script, and keeps the rows it is given."""

    def __init__(self, script: dict[int, list[Any]]) -> None:
        self.script = script
        self.refused: list[str] = []
        self.rows: list[tuple[int, str, torch.Tensor]] = []

    def commands(self, tick: int) -> list[Any]:
        return self.script.get(tick, [])

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        self.refused += [reason] if status != "applied" else []

    def telemetry(self, tick: int, site: str, rows: torch.Tensor) -> None:
        self.rows.append((tick, site, rows.clone()))


class Run:
    """A user's loop on a host of two sites; ``compiled`` as one graph, or the loop fails."""

    def __init__(self, script: dict[int, list[Any]], compiled: bool = True, state: Any = None, host: str = "mlp", **given: Any) -> None:
        self.host = host
        self.model = build(host).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01, weight_decay=0.1)
        self.port = Commands(script)
        settings: dict[str, Any] = {
            "lifecycle": short(),
            "sites": ["fc1", "fc2"],
            "per_site": 2,
            "blueprint": MLP(receptive_field="chunk", hidden=4),
            "judge": [self.batch(900, 64)],
            "telemetry": TelemetryConfig(every=5),
        }
        self.grow: Grow = attach(
            self.model, loss=sample_loss, optimizer=self.optimizer, total_steps=400, port=self.port, state=state,
            **(settings | given),
        )  # fmt: skip
        self.graphs = CompileCounterWithBackend(BACKEND)
        self.call: Any = torch.compile(lambda x: self.model(x), backend=self.graphs, fullgraph=True) if compiled else self.model
        self.number = 0

    def batch(self, number: int, size: int = 12) -> Any:
        return tuple(part.to(DEVICE) for part in batch(self.host, number, size))

    def step(self) -> torch.Tensor:
        data = self.batch(self.number)
        loss = sample_loss(self.call, data).mean()
        loss.backward()
        self.grow.after_backward(data, loss.detach())
        self.optimizer.step()
        self.grow.tick(loss.detach())
        self.optimizer.zero_grad()
        self.number += 1
        return loss.detach()

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    @property
    def stages(self) -> set[str]:
        return {name for branch in self.grow.registry.branches.entries for name, _ in branch.path}


LAYER: dict[str, Any] = {"receptive_field": "layer"}
CHANNELS: dict[str, Any] = {"host": "cnn_group", "sites": ["stages.0", "stages.1"]}
SLOW = {
    "layer": {"blueprint": MLP(hidden=4, **LAYER)},
    "affine of the layer": {"blueprint": Affine(**LAYER)},
    "conv": CHANNELS | {"blueprint": Conv(receptive_field="chunk")},
    "conv of the layer": CHANNELS | {"blueprint": Conv(**LAYER)},
}


def life(first: str = "fc1", second: str = "fc2") -> dict[int, list[Any]]:
    """Germination, cull, rollback and fossil at two sites of two seeds each."""
    return {
        1: [germinate(first)],
        3: [germinate(first, 1)],
        30: [set_stage(Stage.CULLED, first, 1)],
        40: [germinate(first, 1, "again"), germinate(second)],
        48: [set_stage(Stage.ROLLED_BACK, second)],
        56: [germinate(second, 0, "later"), germinate(second, 1)],
    }


LIFE = life()


@pytest.mark.parametrize("given", [{}, *(pytest.param(given, marks=pytest.mark.slow, id=name) for name, given in SLOW.items())])
def test_a_whole_life_is_five_graphs_and_what_the_seeds_do_is_felt(given: dict[str, Any]) -> None:
    torch.compiler.reset()
    script = life(*given["sites"]) if "sites" in given else LIFE
    run, plain = Run(script, **given), Run(script, compiled=False, **given)
    for step in range(90):
        losses = run.step(), plain.step()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4, msg=f"step {step}")
    assert run.stages >= {"CULLED", "ROLLED_BACK", "GRAFTING", "EVALUATING"}
    assert run.stages >= {"FOSSILIZED", "FINE_TUNING"} or "host" in given, "three channels see too little to pay"
    assert not run.grow.registry.compiled.leaves_graph
    assert not run.port.refused and len(run.grow.registry.branches.entries) == 6
    assert run.graphs.frame_count <= 5, f"{run.graphs.frame_count} graphs"
    assert [b.path for b in run.grow.registry.branches.entries] == [b.path for b in plain.grow.registry.branches.entries]
    for mine, other in zip(run.port.rows, plain.port.rows, strict=True):
        assert mine[:2] == other[:2]
        measured = [column for column in range(12) if column != 8]  # of what is frozen a graph has a gradient of zero, and eager none
        torch.testing.assert_close(mine[2][:, measured], other[2][:, measured], rtol=1e-2, atol=1e-4, equal_nan=True)


@pytest.mark.slow
def test_a_bank_that_doubles_again_and_again_compiles_nothing() -> None:
    torch.compiler.reset()
    given: dict[str, Any] = {"per_site": 7, "lifecycle": short(training_slots=100)}
    script = {tick: [germinate("fc1", seed), germinate("fc2", 6 - seed)] for tick, seed in ((1, 0), (12, 1), (20, 2), (28, 3), (36, 4))}
    run = Run(script, **given).steps(11)
    settled = run.graphs.frame_count
    run.steps(40)
    assert [run.grow.registry.layers[site].bank("mlp").capacity for site in (0, 1)] == [8, 8]
    assert run.graphs.frame_count == settled <= 5 and not run.port.refused


@pytest.mark.slow
def test_another_blueprint_compiles_once_and_at_another_site_no_more() -> None:
    torch.compiler.reset()
    affine = "affine"
    run = Run({1: [germinate("fc1")], 20: [germinate("fc1", 1, blueprint=affine)], 32: [germinate("fc2", 1, blueprint=affine)]})
    run.grow.registry.blueprints[affine] = Affine()
    run.steps(18)
    first = run.graphs.frame_count
    run.steps(12)
    second = run.graphs.frame_count
    run.steps(30)
    assert first <= 5 and second - first <= 3, "awake, with telemetry and without, and in shadow"
    assert run.graphs.frame_count == second and not run.port.refused
    assert {branch.blueprint for branch in run.grow.registry.branches.entries} == {"mlp", affine}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["copy", "zero_copy"])
def test_a_grown_block_is_in_the_graph_and_compiled_once_for_each_of_its_states(start: str) -> None:
    torch.compiler.reset()
    script: dict[int, list[Any]] = {2: [germinate("blocks.0")], 3: [germinate("blocks.1")]}
    given: dict[str, Any] = {"host": "decoder", "sites": ["blocks.0", "blocks.1"], "per_site": 1, "blueprint": Block(start=start)}
    run, plain = Run(script, **given), Run(script, compiled=False, **given)
    made = {}
    for step in range(90):
        losses = run.step(), plain.step()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4, msg=f"step {step}")
        made[step] = run.graphs.frame_count
    assert not run.grow.registry.compiled.leaves_graph and run.stages >= {"GRAFTING", "EVALUATING", "CULLED"} and not run.port.refused
    assert [b.path for b in run.grow.registry.branches.entries] == [b.path for b in plain.grow.registry.branches.entries]
    for mine, other in zip(run.port.rows, plain.port.rows, strict=True):
        assert mine[:2] == other[:2]
        measured = [column for column in range(12) if column != 8]  # of what is frozen a graph has a gradient of zero, and eager none
        torch.testing.assert_close(mine[2][:, measured], other[2][:, measured], rtol=1e-2, atol=1e-4, equal_nan=True)
    assert made[89] <= 8, f"two asleep, and two for each set of blocks: {made}"


@pytest.mark.slow
def test_a_grown_block_that_is_not_finite_changes_nothing_in_a_compiled_host() -> None:
    torch.compiler.reset()
    given: dict[str, Any] = {"host": "decoder", "sites": ["blocks.1"], "per_site": 1, "blueprint": Block(start="copy")}
    run = Run({1: [germinate("blocks.1")]}, lifecycle=short(grafting_max="300step", training_min="1step"), **given)
    run.steps(10)
    (branch,) = run.grow.registry.branches.entries
    assert branch.stage is Stage.GRAFTING
    data, host = run.batch(50), [p for name, p in run.model.named_parameters() if "seed_layer" not in name]
    with run.grow.registry.without(branch), torch.no_grad():
        wanted = run.model(data[0])
    with torch.no_grad():
        next(run.grow.registry.layers[0].bank("block").blocks["0"].parameters()).fill_(float("nan"))
    output = run.call(data[0])
    torch.testing.assert_close(output, wanted)
    sample_loss(run.call, data).mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in host if p.grad is not None)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_graphs() -> None:
    torch.compiler.reset()
    whole, first = Run(LIFE), Run(LIFE)
    losses = [whole.step() for _ in range(52)]
    first.steps(35)
    state, host = first.grow.state(), first.model.state_dict()
    moments = first.optimizer.state_dict()
    second = Run(LIFE, state=state)
    second.model.load_state_dict({name: value for name, value in host.items() if "seed_layer" not in name}, strict=False)
    second.optimizer.load_state_dict(moments)
    second.number = 35
    again = [second.step() for _ in range(17)]
    assert torch.equal(torch.stack(again), torch.stack(losses[35:])), "same bits"
    assert second.graphs.frame_count <= 5


@pytest.mark.slow
def test_a_model_of_the_same_class_without_seeds_does_not_lend_its_graph() -> None:
    torch.compiler.reset()
    run, bare, x = Run({1: [germinate("fc1")]}), Net().to(DEVICE), batch("mlp", 3)[0].to(DEVICE)
    without: Any = torch.compile(lambda x: bare(x), backend=BACKEND)
    for _ in range(14):
        without(x)
        run.step()
    with torch.no_grad():
        bank = run.grow.registry.layers[0].bank("mlp")
        for stack in bank.parameters():
            stack.add_(1.0)
    felt = run.call(x)
    torch.testing.assert_close(felt, run.model(x))
    with run.grow.registry.without(*run.grow.registry.branches.living()):
        assert not torch.allclose(felt, run.call(x)), "nor does a graph of the live forward serve another one"


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within: a wait for a GPU is an error."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("every", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_in_a_step_without_a_decision_the_host_never_waits(every: int) -> None:
    torch.compiler.reset()
    lasting = short(grafting_max="300step", training_min="1step")
    given: dict[str, Any] = {"lifecycle": lasting, "telemetry": TelemetryConfig(every=every), "count_macs": False}
    given |= {"judge": None, "sample": tuple(part.to(DEVICE) for part in batch("mlp", 1))}
    run = Run({1: [germinate("fc1"), germinate("fc1", 1)]}, grafting="linear", **given)
    run.grow.readings.late = True  # as on a GPU
    run.steps(12)
    assert run.stages >= {"GRAFTING"}
    data = [run.batch(number) for number in range(40)]
    run.batch = lambda number, size=12: data[number]  # type: ignore[method-assign]
    with without_waiting():
        run.steps(4)
    assert len(run.port.rows) == (2 * 15 if every == 1 else 0), "a step late"


CAPTURED = "reduce-overhead" if torch.cuda.is_available() else None
"""torch.compile's mode that replays captured graphs. A CPU has none, and goes through the same life uncaptured."""


class CapturedRun(Run):
    """The same loop in captured graphs, as a user asks for them."""

    def __init__(self, script: dict[int, list[Any]], **given: Any) -> None:
        super().__init__(script, compiled=False, **given)
        self.call = torch.compile(self.model, mode=CAPTURED, backend="inductor" if CAPTURED else BACKEND)


@pytest.mark.slow
def test_captured_graphs_go_through_a_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the seeds do is felt in every replay, and what the host does beside a graph is done at every step."""
    torch.compiler.reset()
    remembered = []
    monkeypatch.setattr(DropoutReplay, "remember", lambda self: remembered.append(self))
    run, plain = CapturedRun(LIFE), Run(LIFE, compiled=False)
    for step in range(90):
        before = len(remembered)
        asleep, losses = run.grow.replay.asleep, (run.step(), plain.step())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4, msg=f"step {step}")
        assert remembered[before:].count(run.grow.replay) >= (0 if asleep else 1), f"step {step}"
    assert [b.path for b in run.grow.registry.branches.entries] == [b.path for b in plain.grow.registry.branches.entries]
