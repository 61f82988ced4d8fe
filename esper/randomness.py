"""One named generator per purpose; nothing in esper draws from a global one, or leaves one elsewhere than it was."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on the run's seed and on every word of the purpose."""
    text = "\x1f".join([str(seed), *map(str, purpose)]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A separate CPU generator for one purpose, the same on every machine."""
    made = torch.Generator(device="cpu")
    made.manual_seed(seed_for(seed, *purpose))
    return made


class GlobalDraws:
    """Where the global generators stand: Python's, NumPy's where it is in use, and torch's of the CPU and of every GPU in use.

    A host and its loss may draw from any of them, and so may the data that a judge looks at.
    """

    def __init__(self) -> None:
        numpy = _numpy()
        self._python = random.getstate()
        self._numpy: Any = None if numpy is None else numpy.random.get_state()
        self._cpu = torch.get_rng_state()
        self._gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, without torch's own generators: plain values and tensors."""
        version, words, gauss = self._python
        found: dict[str, Any] = {"python": {"version": version, "words": torch.tensor(words), "gauss": gauss}}
        if self._numpy is not None:
            kind, key, place, has_gauss, cached = self._numpy
            drawn = torch.tensor(key.tolist())
            found["numpy"] = {"kind": kind, "key": drawn, "place": int(place), "has_gauss": int(has_gauss), "cached": float(cached)}
        return found

    @staticmethod
    def restore(state: dict[str, Any]) -> None:
        """Set Python's and NumPy's generators to where they stood at ``state``; one that it does not hold stays where it is."""
        if "python" in state:
            saved = state["python"]
            random.setstate((int(saved["version"]), tuple(saved["words"].tolist()), saved["gauss"]))
        numpy = _numpy()
        if "numpy" in state and numpy is not None:
            saved = state["numpy"]
            key = numpy.array(saved["key"].tolist(), dtype=numpy.uint32)
            numpy.random.set_state((saved["kind"], key, int(saved["place"]), int(saved["has_gauss"]), float(saved["cached"])))

    def put_back(self) -> None:
        """Set every generator to where it stood."""
        random.setstate(self._python)
        numpy = _numpy()
        if numpy is not None and self._numpy is not None:
            numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)


@contextmanager
def global_draws_kept() -> Iterator[None]:
    """Within, anything may draw from the global generators; afterwards they stand where they stood."""
    before = GlobalDraws()
    try:
        yield
    finally:
        before.put_back()


def seed_global_draws(seed: int) -> None:
    """Let everything that draws from a global generator draw the same from now on; only within ``global_draws_kept``."""
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _numpy() -> Any:
    """NumPy, if it has been imported: the engine itself does without."""
    return sys.modules.get("numpy")
