"""What the ranks of a training agree on at every step, so that all of them make the same tick.

Measurements are reduced over all ranks before anything is decided. Commands and the answers of strategies come from rank 0. Everything else
at a tick follows from these by the same rules on every rank, and the end of the step compares the results. Alone, a rank agrees with itself
and nothing is sent.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper import messages
from esper.distributed import Ranks, is_shard, is_sharded
from esper.distributed.sharding import let_go
from esper.engine.arguments import GrowSettings
from esper.engine.costs import Meter
from esper.engine.extra_passes import drawing_alike, host_parameters
from esper.engine.learning.objectives import Objective
from esper.engine.saved_state import topology
from esper.engine.shared_telemetry import SharedTelemetry
from esper.errors import UserError
from esper.messages import Command
from esper.seeds import SeedRegistry

AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class AtTick:
    """What a rank knows at a tick beside numbers that all have: error rates, failures and exceptions by branch, the metric, commands."""

    rates: Mapping[int, float]
    failed: set[int]
    raised: Mapping[int, Exception]
    metric: float | None
    commands: list[Command]


class Agreement:
    """Between the ranks of one training; ``step`` numbers the exchanges, so that two ranks at different steps notice."""

    def __init__(self, ranks: Ranks, registry: SeedRegistry, objective: Objective, meter: Meter) -> None:
        self.ranks, self.registry, self.objective, self.meter = ranks, registry, objective, meter
        self.telemetry = SharedTelemetry(registry, ranks)
        self.step = 0
        self.asked = self._stops = False
        self._told = False
        self._spent: dict[str, int] = {}
        objective.ranks = ranks

    @property
    def stops(self) -> bool:
        """Whether the training is to stop after this step: any rank was ``asked`` to, before the end of the step."""
        return self._stops if self.ranks.size > 1 else self.asked

    # --- a step ---

    def note_micro_batch(self) -> None:
        """After the backward pass of a micro-batch, and the passes beside it."""
        if self.ranks.many:
            self.telemetry.note()
        if self.ranks.sharded:
            let_go(self.registry.model)

    def losses(self, mine: list[float]) -> list[float]:
        """The losses of all ranks, in their order; the scores of branches that learn, and telemetry, come along. Once a step."""
        scores, self.objective.scores = self.objective.scores, []
        found = self.ranks.values(f"step {self.step + 1}", {"losses": mine, "scores": scores})
        for one in found:
            for branch, score in one["scores"]:
                self.objective.note_score(int(branch), float(score))
        self.telemetry.exchange(self.step + 1)
        self._told = True
        return [float(loss) for one in found for loss in one["losses"]]

    def begin(self, losses: list[Tensor | float]) -> list[Tensor | float]:
        """The training losses of the step: of a loop of the user's own, the means of all ranks, which are told to all now."""
        if self._told or not self.ranks.many:
            self._told = False
            return losses  # the trainer has told them, and gives the mean of all
        told = self.losses([sum(map(float, losses)) / len(losses)] if losses else [])
        self._told = False
        return list(told)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """In a loop of the user's own: average the branches' gradients, as DDP has averaged the host's."""
        if self.ranks.size == 1 or self.ranks.shards:
            return
        parameters = self.branch_parameters()
        if not parameters:
            return
        sums = self.ranks.sum([parameter.grad for parameter in parameters], parameters)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = None if total is None else total / self.ranks.size

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients of all branches since the last call, which are taken off them; in the order of ``branch_parameters``."""
        self.objective.merge()
        parameters = self.branch_parameters()
        taken = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return taken

    def branch_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of all banks, in the same order on every rank."""
        return [parameter for layer in self.registry.layers for parameter in layer.parameters()]

    # --- a tick ---

    def tick(self, tick: int, mine: AtTick) -> AtTick:
        """What all ranks know at a tick, from what each knows.

        Error rates are means, branches that failed or raised are those that did anywhere, the metric is that of the lowest rank that has
        one, and the commands are those that rank 0 was given.
        """
        if self.ranks.size == 1:
            return mine
        texts = [[branch, type(error).__name__, str(error)] for branch, error in sorted(mine.raised.items())]
        told = {"rates": sorted(mine.rates.items()), "failed": sorted(mine.failed), "raised": texts, "metric": mine.metric}
        found = self.ranks.values(f"tick {tick}", told | {"commands": [_plain(command) for command in mine.commands]})
        rates: dict[int, float] = {}
        for one in found:
            for branch, rate in one["rates"]:
                rates[branch] = rates.get(branch, 0.0) + rate / self.ranks.size
        raised = dict(mine.raised)
        for one in found:
            for branch, kind, text in one["raised"]:
                raised.setdefault(branch, type(kind, (Exception,), {})(text))
        failed = {branch for one in found for branch in one["failed"]}
        metric = next((one["metric"] for one in found if one["metric"] is not None), None)
        return AtTick(rates, failed, raised, metric, [_command(command) for command in found[0]["commands"]])

    def of_first(self, label: str, tensors: list[Tensor]) -> list[Tensor]:
        """Rank 0's values of small tensors."""
        if self.ranks.size == 1:
            return tensors
        flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
        first = self.ranks.gather(label, None, flat)[0][1].split([tensor.numel() for tensor in tensors])
        return [value.view(tensor.shape).to(tensor.dtype) for value, tensor in zip(first, tensors, strict=True)]

    def end(self, tick: int, thorough: bool) -> None:
        """Compare seeds and branches, ``thorough``ly also all weights, and add up the costs.

        Raises UserError where a rank has other ones than rank 0.
        """
        self.step += 1
        if self.ranks.sharded:
            let_go(self.registry.model)
        if self.ranks.size == 1:
            return
        if thorough and self.ranks.sharded is not is_sharded(self.registry.model):
            raise UserError("The host was sharded after seeds were attached to it: call fully_shard first, then attach.")
        spent = {kind: macs - self._spent.get(kind, 0) for kind, macs in self.meter.spent.items()}
        found = self.ranks.values(
            f"the end of step {self.step}", {"state": self._state(tick, thorough), "macs": spent, "asked": self.asked}
        )
        self._stops = any(one["asked"] for one in found)
        for rank, one in enumerate(found):
            if rank != self.ranks.rank:
                for kind, macs in one["macs"].items():
                    self.meter.spent[kind] = self.meter.spent.get(kind, 0) + macs
        self._spent = dict(self.meter.spent)
        self._refuse_apart([one["state"] for one in found])

    def reset(self, step: int) -> None:
        """After a saved state was taken over: the costs in it are those of all ranks."""
        self.step, self._spent = step, dict(self.meter.spent)

    def _state(self, tick: int, thorough: bool) -> dict[str, Any]:
        branches, table = self.registry.branches, self.registry.table
        state: dict[str, Any] = {
            "the tick": tick,
            "the stages of seeds": _checksum([table.stage]),
            "the alphas": _checksum([branches.alpha]),
        }
        if thorough:
            weights = host_parameters(self.registry.model).values()
            state["the host's weights"] = _sum_of_bits(value for value in weights if not is_shard(value))  # of which ranks hold other parts
            state["the weights of branches"] = _sum_of_bits(self.branch_parameters())
        return state

    def _refuse_apart(self, states: list[dict[str, Any]]) -> None:
        for rank, state in enumerate(states):
            apart = [name for name in states[0] if state[name] != states[0][name]]
            if apart:
                advice = (
                    "average the host's gradients, as torch.nn.parallel.DistributedDataParallel around the model does"
                    if apart == ["the host's weights"]
                    else "give all of them the same code and settings"
                )
                raise UserError(
                    f"After step {self.step}, {apart[0]} on rank {rank} are not those of rank 0, so the processes no longer train one "
                    f"model: {advice}, and resume from the last checkpoint."
                )


