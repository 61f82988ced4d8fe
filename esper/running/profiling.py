"""A trace of some steps of a run, for chrome://tracing or Perfetto."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from esper.trainer.trainer import Trainer

NAME = "trace.json.gz"
Between = Callable[[Trainer], None]


@contextmanager
def profiled(trainer: Trainer, between: Between, steps: int, folder: Path) -> Iterator[Between]:
    """Within, the ``steps`` in the middle of what is left of the run are traced to ``folder/trace.json.gz``; 0 traces none.

    Yields what the trainer is to call between two steps: ``between``, and the start and end of the trace. In the middle, because
    there the seeds have something to show. A run that is interrupted leaves the trace it has.
    """
    if steps == 0:
        yield between
        return
    done = trainer.outcome.steps
    first = done + max(0, (trainer.total - done - steps) // 2)
    trace = _Trace(first, first + steps, folder / NAME)
    trace.at(done)

    def both(trainer: Trainer) -> None:
        trace.at(trainer.outcome.steps)
        between(trainer)

    try:
        yield both
    finally:
        trace.end(trainer.outcome.steps)


class _Trace:
    """Steps ``first`` (counted from 0) to ``last`` (not included), written to ``path`` once they are over."""

    def __init__(self, first: int, last: int, path: Path) -> None:
        self.first, self.last, self.path = first, last, path
        self._profiler: torch.profiler.profile | None = None

    def at(self, step: int) -> None:
        """Say that ``step`` comes next."""
        if step == self.first:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif step >= self.last:
            self.end(step)

    def end(self, step: int) -> None:
        """Write what was traced up to ``step``, if it is not written yet."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.path))
        print(f"trace of the steps {self.first + 1} to {step}: {self.path}", file=sys.stderr, flush=True)
