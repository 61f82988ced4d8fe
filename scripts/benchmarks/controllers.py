"""`scripts/bench controllers`: milliseconds of processor time that a tick costs each controller, at 100 sites of 1,000 seeds.

A tick is everything that a controller does in it: hearing telemetry of every site, transitions and a metric, and deciding. It is measured
with telemetry and a decision due at every tick, the worst there is, on one core. Of ``hierarchical`` it is a round of the allocator at ten
times as many sites, each of which wants to grow; the network of ``policy`` is of the size that ``esper learn`` makes, with weights drawn by
lot. A controller in a process of its own (``controller.process=external``) does all of this beside the training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.controllers import CONFIGS
from esper.controllers.policy.network import GERMINATE, HIDDEN, PolicyNetwork, Words
from esper.controllers.policy.weights import packed, write
from esper.lifecycle.stages import Stage
from esper.messages import Acknowledgement, Germinate, Metrics, Proposal, RunStarted, Telemetry, Transition
from esper.randomness import generator
from esper.telemetry_columns import COLUMNS, Column

LIMITS_MS = {"heuristic": 5.0, "bandit": 10.0, "policy": 20.0, "hierarchical": 20.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "heuristic": {"germinate_at": "1step", "plateau": "1step", "count": 4, "max_active": 10**6},
    "bandit": {"germinate_at": "1step", "every": "1step", "max_active": 10**6},
    "policy": {"germinate_at": "1step", "every": "1step", "max_active": 10**6, "embargo": "0step"},
}
TOTAL = 10_000
BLUEPRINTS = {"mlp": 400, "affine": 16, "low_rank": 200, "glu": 600}
OBJECTIVES = ("shadow", "functional_gradient")


def drawn_policy(folder: str) -> str:
    """The file of a policy whose network, drawn by lot, germinates at every decision."""
    words = Words(tuple(BLUEPRINTS), ("linear", "drift", "momentum", "grad_norm"), OBJECTIVES)
    network = PolicyNetwork(words, HIDDEN, generator(0, "bench"))
    network.kinds[2].bias.data[GERMINATE] = 50.0
    path = Path(folder) / "policy.safetensors"
    write(packed(network, {"runs": 1.0, "decisions": 1.0, "error": 1e6, "rent": 0.02, "trend": 0.5}), path)
    return str(path)


def started(sites: int, seeds: int) -> RunStarted:
    """The start of a run of linear layers, all of the same size."""
    adds = {name: {"parameters": size, "macs": size} for name, size in BLUEPRINTS.items()}
    card = {"kind": "Linear", "width": 8 * seeds, "seeds": seeds, "blueprint": "mlp", "blueprints": adds, "telemetry_every": 1}
    card |= {"host_parameters": 10**7, "growth": True, "objectives": list(OBJECTIVES)}
    return RunStarted(tick=0, total_ticks=TOTAL, sites=[card | {"name": f"layers.{number}"} for number in range(sites)])


def measure(name: str, sites: int, seeds: int, ticks: int) -> list[float]:
    """Milliseconds of every tick but the first five."""
    with tempfile.TemporaryDirectory() as folder:
        controller = CONFIGS[name](**SETTINGS[name], **({"weights": drawn_policy(folder)} if name == "policy" else {})).build(0)
    controller.observe(started(sites, seeds))
    draws, spent = np.random.default_rng(0), []
    for tick in range(1, ticks + 1):
        rows = draws.random((sites, 1, seeds, len(COLUMNS)), dtype=np.float32)
        rows[..., Column.STAGE] = 0.0
        heard: list[Any] = [
            Telemetry(site=f"layers.{site}", ticks=[tick], seeds=seeds, columns=list(COLUMNS), data=rows[site].tobytes())
            for site in range(sites)
        ]
        heard.append(Metrics(tick=tick, values={"validation/loss": 1.0}))
        began = time.process_time()
        for message in heard:
            controller.observe(message)
        commands = controller.decide(tick)
        for command in commands:
            assert isinstance(command, Germinate)
            for target in (Stage.GERMINATED, Stage.CANCELLED, Stage.DORMANT):
                controller.observe(
                    Transition(
                        tick=tick, site=command.site, seed=command.seed, branch=0, source=0, target=target, cause="", why=command.why
                    )
                )
            controller.observe(Acknowledgement(command_id=command.id, status="applied", tick=tick))
        spent.append((time.process_time() - began) * 1000.0)
        if tick > 5 and not commands:
            print(f"  {name} decided nothing at tick {tick}")
    return spent[5:]


def allocate(sites: int, ticks: int) -> list[float]:
    """Milliseconds of every round of the allocator, under budgets of which all five bind or nearly do."""
    settings = {"max_parameters": 100 * sites, "max_macs": 90 * sites, "max_memory_mb": 0.0014 * sites, "max_risk": sites / 6}
    names = [f"layers.{number}" for number in range(sites)]
    controller = CONFIGS["hierarchical"](remote=names, round="1step", max_active=sites // 2, **settings).build(0)
    controller.observe(started(sites, 1))
    draws, spent = np.random.default_rng(0), []
    for tick in range(1, ticks + 1):
        for name in names:
            blueprint = ("mlp", "affine", "low_rank", "glu")[int(draws.integers(4))]
            wish = Germinate(id=f"{name}-{tick}", site=name, seed=0, blueprint=blueprint, why={"expected": float(draws.random())})
            controller.groups[name].pending = []
            controller.observe(Proposal(group=name, tick=tick, commands=[wish]))
        began = time.process_time()
        commands = controller.decide(tick)
        spent.append((time.process_time() - began) * 1000.0)
        for command in commands:
            controller.observe(Acknowledgement(command_id=command.id, status="refused", tick=tick))  # so that the next round is as large
    return spent[2:]


def main(arguments: list[str]) -> int:
    """Print the median and the fastest and slowest fifth; 1 when a median is above its limit."""
    parser = argparse.ArgumentParser(prog="scripts/bench controllers", description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=40)
    parser.add_argument("names", nargs="*", default=list(LIMITS_MS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    slow, sizes = 0, (options.sites, options.seeds)
    for name in options.names or LIMITS_MS:
        found = allocate(10 * options.sites, options.ticks) if name == "hierarchical" else measure(name, *sizes, options.ticks)
        cuts = statistics.quantiles(found, n=5)
        middle = statistics.median(found)
        slow += middle > LIMITS_MS[name]
        print(f"{name:12} {middle:6.2f} ms a tick ({cuts[0]:.2f} to {cuts[-1]:.2f}; limit {LIMITS_MS[name]:.0f})")
    where = f"{options.sites} sites x {options.seeds} seeds, {10 * options.sites} sites for the allocator"
    print(f"{where}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return int(slow > 0)
