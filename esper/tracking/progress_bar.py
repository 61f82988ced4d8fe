"""The progress bar: a tracker that shows the state of the run, which it gathers from the bus's messages."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.messages import Alert, Message, Metrics, RunStarted, Telemetry, TickEnded, Transition
from esper.report.number_format import duration, short
from esper.tracking.run_info import RunInfo
from esper.tracking.tracker import rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WINDOW_S = 5.0  # the speed is that of the last seconds, so that slow stages show
PLAIN_S = 10.0  # without a terminal: a line this often


class ProgressState:
    """The progress of a run.

    Metrics used: ``train/loss``, the primary one, ``cost/steps``, ``cost/seconds``, ``cost/shadow_seconds`` and
    ``cost/judge_seconds``.
    """

    def __init__(self, primary: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.primary, self._clock = primary, clock
        self.tick, self.total = 0, 0
        self.values: dict[str, float] = {}
        self._stages: dict[str, np.ndarray] = {}
        self._blocks: dict[tuple[str, int], int] = {}
        self._times: deque[tuple[float, float, int]] = deque()

    def take(self, message: Message) -> None:
        """Learn from one message."""
        match message:
            case RunStarted():
                self.tick, self.total = message.tick, message.total_ticks
                self._stages = {site["name"]: np.zeros(int(site.get("seeds", 0)), np.int64) for site in message.sites}
            case Metrics():
                self.values.update(message.values)
            case TickEnded():
                self.tick = message.tick
            case Telemetry() if message.ticks:
                self._stages[message.site] = rows(message)[-1, :, message.columns.index("stage")].astype(np.int64)
            case Transition():
                if message.seed < 0:
                    self._blocks[message.site, message.branch] = message.target
                elif message.seed < len(self._stages.get(message.site, ())):
                    self._stages[message.site][message.seed] = message.target

    def mark(self) -> None:
        """Note the time, for the speed; call it about as often as the bar is drawn."""
        now = self._clock()
        self._times.append((now, self.steps, self.tick))
        while len(self._times) > 2 and now - self._times[0][0] > WINDOW_S:
            self._times.popleft()

    @property
    def steps(self) -> float:
        """Optimizer steps done; ticks where the trainer does not say."""
        return self.values.get("cost/steps", float(self.tick))

    @property
    def steps_per_second(self) -> float | None:
        """Recent steps per second."""
        return self._per_second(1)

    @property
    def left_s(self) -> float | None:
        """Remaining seconds at the present pace."""
        speed = self._per_second(2)
        return (self.total - self.tick) / speed if speed else None

    def _per_second(self, column: int) -> float | None:
        if len(self._times) < 2:
            return None
        first, last = self._times[0], self._times[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else None

    @property
    def stages(self) -> dict[str, int]:
        """Seeds, and blocks that grew, by stage; in the order of life, empty stages left out."""
        counts: Counter[int] = Counter(self._blocks.values())
        for stages in self._stages.values():
            counts.update(stages.tolist())
        return {stage.name.lower().replace("_", " "): counts[stage] for stage in Stage if counts[stage]}

    @property
    def overhead(self) -> float | None:
        """Share of the time spent on shadow forwards and judging, 0 to 1."""
        total = self.values.get("cost/seconds", 0.0)
        spent = self.values.get("cost/shadow_seconds", 0.0) + self.values.get("cost/judge_seconds", 0.0)
        return spent / total if total > 0 else None

    @property
    def score(self) -> tuple[str, float | None]:
        """The primary validation metric: its short name and latest value."""
        name = self.primary or next((name for name in sorted(self.values) if name.startswith("validation/")), "validation")
        value = self.values.get(name, self.values.get(f"validation/{name}"))
        return name.removeprefix("validation/"), value

    def line(self) -> str:
        """Everything in one line but the bar and the step."""
        name, score = self.score
        stages = ", ".join(f"{count} {stage}" for stage, count in self.stages.items())
        judged = name if name == "validation" else f"validation {name}"
        parts = [f"train loss {short(self.values.get('train/loss'))}", f"{judged} {short(score)}"]
        if stages:
            parts.append(f"seeds: {stages}")
        if self.overhead is not None:
            parts.append(f"shadow+judge {self.overhead:.0%}")
        parts += [f"{short(self.steps_per_second, 3)} steps/s", f"{duration(self.left_s)} left"]
        return " · ".join(parts)


class ProgressBar:
    """Draws on standard error; where that is not a terminal, a plain line from time to time.

    Give it a TrackerRunner of its own, so that a slow store does not stop the bar.

    Alerts of level warning and error are printed as they come.
    """

    wants_model = False
    called = "the progress bar"

    def __init__(self, console: Console | None = None, *, plain_s: float = PLAIN_S) -> None:
        self._console, self._plain_s = console, plain_s
        self._bar: Progress | None = None

    def open(self, info: RunInfo) -> None:
        """Draw nothing yet: the length of the run is not known."""
        from rich.console import Console

        self._console = self._console or Console(stderr=True, file=sys.stderr)
        self.state = ProgressState(info.primary)
        self._said = time.monotonic()

    def record(self, messages: Sequence[Message]) -> None:
        """Learn and redraw once."""
        assert self._console is not None
        for message in messages:
            self.state.take(message)
            if isinstance(message, Alert) and message.level != "info":
                colour = "red" if message.level == "error" else "yellow"
                self._console.print(f"[{colour}]{message.level}[/] (tick {message.tick}):", end=" ")
                self._console.print(message.text, markup=False, highlight=False)
        self.state.mark()
        if self._console.is_terminal:
            self._draw()
        elif time.monotonic() - self._said >= self._plain_s:
            self._say()

    def _draw(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[line]}", markup=False)
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("", total=max(1, self.state.total), line="")
            self._bar.start()
        self._bar.update(self._task, completed=self.state.tick, total=max(1, self.state.total), line=self.state.line())
        self._bar.refresh()

    def _say(self) -> None:
        assert self._console is not None
        self._said = time.monotonic()
        line = f"{self.state.tick}/{self.state.total} · {self.state.line()}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self.state.total:
            self._say()
