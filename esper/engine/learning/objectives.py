"""The objectives of TRAINING seeds; they leave the live forward and the host's gradients untouched.

Gradients are kept in ``pending`` until the branch optimizer takes them at the tick, so that a TRAINING seed does not affect the
clipping of the host's gradients either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.distributed import Ranks
from esper.engine.costs import Meter
from esper.engine.device_readings import Readings
from esper.engine.extra_passes import DropoutReplay, shapes_of, untouched_buffers
from esper.engine.judging.judge import LossFunction
from esper.engine.learning.shadow_in_graph import Failures, ShadowInGraph
from esper.engine.supported_models import refuse_reentrant
from esper.lifecycle import Stage
from esper.lifecycle.config import OBJECTIVES
from esper.seeds import Branch, Recording, SeedRegistry
from esper.seeds.blend import branch_outputs, chunks_of
from esper.seeds.branch_exceptions import containable, take_errors
from esper.seeds.branch_groups import BlockGroup, Group, GroupMember, Injection, build
from esper.seeds.registry import AnyBlueprint

STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Line search of the functional gradient: steps as shares of the activation's RMS."""


class Objective:
    """Learns all TRAINING seeds of a registry, each by the run's objective (``kind``) or its own.

    ``readiness`` holds each branch's average score.

    The score is the relative fall of the loss (``shadow``), or the share of the regression target that is met. It is known when
    ``readings`` arrive: nothing waits for the device.
    """

    def __init__(
        self,
        kind: str,
        registry: SeedRegistry,
        loss: LossFunction,
        replay: DropoutReplay,
        meter: Meter,
        readings: Readings,
        search_every: int = 50,
    ) -> None:
        self.kind = kind
        self.registry = registry
        self.loss = loss
        self.replay = replay
        self.meter = meter
        self.readings = readings
        self.search_every = search_every
        self.pending: dict[nn.Parameter, Tensor] = {}
        self.readiness: dict[int, float] = {}
        self.failed: set[int] = set()
        self.raised: dict[int, Exception] = {}
        self.step_size = 0.0
        self.ranks = Ranks.alone()
        """With others, the scores wait in ``scores`` until those of all ranks are known."""
        self.scores: list[tuple[int, float]] = []
        self.micro_batches = 1
        self.in_graph = ShadowInGraph(registry, loss, replay, meter)
        self._excused: set[int] = set()
        self._searched = -search_every
        self._looked = False

    def kind_of(self, branch: Branch) -> str:
        """The objective of a branch; all but ``shadow`` need activations and gradients of its site."""
        return branch.objective or self.kind

    def refusal(self, kind: str, blueprint: AnyBlueprint) -> str | None:
        """Why a branch of this blueprint cannot learn by an objective in this run, or None."""
        if kind not in OBJECTIVES:
            return f"there is no objective '{kind}'; there are {', '.join(OBJECTIVES)}"
        if "reconstruction" in (kind, self.kind) and kind != self.kind:
            return f"objective {kind} cannot stand beside the run's {self.kind}: reconstruction starts from other weights"
        if kind != "shadow" and blueprint.part_of_layer:
            return f"blueprint {blueprint.name} learns by objective shadow alone: it reads elsewhere"
        return None

    def learn(self, batch: Any, scale: float, host_loss: Tensor | float | None, tick: int) -> None:
        """Gradients for the TRAINING branches from one micro-batch, times ``scale``; call after the host's backward."""
        training = self.registry.in_stage(Stage.TRAINING)
        if not training:
            return
        by_kind = {kind: [branch for branch in training if self.kind_of(branch) == kind] for kind in OBJECTIVES}
        if by_kind["shadow"]:
            self._shadow(by_kind["shadow"], batch, scale, host_loss)
        if by_kind["functional_gradient"] and tick - self._searched >= self.search_every:
            if self.ranks.first or self.ranks.sharded:
                self._search(by_kind["functional_gradient"], batch)
            self.step_size = self.ranks.decided(f"step size at tick {tick}", lambda: self.step_size)
            self._searched = tick
        for kind in ("functional_gradient", "reconstruction"):
            self._regress(by_kind[kind], kind, batch, scale)

    def set_aside(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients at hand off these parameters, until ``merge``."""
        for parameter in parameters:
            if parameter.grad is not None:
                held = self.pending.get(parameter)
                self.pending[parameter] = parameter.grad if held is None else held + parameter.grad
                parameter.grad = None

    def merge(self) -> None:
        """Hand the pending gradients over to the parameters' ``grad``."""
        for parameter, gradient in self.pending.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.pending = {}

    def excuse(self, failures: dict[int, int]) -> None:
        """Take out of these ``failures`` what a loss of the host's that was not finite has done, as far as is known now."""
        for branch in self._excused:
            failures.pop(branch, None)
        self._excused.clear()

    def forget(self, branch: int) -> None:
        """Forget a branch that left TRAINING."""
        self.readiness.pop(branch, None)
        self.failed.discard(branch)
        self.raised.pop(branch, None)

    def state(self) -> dict[str, Any]:
        """The memory between two steps, without gradients (a checkpoint is taken when none are pending)."""
        return {
            "readiness": {str(branch): value for branch, value in self.readiness.items()},
            "failed": sorted(self.failed),
            "step_size": self.step_size,
            "searched": self._searched,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.readiness = {int(branch): float(value) for branch, value in state["readiness"].items()}
        self.failed = {int(branch) for branch in state["failed"]}
        self.step_size, self._searched = float(state["step_size"]), int(state["searched"])

    # --- shadow: the task loss of a second forward, host frozen ---

    def _shadow(self, training: list[Branch], batch: Any, scale: float, host_loss: Tensor | float | None) -> None:
        self.ranks.come_to(f"a shadow pass for {len(training)} branches")
        with self.replay.again(), untouched_buffers(self.registry.model):
            host = self._measured("host", batch) if host_loss is None else host_loss
            sound: bool | Tensor = True
            if self.readings.late and isinstance(host, Tensor) and not self.ranks.many:
                sound = host.isfinite()
            else:
                host = float(host)
                sound = math.isfinite(host)
                if not (sound or self.ranks.sharded):
                    return  # the host's own doing: nothing to learn from, and nothing to hold against a branch
            # without a loss of the live forward both are measured outside the graph, which may draw other masks
            collect = partial(self._collect, scale=scale, keeps=sound)
            found = None if host_loss is None else self.in_graph.run(training, batch, collect)
            loss, failures = self._shadow_forward(training, batch, scale, sound) if found is None else found
        if sound is False:
            return  # as above, after a pass that the other ranks could not make without this one
        scored = [branch for branch in training if branch.id not in self.raised]
        told = [host] if isinstance(host, Tensor) else []
        note = partial(self._note_shadow, scored, [places for places, _ in failures], host if isinstance(host, float) else None)
        self._read([loss, *(found for _, found in failures), *told], note)

    def _shadow_forward(self, training: list[Branch], batch: Any, scale: float, sound: bool | Tensor) -> tuple[Tensor, Failures]:
        """The loss, how often each branch failed; the gradients are pending, unless the host's own loss is not ``sound``."""
        with self.replay.again(), self.registry.shadow(training) as groups:
            key = (self.registry.cost_key(), shapes_of(batch))
            with self.meter.counting("shadow", key), torch.enable_grad():
                loss = self.loss(self.registry.model, batch).mean()
                if not self._looked:
                    refuse_reentrant(loss)
                    self._looked = True
                raised = take_errors(groups)
                with self._containing([branch.id for branch in training]):
                    parameters = [p for group in groups for p in group.bank_parameters() if p.requires_grad]
                    self._collect(loss, [(parameter, parameter) for parameter in parameters], scale, sound)
        self.raised |= raised if sound is not False else {}
        return loss, [(dict(enumerate(group.branches)), group.failures) for group in groups]

    def _note_shadow(self, scored: list[Branch], places: list[dict[int, int]], host: float | None, values: list[Tensor]) -> None:
        loss, found = float(values[0]), values[1:]
        host = float(found.pop()) if host is None else host
        if not math.isfinite(host):
            self._excused |= {branch.id for branch in scored}
            return
        for branches, failures in zip(places, found, strict=True):
            counts = failures.tolist()
            self.failed |= {branch for place, branch in branches.items() if counts[place]}
        for branch in scored:
            self._score(branch, (host - loss) / max(abs(host), 1e-12))

    # --- regression on the gradient at the site ---

    def _regress(self, training: list[Branch], kind: str, batch: Any, scale: float) -> None:
        for number in sorted({branch.site for branch in training}):
            layer = self.registry.layers[number]
            recording = layer.recording
            if recording is None or recording.input is None:
                continue
            if kind == "functional_gradient" and recording.gradient is None:
                continue  # nothing came back to this site: nothing to learn from, and the readiness stays unknown
            members = [GroupMember(branch, 1.0, True) for branch in training if branch.site == number]
            x = recording.input
            for group in build(members, self.registry.banks(number), layer.geometry, x.device):
                assert not isinstance(group, Injection)
                key = (number, group.cost_key(), shapes_of(batch))
                with (
                    self._containing(group.branches),
                    self.replay.again(),
                    untouched_buffers(layer),
                    torch.enable_grad(),
                    self.meter.counting("objective", key),
                ):
                    loss = self._regression_loss(group, number, recording, kind)
                    self._collect(loss, [(p, p) for p in group.bank_parameters() if p.requires_grad], scale)

    def _regression_loss(self, group: Group | BlockGroup, number: int, recording: Recording, kind: str) -> Tensor:
        assert recording.input is not None
        geometry = self.registry.layers[number].geometry
        delta, chunk = branch_outputs(recording.input, group, geometry)
        if kind == "reconstruction":
            error, reference = delta, chunk
        else:
            target = chunks_of(self._descent(recording), group, geometry)
            error, reference = delta - target, target
        axes = tuple(range(1, error.dim()))
        missed = error.square().sum(axes) / reference.detach().square().sum(axes).clamp(min=1e-24)
        self._read([missed], partial(self._note_missed, [self.registry.branches[branch] for branch in group.branches]))
        return missed.sum()

    def _note_missed(self, branches: list[Branch], values: list[Tensor]) -> None:
        for branch, value in zip(branches, values[0].tolist(), strict=True):
            if not math.isfinite(value):
                self.failed.add(branch.id)
            self._score(branch, 1.0 - value)

    def _descent(self, recording: Recording) -> Tensor:
        """``−η·B·g`` at the whole site: ``B`` undoes the batch mean, ``η`` is the line search's share of the activation's RMS."""
        assert recording.input is not None and recording.gradient is not None
        descent = -recording.gradient * recording.gradient.shape[0]
        size = recording.input.square().mean().sqrt() / descent.square().mean().sqrt().clamp(min=1e-24)
        return descent * (self.step_size * size)

    def _search(self, training: list[Branch], batch: Any) -> None:
        """η by line search: the step that lowers the loss of this batch most when the chunks of these branches take it."""
        best, self.step_size = float("inf"), STEP_SIZES[0]
        self.ranks.come_to("the search for a step size")
        for size in STEP_SIZES:
            with self.replay.again(), untouched_buffers(self.registry.model), self.registry.injecting(self._injections(training, size)):
                loss = float(self._measured("search", batch))
            if loss < best:
                best, self.step_size = loss, size

    def _injections(self, training: list[Branch], size: float) -> dict[int, Injection]:
        injections = {}
        for number, layer in enumerate(self.registry.layers):
            recording = layer.recording
            here = [branch for branch in training if branch.site == number]
            if not here or recording is None or recording.input is None or recording.gradient is None:
                continue
            features = torch.cat([torch.arange(*layer.geometry.bounds(branch.seed)) for branch in here])
            x, descent = recording.input, -recording.gradient
            ratio = size * x.square().mean().sqrt() / descent.square().mean().sqrt().clamp(min=1e-24)
            target = features.to(x.device)
            dim = layer.geometry.dim if layer.geometry.dim >= 0 else x.dim() - 1
            injections[number] = Injection(dim, target, (descent * ratio).index_select(dim, target))
        return injections

    # --- shared ---

    @contextmanager
    def _containing(self, branches: list[int]) -> Iterator[None]:
        """Within, an exception in the code of these branches is noted for them, and they learn nothing from this batch."""
        try:
            yield
        except Exception as error:
            if self.registry.sharded or not containable(error):
                raise
            self.raised |= dict.fromkeys(branches, error)

    def _measured(self, purpose: str, batch: Any) -> Tensor:
        """The mean loss of a forward with the present groups, no gradients."""
        key = (purpose, self.registry.cost_key(), shapes_of(batch))
        with torch.no_grad(), self.meter.counting("objective", key):
            return self.loss(self.registry.model, batch).mean()

    def _collect(self, loss: Tensor, parameters: list[tuple[nn.Parameter, Tensor]], scale: float, keeps: bool | Tensor = True) -> None:
        """Gradients of ``loss·scale`` for parameters, each by the tensor that stands for it in the forward.

        Whether they are kept may be known to the device alone. Those of one micro-batch among several are then zero if they are not; those
        of a lone one are not finite, so that no branch moves, and that is excused.
        """
        if not parameters or not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss * scale, [used for _, used in parameters], allow_unused=True)
        for (parameter, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and keeps is not False:
                held = self.pending.get(parameter)
                if isinstance(keeps, Tensor) and self.micro_batches > 1:
                    gradient = torch.where(keeps, gradient, 0.0)
                self.pending[parameter] = gradient if held is None else held + gradient

    def _read(self, values: list[Tensor], read: Callable[[list[Tensor]], None]) -> None:
        """Several processes tell each other their scores within the step, so they read at once."""
        if self.ranks.many:
            read([value.detach() for value in values])
        else:
            self.readings.post(values, read)

    def _score(self, branch: Branch, value: float) -> None:
        if self.ranks.many:
            self.scores.append((branch.id, value))
        elif branch.stage is Stage.TRAINING:  # it may have gone on since
            self.note_score(branch.id, value)

    def note_score(self, branch: int, value: float) -> None:
        """Add a micro-batch's score to the average of a branch."""
        known = self.readiness.get(branch)
        self.readiness[branch] = value if known is None or known != known else 0.9 * known + 0.1 * value