def _sum_of_bits(tensors: Iterable[Tensor]) -> int:
    """A sum that changes with every bit of these tensors, in one pass that takes eight bytes at a time; for weights, which are many."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        size = flat.element_size()
        whole = (flat.numel() * size) % 8 == 0 == (flat.storage_offset() * size) % 8
        sums.append(flat.view(torch.int64 if whole else AS_INTEGERS[size]).sum(dtype=torch.int64))
    return _crc(torch.stack(sums).tolist()) if sums else 0


def _checksum(tensors: Iterable[Tensor]) -> int:
    """A sum over the bits of tensors that changes with every bit and with their order."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        whole = flat.view(AS_INTEGERS[flat.element_size()]) if flat.dtype != torch.bool else flat
        sums.append((whole.to(torch.int64) * (torch.arange(flat.numel(), device=flat.device) % 65521 + 1)).sum())
    return _crc(torch.stack(sums).tolist()) if sums else 0


def _plain(value: Any) -> Any:
    """A command as values that JSON can hold, each dataclass with its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _command(value: Any) -> Any:
    """The command again; only classes of ``esper.messages`` are built."""
    if isinstance(value, dict) and "is" not in value:
        return {name: _command(one) for name, one in value.items()}
    if isinstance(value, dict):
        kind = vars(messages)[value["is"]]
        assert dataclasses.is_dataclass(kind) and isinstance(kind, type), value["is"]
        return kind(**{name: _command(one) for name, one in value.items() if name != "is"})
    return [_command(one) for one in value] if isinstance(value, list) else value


def refuse_different_starts(
    ranks: Ranks, registry: SeedRegistry, settings: GrowSettings, judge: Iterable[Any] | None, state: Mapping[str, Any] | None
) -> None:
    """Raise UserError where a rank has begun with another model, other settings, another judge set or another saved state than rank 0."""
    if ranks.size == 1:
        return
    shapes = [[name, list(parameter.shape)] for name, parameter in registry.model.named_parameters()]
    parts = {
        "The model": [shapes, topology(registry)],
        "The random seed": registry.seed,
        "The length of the run (total_steps, steps_per_epoch, accumulate or lifecycle.clock)": [
            settings.total_ticks,
            settings.steps_per_tick,
            settings.accumulate,
        ],
        "The lifecycle": [settings.lifecycle, settings.ages],
        "The grafting strategy": settings.grafting,
        "The telemetry": settings.telemetry,
        "The learning of branches": settings.learning,
        "The judge set": _digest_of_data(judge),
        "The saved state": [-1] if state is None else [int(state["grow"]["step"]), int(state["grow"]["tick"])],
    }
    ranks.refuse_different("the start", {name: _crc(repr(part)) for name, part in parts.items()})


def _digest_of_data(judge: Iterable[Any] | None) -> int:
    """A checksum of all batches of the judge set, which are read once for it."""
    if judge is None:
        return -1
    with drawing_alike(judge):
        return _crc([_digest_of(batch) for batch in judge])


def _digest_of(part: Any) -> Any:
    if isinstance(part, Tensor):
        return [list(part.shape), _checksum([part])]
    if isinstance(part, Mapping):
        return [[str(key), _digest_of(value)] for key, value in part.items()]
    if isinstance(part, (list, tuple)):
        return [_digest_of(value) for value in part]
    return part if isinstance(part, (str, int, float, bool)) else type(part).__name__


def _crc(value: Any) -> int:
    return zlib.crc32(str(value).encode())
