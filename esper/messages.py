"""The vocabulary of a run: the events that the engine tells, and the commands that it is given.

The engine, the controllers, the bus and the trackers share these classes. They are plain frozen dataclasses, and this module
imports nothing but the standard library, so that the engine needs no bus to describe its work. How they are written as
bytes is the business of ``esper.bus.codec``. New fields need a default, so that an older message can always be read; a reader
passes over a field that it does not know, but refuses an unknown kind and an unknown part of a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: _Class) -> _Class:
    """A frozen dataclass whose fields are given by name."""
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)  # type: ignore[return-value]


CONTROLLER = "controller"
"""The producer whose commands take effect only with the Decided that follows them."""


class Message:
    """Base of everything that travels on the bus."""

    __slots__ = ()


# --- out: telemetry ---


@message
class Telemetry(Message):
    """Rows of one site, columnar: a float32 array of shape ``[len(ticks), seeds, len(columns)]`` in ``data``."""

    site: str
    ticks: list[int]
    seeds: int
    columns: list[str]
    codec: str = "raw"
    data: bytes = b""


# --- out: events ---


@message
class RunStarted(Message):
    """First event of a run; ``sites`` has one dict a site: name, kind, width, seeds, blueprint parameters
    and MACs, ticks between two telemetry rows."""

    tick: int
    total_ticks: int
    sites: list[dict[str, Any]]


@message
class RunEnded(Message):
    """Last event of a run; ``status`` is FINISHED, FAILED or KILLED."""

    tick: int
    status: str
    summary: dict[str, Any]


@message
class Transition(Message):
    """One seed (``seed`` ≥ 0) or one block branch (``seed`` = −1) changed stage; ``branch`` is −1 where none exists.

    ``why`` is the reason that the controller gave with the command, as plain values (see ``Germinate``).
    """

    tick: int
    site: str
    seed: int
    branch: int
    source: int
    target: int
    cause: str
    generation: int = 0
    blueprint: str = ""
    strategy: str = ""
    objective: str = ""
    why: dict[str, Any] = field(default_factory=dict)


@message
class GateResult(Message):
    """A gate was asked: ``value`` against ``threshold``; NaN never passes."""

    tick: int
    site: str
    seed: int
    branch: int
    gate: str
    value: float
    threshold: float
    passed: bool
    look: int = 0


@message
class Alert(Message):
    """Something a person should see; ``level`` is info, warning or error; ``code`` is stable, ``text`` a sentence."""

    tick: int
    level: str
    code: str
    text: str
    site: str = ""
    seed: int = -1


@message
class Checkpoint(Message):
    """A checkpoint was written and verified; with an empty ``path``, its state was taken at this place among the events."""

    tick: int
    path: str
    digest: str


@message
class Metrics(Message):
    """Scalars of the run at a tick, by name (``train/loss``, ``validation/accuracy``, ``cost/macs``)."""

    tick: int
    values: dict[str, float]


@message
class Report(Message):
    """Answer to RequestReport: counts of seeds by stage, one dict a branch, and one a seed that ever moved, with its last transitions."""

    tick: int
    command_id: str
    stages: dict[str, int]
    branches: list[dict[str, Any]]
    seeds: list[dict[str, Any]] = field(default_factory=list)


@message
class TickEnded(Message):
    """Everything the trainer says about this tick has been said; a lockstep controller decides now.

    ``epoch`` numbers the starts of the trainer; a controller's Decided echoes it, so that a decision from before a
    resume is not mistaken for one after it.
    """

    tick: int
    epoch: int = 0


# --- in: commands ---


@dataclass(frozen=True, slots=True)
class Predicate:
    """One comparison on a telemetry column; ``op`` is one of ``< <= > >= == !=``."""

    column: str
    op: str
    value: float


@message
class Selector:
    """Which seeds: site (exact name or glob), seed numbers, stage, predicates; all given parts must hold."""

    site: str = "*"
    seeds: list[int] | None = None
    stage: int | None = None
    where: list[Predicate] = field(default_factory=list)


@message
class Command(Message):
    """Base of every command; ``deadline`` is its last tick (−1: none), and larger ``priority`` goes first."""

    id: str
    deadline: int = -1
    priority: int = 0


@message
class Germinate(Command):
    """Germinate one seed; empty names mean the run's configured blueprint, strategy and objective.

    ``why`` explains the decision in plain values (features, probabilities, the choice); the transition's event repeats it.
    """

    site: str
    seed: int
    blueprint: str = ""
    strategy: str = ""
    objective: str = ""
    why: dict[str, Any] = field(default_factory=dict)


@message
class SetStage(Command):
    """Ask for a transition of every selected seed; refused whole when one of them may not make it."""

    select: Selector
    target: int


@message
class Cancel(Command):
    """Cancel GERMINATED or TRAINING seeds."""

    select: Selector


@message
class ChangeStrategy(Command):
    """Hand the selected seeds to another grafting strategy from their present alpha on."""

    select: Selector
    strategy: str


@message
class PauseGrafting(Command):
    """Hold alpha of the selected GRAFTING seeds."""

    select: Selector


@message
class ResumeGrafting(Command):
    """Continue a paused ramp from its present α."""

    select: Selector


@message
class ReplaceBranch(Command):
    """Put another branch in the place of a FOSSILIZED one, if the judge finds it better; else the one that is there stays or returns.

    ``start`` is ``fresh`` (new parameters of ``blueprint``; empty: the branch's own) or ``copy`` (those that are there, learning on).
    """

    site: str
    seed: int
    blueprint: str = ""
    start: str = "fresh"


@message
class ApplyTogether(Command):
    """All of these or none: validated and applied on a copy, which is swapped in when every one succeeds.

    They come and end together: acknowledged is this command's id and not theirs, and its deadline and priority hold for all of
    them. One that has a deadline or priority of its own has the whole refused. With ``as_one`` all that germinates is one
    decision from then on: judged by what it is worth together, moved together, kept or removed together.
    """

    commands: list[Command]
    as_one: bool = False


@message
class ApplyEach(Command):
    """One after the other, each for itself: a refused command keeps no other back.

    They come and end together, as in ApplyTogether: applied when at least one was, the reason naming those that were not.
    """

    commands: list[Command]


@message
class EmergencyStop(Command):
    """Cull all selected branches that are not FOSSILIZED, now; overtakes every queued command. An empty selection is everything.

    ``why`` explains the decision as in ``Germinate``; the transitions' events repeat it.
    """

    reason: str = ""
    select: Selector = field(default_factory=Selector)
    why: dict[str, Any] = field(default_factory=dict)


@message
class RequestReport(Command):
    """Ask for a Report event."""


@message
class Decided(Command):
    """A lockstep controller's mark: it has decided on everything up to ``tick``; ``epoch`` is that of the TickEnded."""

    tick: int
    epoch: int = 0


# --- between controllers ---


@message
class Proposal(Message):
    """What the local controller of a group of sites would do at ``tick``, for an allocator to grant; it is also a sign of life."""

    group: str
    tick: int
    commands: list[Command] = field(default_factory=list)


# --- large payloads ---


@message
class ClaimCheck(Message):
    """Represents a message whose bytes are in a file: ``digest`` (SHA-256, hex) names it, ``size`` is its bytes."""

    digest: str
    size: int


# --- back: acknowledgements ---


@message
class Acknowledgement(Message):
    """``status``: delivered, then exactly one of applied, refused or expired; ``reason`` in words."""

    command_id: str
    status: str
    reason: str = ""
    tick: int = -1


EVENTS = (RunStarted, RunEnded, Transition, GateResult, Alert, Checkpoint, Metrics, Report, TickEnded)
COMMANDS = (
    Germinate,
    SetStage,
    Cancel,
    ChangeStrategy,
    PauseGrafting,
    ResumeGrafting,
    ReplaceBranch,
    ApplyTogether,
    ApplyEach,
    EmergencyStop,
    RequestReport,
    Decided,
)
MESSAGES = (Telemetry, *EVENTS, *COMMANDS, Proposal, ClaimCheck, Acknowledgement)
