"""The state of a ``Grow`` and of a ``Trainer`` as a tree, taken between two steps, and how a fresh one takes it over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.checkpoint.tree import kept
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.engine.judging.gatekeeper import GateRecord
from esper.engine.snapshot import optimizer_state, restore_optimizer
from esper.errors import UserError
from esper.kernels import MISMATCH
from esper.randomness import GlobalDraws
from esper.seeds.layer import ATTRIBUTE

if TYPE_CHECKING:
    from esper.engine.grow import Grow
    from esper.trainer.trainer import Trainer

Tree = dict[str, Any]


def topology(grow: Grow) -> Tree:
    """What must agree before a tensor is loaded: the host's tensors and modules' classes, the sites with their seeds (JSON-able).

    What a module does is known by its class alone: a function called in ``forward`` is not seen.
    """
    model = grow.registry.model
    named = {**host_parameters(model), **host_buffers(model)}
    host = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in named.items()}
    modules = {name: type(module).__name__ for name, module in model.named_modules() if ATTRIBUTE not in name.split(".")}
    return {"host": host, "modules": modules, **grow.registry.topology()}


def refuse_misfit(saved: Any, present: Tree, where: str) -> None:
    """Raise UserError, naming the first difference, unless both topologies are the same."""
    there, here = (dict(side) if isinstance(side, dict) else {} for side in (saved, present))
    if "modules" not in there:  # saved before schema 5
        here.pop("modules", None)
    if there == here:
        return
    reason = "it describes another kind of run"
    for key in ("host", "modules", "sites", "blueprint", "silent"):
        if there.get(key) != here.get(key):
            reason = _difference(key, there.get(key), here.get(key))
            break
    raise UserError(f"{where} does not fit this run: {reason}; build the same host and sites, or start a new run.")


def _difference(key: str, there: Any, here: Any) -> str:
    if key == "host" and isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                return f"the host's '{name}' is {_shape(there.get(name))} there and {_shape(here.get(name))} here"
    if key == "modules" and isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                return f"the host's module '{name}' is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    if key == "sites" and isinstance(there, list) and isinstance(here, list):
        for old, new in zip(there, here, strict=False):
            if old != new:
                return f"it has a site {old} where this run has {new}"
        return f"it has {len(there)} sites and this run {len(here)}"
    return f"its {key} is {there!r} and this run's {here!r}"


def _shape(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[0]} {entry[1]}"


def grow_state(grow: Grow) -> Tree:
    """Everything that seeds, branches and their lives depend on, by reference."""
    advance = grow.advance
    grow.readings.arrive()
    return {
        "topology": topology(grow),
        "tick": grow.tick_number,
        "step": grow.steps,
        "garden": grow.registry.state(),
        "plans": [[[group.forwards, group.failures] for group in layer.plan] for layer in grow.registry.layers],
        "objective": grow.objective.state(),
        "signal": grow.signal.state(),
        "counts": dict(grow.transitions.counts),
        "guard": grow.guard.state(),
        "metric": advance.metric,
        "averages": {str(branch): list(values) for branch, values in advance.weights.averages.items()},
        "gates": {name: vars(record).copy() for name, record in grow.gates.records.items()},
        "said": sorted(grow.gates.said),
        "refusals": dict(grow.executor.refusals),
        "failures": {str(branch): count for branch, count in grow.branch_optimizer.failures.items()},
        "norms": {str(branch): norm for branch, norm in grow.branch_optimizer.norms.items()},
        "rates": {str(branch): rate for branch, rate in grow.rates.items()},
        "rows": list(grow.observer.health),
        "followers": [follower.state() for follower in grow.followers],
        "macs": dict(grow.meter.spent),
        "seconds": {**grow.clock.seconds, "total": grow.clock.total},
    }


def load_grow(grow: Grow, state: Tree) -> None:
    """Take over ``grow_state``; the caller prepares the next forward afterwards.

    Raises UserError for a state of another topology, before a tensor of it is looked at, and for one that does not fit.
    """
    with fitting():
        refuse_misfit(state.get("topology"), topology(grow), "The saved state")
        _load_grow(grow, kept(state))


@contextmanager
def fitting() -> Iterator[None]:
    """Within: a state that is not built as ours are is refused in words; whole files hold only what was written."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"The saved state cannot be taken over: {reason}; it is of something else, made by another version of esper or tampered with."
        ) from error


