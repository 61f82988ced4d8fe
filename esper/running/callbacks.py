"""Callbacks between two steps of the trainer: checksums of the weights, and a profiler's trace.

``weights.csv`` has a checksum of the weights for every evaluation of the validation set, so that a comparison of two runs finds where
they diverge. A checksum is the sum of the bits of all weights, read as whole numbers. It takes one pass, is exact in any order, and
changes with every bit, unless several changes cancel each other out to the last bit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from esper.blueprints import SlotBank
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.trainer.trainer import Trainer

Callback = Callable[[Trainer], None]
WEIGHTS, HEADER = "weights.csv", "step,sum"
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""Bytes of an element → the integer type that its bits are read as."""
TRACE = "trace.json.gz"  # for chrome://tracing or Perfetto


class WeightChecksums:
    """Called after every step of a session that begins after step ``since`` (−1: at the start); removes later lines of earlier sessions."""

    def __init__(self, folder: Path, since: int) -> None:
        self.path = folder / WEIGHTS
        kept = {step: value for step, value in read_checksums(folder).items() if step <= since}
        text = "".join(f"{line}\n" for line in (HEADER, *(f"{step},{value}" for step, value in kept.items())))
        temporary = folder / f".{WEIGHTS}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def __call__(self, trainer: Trainer) -> None:
        """Write the checksum if the validation set was measured after this step, and hand it to the operating system."""
        step = trainer.outcome.steps
        if trainer.validates(step):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{step},{checksum(_weights(trainer))}\n")


def read_checksums(folder: Path) -> dict[int, str]:
    """Checksum by step, from complete lines only; empty if nothing was written."""
    path = folder / WEIGHTS
    if not path.exists():
        return {}
    lines = [line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    return {int(line[0]): line[1] for line in lines if len(line) == 2 and line[0].isdigit() and len(line[1]) == 32}


def checksum(tensors: Iterable[Tensor]) -> str:
    """A digest of the tensors' sums of bits, in their order; waits for the device once."""
    with torch.no_grad():
        sums = [_integers(tensor).sum(dtype=torch.int64) for tensor in tensors]
        values = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(str(values).encode()).hexdigest()[:32]


def _integers(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(AS_INTEGERS[flat.element_size()])


def _weights(trainer: Trainer) -> Iterable[Tensor]:
    """Host and norm statistics by name, then the living branches."""
    registry = trainer.grow.registry
    for found in (host_parameters(registry.model), host_buffers(registry.model)):
        yield from (found[name].to(trainer.device) for name in sorted(found))
    for branch in registry.branches.living():
        bank = registry.layers[branch.site].bank(branch.blueprint)
        if isinstance(bank, SlotBank):
            yield from (bank.stacks[name][branch.slot] for name in sorted(bank.stacks))
        else:
            yield from bank.blocks[str(branch.slot)].state_dict().values()


@contextmanager
def profiled(trainer: Trainer, callback: Callback, steps: int, folder: Path) -> Iterator[Callback]:
    """Context in which the ``steps`` in the middle of the remaining run are traced to ``folder/trace.json.gz``; 0 traces none.

    Yields the callback for the trainer: it calls ``callback``, and starts and ends the trace. The middle of the run is chosen because
    seeds are active there. A run that is interrupted leaves the trace it has.
    """
    if steps == 0:
        yield callback
        return
    done = trainer.outcome.steps
    first = done + max(0, (trainer.total - done - steps) // 2)
    trace = _Trace(first, first + steps, folder / TRACE)
    trace.at(done)

    def both(trainer: Trainer) -> None:
        trace.at(trainer.outcome.steps)
        callback(trainer)

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
        """Start or stop tracing before ``step``, if it is time."""
        if step == self.first:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif step >= self.last:
            self.end(step)

    def end(self, step: int) -> None:
        """Write the trace up to ``step``, if it is not written yet."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.path))
        print(f"trace of the steps {self.first + 1} to {step}: {self.path}", file=sys.stderr, flush=True)
