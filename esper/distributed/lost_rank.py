"""The roll of a training's processes, in torch's own store: which of them is missing when a connection has broken."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from torch import distributed as dist

from esper.errors import RankLost

ANSWER_S = 5.0
"""How long a process on another machine may take to notice that a connection has broken, and to sign."""


class Roll:
    """Every rank signs with its process at the start, and again when a connection breaks: who does not sign is gone.

    The store is that of torchrun's agent, which outlives the ranks; without torchrun it is rank 0's, and dies with it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._set("present", json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}))

    def leave(self, why: str) -> None:
        """This rank ends for a reason that rank 0 is to say; one that was killed the next moment could not say it any more."""
        with contextlib.suppress(RuntimeError):  # rank 0 kept the store, and is gone
            self._set("left", why)
            began = time.monotonic()
            while self.rank and not (self._has("left", 0) or self._has("heard", 0)) and time.monotonic() - began < ANSWER_S:
                time.sleep(0.05)

    def missing(self, doing: str, error: Exception) -> RankLost:
        """The sentence about a connection that broke in ``doing``; waits a little for the others to sign."""
        try:
            self._set("alive", "")
            gone = self._await_the_missing()
            left = [rank for rank in range(self.size) if self._has("left", rank)]
            names = {rank: self._name(rank) for rank in gone}
            reason = self._get("left", left[0]) if left else ""
            self._set("heard", "")
        except RuntimeError:
            return RankLost(f"The processes of this training lost each other at {doing}: the one that kept their roll is gone. {_GO_ON}")
        speaks = self.rank == min(set(range(self.size)) - {*gone, *left}, default=self.rank)
        if left:
            return RankLost(f"Rank {left[0]} has ended: {reason}", speaks and left[0] != 0)
        if not gone:
            return RankLost(f"The connection between the processes broke at {doing}: {_first_line(error)}. {_GO_ON}", speaks)
        which = " and ".join(f"rank {rank} ({names[rank]})" for rank in gone)
        return RankLost(f"{which[0].upper()}{which[1:]} died; the others noticed at {doing} and end too. {_GO_ON}", speaks)

    def _await_the_missing(self) -> list[int]:
        """The ranks that are gone: dead on this machine, or silent on another one."""
        began = time.monotonic()
        while True:
            silent = [rank for rank in range(self.size) if not (self._has("alive", rank) or self._has("left", rank))]
            known = {rank: self._is_dead(rank) for rank in silent}
            dead = [rank for rank in silent if known[rank]]
            elsewhere = [rank for rank in silent if known[rank] is None]
            over = time.monotonic() - began > ANSWER_S
            if over or not silent or (dead and not elsewhere):
                return sorted(dead + elsewhere)
            time.sleep(0.02)

    def _is_dead(self, rank: int) -> bool | None:
        """Whether the process of a rank is gone; None where that cannot be seen from this machine."""
        entry = json.loads(self._get("present", rank))
        if entry["machine"] != _machine():
            return None
        try:
            return Path(f"/proc/{entry['pid']}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
        except OSError:
            return True

    def _name(self, rank: int) -> str:
        entry = json.loads(self._get("present", rank))
        return f"process {entry['pid']} on {entry['host']}"

    def _key(self, kind: str, rank: int) -> str:
        return f"esper/{self._attempt}/{kind}/{rank}"

    def _set(self, kind: str, text: str) -> None:
        self._store.set(self._key(kind, self.rank), text)

    def _get(self, kind: str, rank: int) -> str:
        found: bytes = self._store.get(self._key(kind, rank))
        return found.decode()

    def _has(self, kind: str, rank: int) -> bool:
        return bool(self._store.check([self._key(kind, rank)]))


_GO_ON = "The last checkpoint stands: resume=auto goes on from it."


def _machine() -> str:
    """What two processes have in common that can see each other; containers on one machine may not."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
