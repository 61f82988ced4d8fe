"""What travels on the bus: telemetry and events out, commands in, acknowledgements back.

Bodies only; the envelope (schema version, run, producer, epoch, sequence, checksum) is the codec's.
Fields are added with defaults only, so that bytes of an older version can always be read, and a field that a reader does not know is
passed over, so that it can read what a newer sender says. A kind it does not know is refused, and so is an unknown part of a selection,
which might select fewer. SCHEMA_VERSION rises when a field is taken away or means something else.
"""

from __future__ import annotations

from typing import Any

import msgspec

SCHEMA_VERSION = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=True):
    """Base of every body; ``kind`` on the wire is the class name."""


# --- out: telemetry -------------------------------------------------------------------------------------------------


class Telemetry(Message, kw_only=True):
    """Rows of one site, columnar: a float32 array of shape ``[len(ticks), seeds, len(columns)]`` in ``data``."""

    site: str
    ticks: list[int]
    seeds: int
    columns: list[str]
    codec: str = "raw"
    data: bytes = b""


# --- out: events ----------------------------------------------------------------------------------------------------


class RunStarted(Message):
    """First event of a run; ``sites`` has one dict a site: name, kind, width, seeds, blueprint parameters
    and MACs, ticks between two telemetry rows."""

    tick: int
    total_ticks: int
    sites: list[dict[str, Any]]


class RunEnded(Message):
    """Last event of a run; ``status`` is FINISHED, FAILED or KILLED."""

    tick: int
    status: str
    summary: dict[str, Any]


class Transition(Message, kw_only=True):
    """One seed (``seed`` ≥ 0) or one block branch (``seed`` = −1) changed stage; ``branch`` is −1 where none exists."""

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


class GateResult(Message, kw_only=True):
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


class Alert(Message, kw_only=True):
    """Something a person should see; ``level`` is info, warning or error; ``code`` is stable, ``text`` a sentence."""

    tick: int
    level: str
    code: str
    text: str
    site: str = ""
    seed: int = -1


class Checkpoint(Message):
    """A checkpoint was written and verified; with an empty ``path``, its state was taken at this place among the events."""

    tick: int
    path: str
    digest: str


class Metrics(Message):
    """Scalars of the run at a tick, by name (``train/loss``, ``validation/accuracy``, ``cost/macs``)."""

    tick: int
    values: dict[str, float]


class Report(Message):
    """Answer to RequestReport: counts of seeds by stage, and one dict a branch."""

    tick: int
    command_id: str
    stages: dict[str, int]
    branches: list[dict[str, Any]]


class TickEnded(Message):
    """Everything the trainer says about this tick has been said; a lockstep controller decides now.

    ``epoch`` numbers the starts of the trainer; a controller's Decided echoes it, so that what was decided before a
    resume is not mistaken for what is decided after it.
    """

    tick: int
    epoch: int = 0


# --- in: commands ---------------------------------------------------------------------------------------------------


class Predicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison on a telemetry column; ``op`` is one of ``< <= > >= == !=``."""

    column: str
    op: str
    value: float


class Selector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which seeds: site (exact name or glob), seed numbers, stage, predicates; all given parts must hold."""

    site: str = "*"
    seeds: list[int] | None = None
    stage: int | None = None
    where: list[Predicate] = []


class Command(Message, kw_only=True):
    """Base of every command; ``deadline`` is its last tick (−1: none), and larger ``priority`` goes first."""

    id: str
    deadline: int = -1
    priority: int = 0


class Germinate(Command, kw_only=True):
    """Germinate one seed; empty names mean the run's configured blueprint and strategy."""

    site: str
    seed: int
    blueprint: str = ""
    strategy: str = ""


class SetStage(Command, kw_only=True):
    """Ask for a transition of every selected seed; refused whole when one of them may not make it."""

    select: Selector
    target: int


class Cancel(Command, kw_only=True):
    """Cancel GERMINATED or TRAINING seeds."""

    select: Selector


class ChangeStrategy(Command, kw_only=True):
    """Hand the selected seeds to another grafting strategy from their present alpha on."""

    select: Selector
    strategy: str


class PauseGrafting(Command, kw_only=True):
    """Hold alpha of the selected GRAFTING seeds."""

    select: Selector


class ResumeGrafting(Command, kw_only=True):
    """Let a paused ramp go on from where it stands."""

    select: Selector


class ApplyTogether(Command, kw_only=True):
    """All of these or none: validated and applied on a copy, which is swapped in when every one succeeds.

    They come and end together: acknowledged is this command's id and not theirs, and its deadline and priority hold for all of
    them. One that has a deadline or priority of its own has the whole refused.
    """

    commands: list[Germinate | SetStage | Cancel | ChangeStrategy | PauseGrafting | ResumeGrafting]


class ApplyEach(Command, kw_only=True):
    """One after the other, each for itself: what is refused keeps back nothing else.

    They come and end together, as in ApplyTogether: applied when at least one was, the reason naming those that were not.
    """

    commands: list[Germinate | SetStage | Cancel | ChangeStrategy | PauseGrafting | ResumeGrafting]


class EmergencyStop(Command, kw_only=True):
    """Cull everything that is not FOSSILIZED, now; overtakes whatever is queued."""

    reason: str = ""


class RequestReport(Command, kw_only=True):
    """Ask for a Report event."""


class Decided(Command, kw_only=True):
    """A lockstep controller's mark: it has decided on everything up to ``tick``; ``epoch`` is that of the TickEnded."""

    tick: int
    epoch: int = 0


# --- large payloads --------------------------------------------------------------------------------------------------


class ClaimCheck(Message):
    """Stands for a message whose bytes lie in a file: ``digest`` (SHA-256, hex) names it, ``size`` is its bytes."""

    digest: str
    size: int


# --- back: acknowledgements -----------------------------------------------------------------------------------------


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
    ApplyTogether,
    ApplyEach,
    EmergencyStop,
    RequestReport,
    Decided,
)
BODIES = (Telemetry, *EVENTS, *COMMANDS, ClaimCheck, Acknowledgement)