def _load_grow(grow: Grow, state: Tree) -> None:
    grow.tick_number = grow.transitions.tick = int(state["tick"])
    grow.steps = int(state["step"])
    grow.registry.load(state["garden"])
    for layer, counters in zip(grow.registry.layers, state["plans"], strict=True):
        for group, (forwards, failures) in zip(layer.plan, counters, strict=True):
            group.forwards = int(forwards)
            group.failures.copy_(failures)
    grow.objective.load(state["objective"])
    grow.signal.load(state["signal"])
    grow.transitions.counts = {name: int(state["counts"][name]) for name in grow.transitions.counts}
    device = next(iter(host_parameters(grow.registry.model).values())).device
    grow.guard.load(state["guard"], device)
    grow.advance.metric = state["metric"]
    averages = state["averages"].items()
    grow.advance.weights.averages = {int(branch): [value.to(device) for value in values] for branch, values in averages}
    grow.known_averages = list(state.get("followers", []))
    grow.gates.records = {name: GateRecord(**record) for name, record in state["gates"].items()}
    grow.gates.said = set(state["said"])
    if grow.registry.kernels is not None and MISMATCH in grow.gates.said:
        grow.registry.kernels.tripped = True
    grow.executor.refusals = dict(state["refusals"])
    grow.branch_optimizer.failures = {int(branch): int(count) for branch, count in state["failures"].items()}
    grow.branch_optimizer.norms = {int(branch): float(norm) for branch, norm in state["norms"].items()}
    grow.rates = {int(branch): float(rate) for branch, rate in state["rates"].items()}
    for row, saved in zip(grow.observer.health, state["rows"], strict=True):
        row.copy_(saved)
    grow.meter.spent = {name: int(macs) for name, macs in state["macs"].items()}
    grow.clock.go_on(state["seconds"])


def trainer_state(trainer: Trainer) -> Tree:
    """Everything the rest of a run depends on, by reference; taken between two steps."""
    model, outcome = trainer.model, trainer.outcome
    return {
        "host": dict(host_parameters(model)),
        "buffers": dict(host_buffers(model)),
        "optimizer": optimizer_state(trainer.optimizer),
        "average": None if trainer.average is None else {**host_parameters(trainer.average), **host_buffers(trainer.average)},
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "steps": outcome.steps,
        "best": dict(outcome.best),
        "said": sorted(trainer.said),
        "history": _packed(outcome.history),
        "rng": _rng_state(trainer.device),
        "governor": None if trainer.governor is None else trainer.governor.state(),
        "grow": grow_state(trainer.grow),
    }


@torch.no_grad()
def load_trainer(trainer: Trainer, state: Tree) -> None:
    """Take over ``trainer_state``, all but ``grow``, which was there before the run was announced."""
    with fitting():
        _load_trainer(trainer, state)


def _load_trainer(trainer: Trainer, state: Tree) -> None:
    for kind, tensors in (("host", host_parameters(trainer.model)), ("buffers", host_buffers(trainer.model))):
        for name, value in tensors.items():
            value.copy_(state[kind][name])
    restore_optimizer(trainer.optimizer, state["optimizer"])
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(kept(state["scaler"]))
    if trainer.average is not None and state.get("average") is not None:  # else a fork began to average, from the next step on
        for name, value in {**host_parameters(trainer.average), **host_buffers(trainer.average)}.items():
            value.copy_(state["average"][name])  # what grew in it has come with the rest that grew
    trainer.outcome.steps = int(state["steps"])
    trainer.outcome.best = {name: float(value) for name, value in state["best"].items()}
    trainer.said = set(state["said"])
    trainer.outcome.history = _unpacked(state["history"])
    trainer.remember_batches()
    if trainer.governor is not None and state["governor"] is not None:
        trainer.governor.load(kept(state["governor"]), trainer.device)
    GlobalDraws.restore(kept(state["rng"]))
    torch.set_rng_state(state["rng"]["cpu"])
    if trainer.device.type == "cuda" and state["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(state["rng"]["cuda"], trainer.device)


def _rng_state(device: torch.device) -> Tree:
    return GlobalDraws().state() | {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _packed(history: list[tuple[int, str, float]]) -> Tree:
    names = list(dict.fromkeys(name for _, name, _ in history))
    index = {name: number for number, name in enumerate(names)}
    return {
        "names": names,
        "ticks": torch.tensor([tick for tick, _, _ in history], dtype=torch.int64),
        "which": torch.tensor([index[name] for _, name, _ in history], dtype=torch.int32),
        "values": torch.tensor([value for _, _, value in history], dtype=torch.float64),
    }


def _unpacked(saved: Tree) -> list[tuple[int, str, float]]:
    columns: list[Tensor] = [saved["ticks"], saved["which"], saved["values"]]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(tick, saved["names"][which], value) for tick, which, value in rows]
