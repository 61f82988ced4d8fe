"""A small run's story in real messages, and the real bus it travels on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from esper.bus.config import MemoryConfig
from esper.bus.memory.bus import MemoryBus
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Message, Metrics, RunEnded, RunStarted, Telemetry, TickEnded, Transition
from esper.telemetry_columns import COLUMNS
from esper.tracking import DatasetInfo, RunInfo

SEEDS = 4
SITES = ("layers.0", "layers[1]")
SUMMARY = {
    "metrics": {"final": {"accuracy": 0.91}, "best": {"accuracy": 0.93}},
    "seeds": {"germinated": 3, "fossilized": 2},
}
GATES = {
    Stage.GRAFTING: "readiness",
    Stage.STABILIZATION: "ramp",
    Stage.EVALUATING: "stability",
    Stage.FINE_TUNING: "gain",
    Stage.FOSSILIZED: "final_gain",
}
KEPT = (
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.GRAFTING,
    Stage.STABILIZATION,
    Stage.EVALUATING,
    Stage.FINE_TUNING,
    Stage.FOSSILIZED,
)
LOST = (
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.GRAFTING,
    Stage.STABILIZATION,
    Stage.EVALUATING,
    Stage.CULLED,
    Stage.DORMANT,
)


def plan(ticks: int) -> list[tuple[int, str, int, Stage, Stage]]:
    """Every transition of the story as (tick, site, seed, source, target)."""
    found = []
    for number, (site, seed, path) in enumerate([(SITES[0], 1, KEPT), (SITES[0], 3, LOST), (SITES[1], 0, KEPT)]):
        before, tick = Stage.DORMANT, ticks // 10 * (number + 1)
        for target in path:
            found.append((tick, site, seed, before, target))
            before, tick = target, tick + ticks // 12
    return sorted(item for item in found if item[0] <= ticks)


def telling(ticks: int, since: int = 0, *, until: int | None = None) -> list[tuple[str, Message]]:
    """(stream, message) of a run of ``ticks`` ticks, resumed after tick ``since``, killed after tick ``until``."""
    out: list[tuple[str, Message]] = []

    def say(message: Message) -> None:
        out.append(("telemetry" if isinstance(message, Telemetry) else "events", message))

    say(RunStarted(tick=since, total_ticks=ticks, sites=[{"name": site, "seeds": SEEDS} for site in SITES]))
    transitions = plan(ticks)
    stages = {site: np.zeros(SEEDS, np.float32) for site in SITES}
    for tick in range(1, (ticks if until is None else until) + 1):
        for when, site, seed, source, target in transitions:
            if when == tick:
                stages[site][seed] = target
            if tick > since and target in GATES and when - 2 <= tick <= when:
                _look(say, tick, site, seed, target, tick - when + 2)
            if tick > since and when == tick:
                say(Transition(tick=tick, site=site, seed=seed, branch=seed, source=source, target=target, cause="gate",
                               generation=1, blueprint="mlp", strategy="linear"))  # fmt: skip
        if tick > since:
            for site in SITES:
                say(Telemetry(site=site, ticks=[tick], seeds=SEEDS, columns=list(COLUMNS), data=_rows(tick, stages[site])))
            accuracy = 0.95 - 0.8 * math.exp(-3 * tick / ticks)
            values = {
                "train/loss": 2.3 * math.exp(-2 * tick / ticks) + 0.02 * math.sin(tick),
                "cost/macs": 1e6 * tick * (1 + tick / ticks),
            }
            if tick % 10 == 0:
                values["validation/accuracy"] = accuracy
            say(Metrics(tick=tick, values=values))
            say(TickEnded(tick=tick))
    if until is None:
        say(RunEnded(tick=ticks, status="FINISHED", summary=SUMMARY))
    return out


def _look(say, tick: int, site: str, seed: int, target: Stage, look: int) -> None:
    value = 0.02 * (look - 1.5) + 0.01 * seed
    say(
        GateResult(
            tick=tick,
            site=site,
            seed=seed,
            branch=seed,
            gate=GATES[target],
            value=value,
            threshold=0.0,
            passed=look == 2,
            look=look,
        )
    )


def _rows(tick: int, stages: np.ndarray) -> bytes:
    block = np.zeros((SEEDS, len(COLUMNS)), np.float32)
    block[:, 0] = stages
    block[:, 1] = np.where(stages >= Stage.GRAFTING, 0.5, 0.0)
    block[:, 2] = tick
    block[:, 3], block[:, 4] = 2.0, np.arange(SEEDS) / SEEDS
    block[:, 7] = np.where(stages >= Stage.GRAFTING, 0.2, 0.0)
    block[:, 8] = np.where((stages >= Stage.TRAINING) & (stages < Stage.FOSSILIZED), 5.0, np.nan)
    block[:, 11] = np.where(stages == Stage.FOSSILIZED, 0.03, np.nan)
    return block.tobytes()


@pytest.fixture
def story():
    """The function that tells the story."""
    return telling


@pytest.fixture
def bus(tmp_path: Path) -> MemoryBus:
    """The real in-process bus."""
    bus = MemoryBus(MemoryConfig(), tmp_path / "bus")
    yield bus
    bus.close()


@pytest.fixture
def publish(bus: MemoryBus):
    """Publish a story, as the trainer does."""

    def tell(run: str, story: list[tuple[str, Message]]) -> None:
        producers = {stream: bus.producer(stream, run) for stream in ("telemetry", "events")}
        for stream, message in story:
            producers[stream].publish(message)

    return tell


@pytest.fixture
def info(tmp_path: Path) -> RunInfo:
    """A run whose outputs lie in tmp_path."""
    folder = tmp_path / "outputs" / "run-1"
    folder.mkdir(parents=True)
    return run_info("run-1", folder)


def run_info(run: str, folder: Path, **changes) -> RunInfo:
    """A run with everything filled in."""
    values = {
        "run": run,
        "name": "digits-mlp seed=0 linear",
        "folder": str(folder),
        "outputs": str(folder.parent),
        "started_ms": 1_700_000_000_000,
        "config": {"seed": 0, "trainer": {"steps": 100}},
        "changed": {"trainer.steps": "100"},
        "chosen": {"model": "mlp"},
        "tags": {"config": "abc", "seed": "0", "arm": "grow"},
        "dataset": DatasetInfo(name="digits", digest="d" * 64, description="8×8 digits", sizes={"train": 1000}),
        "primary": "accuracy",
    }
    return RunInfo(**(values | changes))


@pytest.fixture
def make_info():
    """The function that describes a run."""
    return run_info
