"""What a training step of the default small run does, counted: forwards, optimizer steps, torch operations, their allocations
and bytes, waits for a value, messages, compiled graphs.

Counts do not depend on the machine's mood, so a test holds every one of them against ``counts.json``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.cli.compose import compose
from esper.engine.port import NullPort
from esper.messages import Germinate, Message
from esper.running.builders import build_trainer
from esper.trainer.trainer import Trainer

RESULT = Path(__file__).with_suffix(".json")
#: Nothing here depends on a loss: gates stay shut or are open whatever is measured.
COMMON = (
    "trainer.steps=1000",
    "trainer.validate_every=100%",
    "trainer.governor_snapshot=100%",
    "telemetry.every=10",
    "controller=none",
    "tracking=none",
    "lifecycle.readiness=-1.0",
    "lifecycle.training_min=6step",
    "lifecycle.grafting_max=100%",
    "grafting.ramp=50%",
)
GERMINATES = 5
#: Name → (step, what is special about it): the seeds germinate at tick 5, are TRAINING from 6 to 12 and GRAFTING from then on.
STEPS = {"dormant": 3, "training": 8, "grafting": 16, "grafting and telemetry": 19}
READS = ("_local_scalar_dense", "nonzero", "masked_select")
"""Operations whose answer Python, or a shape, waits for: on a GPU the host and the device meet there."""


class Port:
    """Counts what the engine says, and lets one seed of every site germinate."""

    slot = NullPort.slot

    def __init__(self) -> None:
        self.said: Counter[str] = Counter()
        self.sites: list[str] = []

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """Now the sites are known."""
        self.sites = [site["name"] for site in sites]

    def commands(self, tick: int) -> list[Any]:
        """All at once."""
        return [Germinate(id=site, site=site, seed=0) for site in self.sites] if tick == GERMINATES else []

    def emit(self, event: Message) -> None:
        """One of its kind."""
        self.said[type(event).__name__.lower()] += 1

    def __getattr__(self, name: str) -> Callable[..., None]:
        def say(*words: Any) -> None:
            self.said[name] += 1

        return say


class Operations(TorchDispatchMode):
    """Counts torch's operations (on a GPU a kernel launch each, views apart), what they allocate, and reads that wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.allocations = self.bytes = self.waits = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waits += operation.overloadpacket.__name__ in READS
        found = operation(*args, **(kwargs or {}))
        if not any(answer.alias_info for answer in operation._schema.returns):  # neither a view nor in place
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    self.allocations += 1
                    self.bytes += tensor.nbytes
        return found

    def counts(self) -> dict[str, int]:
        """What was counted, by name."""
        return {"operations": self.count, "allocations": self.allocations, "bytes": self.bytes, "waits": self.waits}


def counted(trainer: Trainer, port: Port) -> dict[str, int]:
    """One step."""
    calls: Counter[str] = Counter()
    host = trainer.model.register_forward_pre_hook(lambda *_: calls.update(["host forwards"]))
    optimizer = trainer.optimizer.register_step_pre_hook(lambda *_: calls.update(["optimizer steps"]))
    port.said.clear()
    with Operations() as operations:
        trainer.advance()
    host.remove()
    optimizer.remove()
    said = {f"said: {name}": count for name, count in sorted(port.said.items())}
    return {**calls, **operations.counts(), **said}


def built(*words: str) -> tuple[Trainer, Port]:
    """The trainer of the default small run."""
    config = compose([*COMMON, *words])
    port = Port()
    trainer = build_trainer(config, config.task.build(), torch.device("cpu"), port)  # type: ignore[arg-type]
    trainer.model.train()
    return trainer, port


def steps() -> dict[str, dict[str, int]]:
    """The counts of one step of every kind."""
    trainer, port = built()
    found = {}
    for name, step in STEPS.items():
        while trainer.outcome.steps < step:
            trainer.advance()
        found[name] = counted(trainer, port)
        stages = {branch.stage.name.lower() for branch in trainer.grow.registry.branches.entries} or {"dormant"}
        assert stages == {name.partition(" ")[0]}, f"step {step} is not what it is called: {stages}"
    return found


def graphs() -> dict[str, int]:
    """Graphs that ``trainer.compile=true`` makes before and after seeds have germinated, with a compiler that compiles nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    ordinary = torch.compile
    torch.compile = lambda model, **_: ordinary(model, backend="eager")  # type: ignore[assignment]
    try:
        trainer, _ = built("trainer.compile=true")
        found = {}
        for name, step in STEPS.items():
            while trainer.outcome.steps <= step:
                trainer.advance()
            found[name] = counters["stats"]["unique_graphs"]
    finally:
        torch.compile = ordinary
        torch._dynamo.reset()
    return found


def counts() -> dict[str, Any]:
    """All of them, with the torch they were counted with."""
    torch.set_num_threads(1)
    return {"torch": torch.__version__.partition("+")[0], "steps": steps(), "graphs so far": graphs()}


def main(arguments: list[str]) -> int:
    """Print the counts; ``--write`` keeps them as what the test expects."""
    parser = argparse.ArgumentParser(prog="scripts/bench counts", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep them in {RESULT.name}")
    options = parser.parse_args(arguments)
    text = json.dumps(counts(), indent=1)
    print(text)
    if options.write:
        RESULT.write_text(text + "\n", encoding="utf-8")
    return 0
