"""One named generator per purpose; nothing in esper draws from a global one."""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on the run's seed and on every word of the purpose."""
    text = "\x1f".join([str(seed), *map(str, purpose)]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose, the same on every machine."""
    made = torch.Generator(device="cpu")
    made.manual_seed(seed_for(seed, *purpose))
    return made
