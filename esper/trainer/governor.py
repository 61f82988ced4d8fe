"""The governor protects the host. It watches loss, gradient, activations and updates, and rolls back steps that go wrong.

Before each optimizer step it asks whether this step's forward and backward look healthy. If they do, the weights they ran
on are verified, and from time to time a snapshot of them is taken. If not, the step is not made: the branch that caused the
anomaly is looked for by switching branches off on the same batch, and host, optimizer and the other branches return to the
last good snapshot. Neither the tick count nor the data order goes back: the run continues with the next batch.

On a GPU a step may be ``postponed``: it is made before its numbers are known, so that the host need not wait for them, and judged
just before the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from esper.checkpoint.tree import Still
from esper.distributed import local
from esper.engine.extra_passes import untouched_buffers
from esper.engine.grow import Grow
from esper.engine.snapshot import Snapshot
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.lifecycle.transitions import refusal
from esper.messages import Alert
from esper.seeds import Branch
from esper.trainer.sharded_host import largest, length

JUMP = 100.0
"""Factor by which the largest weight may grow between two snapshots; weights that were all zero may grow from SMALLEST_WEIGHT."""
SMALLEST_WEIGHT = 1e-2


@dataclass(frozen=True)
class GovernorSettings:
    """When snapshots are taken (every ``every`` steps) and anomalies declared (after ``patience`` bad steps in a row).

    More than ``failures`` rollbacks within ``span`` stop the run.
    """

    every: int
    patience: int = 3
    failures: int = 5
    span: int = 200


@dataclass
class Anomaly:
    """The description of an anomaly, its step, and the branches that caused it."""

    step: int
    what: str
    culprits: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        by = f", caused by {' and '.join(self.culprits)}" if self.culprits else ""
        return f"step {self.step}: {self.what}{by}"


class Governor:
    """Guards one ``Grow`` and its host's optimizer."""

    def __init__(self, grow: Grow, settings: GovernorSettings) -> None:
        self.grow, self.settings = grow, settings
        self.bands = _bands()
        self.bad = dict.fromkeys(self.bands, 0)
        self.anomalies: list[Anomaly] = []
        self.rollbacks: list[int] = []
        self.snapshot: Snapshot | None = None
        self._signal = grow.signal.state()
        self._largest = math.inf
        self._before: list[Tensor] = []
        self._measured: dict[str, float] = {}
        self._postponed: tuple[int, float, float] | None = None
        self.loss_of: Callable[[Any], float] = lambda batch: float(grow.loss(grow.registry.model, batch).mean())
        """The loss of what ``recover`` is given to look at again."""
        grow.guard.on_return = self.restart

    def restart(self) -> None:
        """After the host returned to an earlier state: forget the usual values, and take a new snapshot."""
        self.bands, self._before, self._measured, self._postponed = _bands(), [], {}, None
        self.bad = dict.fromkeys(self.bands, 0)
        self._largest, self.snapshot = math.inf, None
        self._take()

    @property
    def measures_update(self) -> bool:
        """Whether the size of the coming update is measured: at the same ticks as the seeds' health."""
        return self.grow.observer.due

    def waits(self, step: int) -> bool:
        """Whether this step's loss and gradient must be known before it is made: for a snapshot, a measurement, or after a bad step."""
        return self.snapshot is None or step % self.settings.every == 0 or self.measures_update or any(self.bad.values())

    def admit(self, step: int, loss: float, gradient: float | None) -> Anomaly | None:
        """Judge this step's loss and gradient norm: None if the optimizer may make ``step``, else the anomaly.

        ``gradient`` None: a gradient scaler looks after it.
        """
        anomaly = self._judged(step, {"loss": loss} | ({} if gradient is None else {"gradient": gradient}))
        if anomaly is not None:
            return anomaly
        if not any(self.bad.values()) and (self.snapshot is None or step % self.settings.every == 0):
            what = self._take()
            if what is not None:
                return Anomaly(step, what)
        if self.measures_update:
            self._before = [local(p.detach()).clone() for p in self._parameters()]
        return None

    def postpone(self, step: int, loss: Tensor, gradient: Tensor) -> Anomaly | None:
        """Let the optimizer make this step before its loss and gradient are known, where it ``waits`` for nothing.

        ``earlier`` judges them before the next step; the optimizer itself must leave out this one if either is not finite. Returns an
        anomaly that the step before left behind, in its update or activations.
        """
        anomaly = self._judged(step, {})
        if anomaly is None:
            self.grow.readings.post([loss, gradient], partial(self._note, step))
        return anomaly

    def _note(self, step: int, values: list[Tensor]) -> None:
        loss, gradient = values
        self._postponed = step, float(loss), float(gradient)

    def earlier(self) -> Anomaly | None:
        """Judge the step that was postponed, if one was, before the next is made."""
        self.grow.readings.arrive()
        postponed, self._postponed = self._postponed, None
        if postponed is None:
            return None
        step, loss, gradient = postponed
        anomaly = self._judged(step, {"loss": loss, "gradient": gradient})
        if anomaly is not None:
            self.grow.forget_arrived()  # else a batch of NaN would cull every branch that learned from it
        return anomaly

    def _judged(self, step: int, values: dict[str, float]) -> Anomaly | None:
        if self._measured:
            squares = self.grow.observer.mean_squares()
            values = values | self._measured | {"activation": math.sqrt(sum(squares) / len(squares)) if squares else 0.0}
            self._measured = {}
        what = self._what(values)
        if what is not None:
            return Anomaly(step, what)
        for name, value in values.items():
            if not self.bands[name].out(value):
                self.bands[name].accept(value)
        return None

    def measure(self) -> None:
        """Note the size of the update, between the optimizer's step and the tick; the next step judges it, and the activations."""
        before, self._before = self._before, []
        if not before:
            return
        with torch.no_grad():
            norm = length(torch._foreach_sub([local(now.detach()) for now in self._parameters()], before), self.grow.agreement.ranks)
        self.grow.readings.post([norm], self._note_update)

    def _note_update(self, values: list[Tensor]) -> None:
        self._measured = {"update": float(values[0])}

    def recover(self, anomaly: Anomaly, batch: Any) -> None:
        """Remove the branches that caused the anomaly and return everything else to the last good snapshot.

        Raises UserError, with a report, when this happens again and again.
        """
        grow = self.grow
        tick = grow.transitions.tick = grow.tick_number + 1
        for branch in self._culprits(batch):
            anomaly.culprits.append(self._remove(branch, anomaly))
        if self.snapshot is not None:
            self.snapshot.restore(grow.registry.model, grow.optimizer, grow.registry)
            grow.signal.load(self._signal)
            grow.transitions.leaving.clear()
            grow.guard.returned(self.snapshot.tick)
        grow.forget_step()  # the forwards that looked for a culprit too
        self.bad = dict.fromkeys(self.bands, 0)
        self.anomalies.append(anomaly)
        self.rollbacks = [step for step in self.rollbacks if anomaly.step - step < self.settings.span] + [anomaly.step]
        where = "nothing to go back to" if self.snapshot is None else f"back to the state of tick {self.snapshot.tick}"
        grow.port.emit(Alert(tick=tick, level="error", code="rolled_back", text=f"{anomaly}; {where}"))
        if self.snapshot is None or len(self.rollbacks) > self.settings.failures:
            self._give_up()

    def _give_up(self) -> None:
        story = "; ".join(map(str, self.anomalies[-len(self.rollbacks) :]))
        if self.snapshot is None:
            raise UserError(
                f"The run is stopped before it had a healthy state to go back to: {story}. Look at the data of these steps, "
                "the weights it began with, and optimizer.lr."
            )
        raise UserError(
            f"The run was rolled back {len(self.rollbacks)} times within {self.settings.span} steps, so it is stopped: {story}. "
            "Look at the data of these steps, lower optimizer.lr, or resume from an earlier checkpoint."
        )

    def _what(self, values: dict[str, float]) -> str | None:
        """The anomaly in words, or None; counts how long a signal has been out of band."""
        for name, value in values.items():
            band = self.bands[name]
            if not math.isfinite(value):
                return f"the {name} is {value}"
            self.bad[name] = self.bad[name] + 1 if band.out(value) else 0
            patience = 1 if name in ("update", "activation") else self.settings.patience
            if self.bad[name] >= patience:
                return f"the {name} is {value:.3g}, and up to {band.limit:.3g} would be usual"
        return None

    def _take(self) -> str | None:
        """Take a snapshot of the weights that this step's forward has verified. Returns why they are not healthy, or None.

        A flipped bit may hide in a weight that no activation of this batch depends on, so the largest magnitude is checked too.
        """
        grow, parameters = self.grow, self._parameters()
        with torch.no_grad():
            weight = largest(parameters, grow.agreement.ranks)
        if not math.isfinite(weight) or weight > JUMP * max(self._largest, SMALLEST_WEIGHT):
            return f"the largest weight is {weight:.3g}, and was {self._largest:.3g} at the snapshot before"
        taken = Snapshot(grow.registry.model, grow.optimizer, grow.registry, grow.tick_number)
        if not grow.agreement.ranks.all_agree("a snapshot", taken.healthy):
            return "the optimizer's state or the norm statistics are not finite"
        self.snapshot, self._signal, self._largest = taken, grow.signal.state(), weight
        return None

    def _parameters(self) -> list[Tensor]:
        optimizer = self.grow.optimizer
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    # --- finding the cause ---

    def _culprits(self, batch: Any) -> list[Branch]:
        """The smallest set of branches whose absence makes this batch's loss usual again; of several alike, the youngest."""
        registry = self.grow.registry
        blended = [branch for number in range(len(registry.sites)) for branch in registry.blended(number)]
        if not blended or self._usual(self._loss(batch, [])) or not self._usual(self._loss(batch, blended)):
            return []
        youngest_first = sorted(blended, key=lambda branch: -branch.id)
        return fewest(youngest_first, lambda off: self._usual(self._loss(batch, off)))

    def _usual(self, loss: float) -> bool:
        return not self.bands["loss"].out(loss)

    def _loss(self, batch: Any, without: Iterable[Branch]) -> float:
        """The loss of a batch with some branches off; leaves no trace."""
        grow = self.grow
        model = grow.registry.model
        with torch.no_grad(), untouched_buffers(model), grow.observer.silent(), grow.replay.again(), grow.registry.without(*without):
            return self.loss_of(batch)

    def _remove(self, branch: Branch, anomaly: Anomaly) -> str:
        grow = self.grow
        site = grow.registry.sites[branch.site].name
        name = f"branch {branch.id} ({branch.blueprint}) of seed {branch.seed} at {site}"
        if branch.stage is Stage.CULLED:
            grow.transitions.drop(branch)
        elif refusal(branch.stage, Stage.ROLLED_BACK) is None:
            grow.transitions.move(branch.row, Stage.ROLLED_BACK, f"governor: {anomaly.what}")
        elif branch in grow.replacing.trials():
            grow.replacing.end(branch, f"governor: {anomaly.what}")
        else:
            name += f", which stays because it is {branch.stage.name}"
        grow.registry.mark_changed(branch.site)
        grow.registry.refresh()
        return name

    def state(self) -> dict[str, Any]:
        """Everything, by reference, for a checkpoint."""
        return {
            "bands": {name: band.state() for name, band in self.bands.items()},
            "bad": dict(self.bad),
            "anomalies": [[anomaly.step, anomaly.what, anomaly.culprits] for anomaly in self.anomalies],
            "rollbacks": list(self.rollbacks),
            "snapshot": None if self.snapshot is None else Still(self.snapshot.state()),
            "signal": dict(self._signal),
            "largest": self._largest,
            "measured": dict(self._measured),
            "postponed": None if self._postponed is None else list(self._postponed),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a saved state."""
        for name, band in self.bands.items():
            band.load(state["bands"][name])
        self.bad = {name: int(state["bad"][name]) for name in self.bad}
        self.anomalies = [Anomaly(int(step), str(what), list(culprits)) for step, what, culprits in state["anomalies"]]
        self.rollbacks = [int(step) for step in state["rollbacks"]]
        self.snapshot = None if state["snapshot"] is None else Snapshot.from_state(state["snapshot"], device)
        self._largest = float(state["largest"])
        self._signal = {name: float(value) for name, value in state["signal"].items()}
        self._measured = {name: float(value) for name, value in state["measured"].items()}
        postponed = state.get("postponed")  # checkpoints of earlier versions postponed nothing
        self._postponed = None if postponed is None else (int(postponed[0]), float(postponed[1]), float(postponed[2]))


def _bands() -> dict[str, Band]:
    return {
        "loss": Band(spreads=8.0, factor=3.0),
        "gradient": Band(spreads=10.0, factor=100.0),
        "update": Band(spreads=10.0, factor=30.0),
        "activation": Band(spreads=10.0, factor=30.0),
    }


Item = TypeVar("Item")


def fewest(items: Sequence[Item], usual_without: Callable[[Sequence[Item]], bool], off: Sequence[Item] = ()) -> list[Item]:
    """The smallest subset of ``items`` whose absence makes the loss usual again.

    The caller knows that the loss is usual without all of them, and not with only those in ``off`` absent. ``usual_without(some)`` costs
    a forward. Bisection finds a single culprit among n in at most two forwards for each halving of n, and each of several culprits in as
    many. Where any one of several would do, the first of them is returned.
    """
    if len(items) <= 1:
        return list(items)
    middle = (len(items) + 1) // 2
    first, second = items[:middle], items[middle:]
    for half in (first, second):
        if usual_without([*off, *half]):
            return fewest(half, usual_without, off)
    of_second = fewest(second, usual_without, [*off, *first])
    return [*fewest(first, usual_without, [*off, *of_second]), *of_second]


WINDOW = 64
WARM = 20
REFRESH = 8
SMALLEST_VALUE = 1e-12


class Band:
    """Median and median absolute deviation of the logarithms of the last ``WINDOW`` accepted values.

    A value is out of band when its logarithm lies more than ``spreads`` robust standard deviations (1.4826·MAD, Hampel 1974)
    above the median and the value itself more than ``factor`` times it; before ``WARM`` values only non-finite ones are.
    Nothing up to the largest of the first ``WARM`` values is out of band: once a host has memorised its data, its loss is
    almost zero, and a batch with a single mistake in it has a hundred times that loss without being harmful.
    """

    def __init__(self, spreads: float, factor: float) -> None:
        self.spreads, self.factor = spreads, factor
        self.logs: deque[float] = deque(maxlen=WINDOW)
        self.limit = math.inf
        self.start = 0.0
        self._seen = 0
        self._since = 0

    def out(self, value: float) -> bool:
        """Whether this value is not finite or out of band; a sensor that gives nothing finite has failed."""
        return not math.isfinite(value) or value > self.limit

    def accept(self, value: float) -> None:
        """Add a value that is in band."""
        self.logs.append(math.log(max(abs(value), SMALLEST_VALUE)))
        self._since += 1
        if self._seen < WARM:
            self._seen += 1
            self.start = max(self.start, abs(value))
        if len(self.logs) >= WARM and (self._since >= REFRESH or math.isinf(self.limit)):
            self._refresh()

    def _refresh(self) -> None:
        self._since = 0
        centre = median(self.logs)
        spread = 1.4826 * median(abs(value - centre) for value in self.logs)
        self.limit = max(self.start, math.exp(min(700.0, centre + max(self.spreads * spread, math.log(self.factor)))))

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"logs": list(self.logs), "limit": self.limit, "start": self.start, "seen": self._seen, "since": self._since}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.logs = deque((float(value) for value in state["logs"]), maxlen=WINDOW)
        self.limit, self.start = float(state["limit"]), float(state["start"])
        self._seen, self._since = int(state["seen"]), int(state["since"])
