"""The roll of a training's processes, in torch's own store: which of them is missing when a connection has broken."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from torch import distributed as dist

ANSWER_S = 5.0
"""How long the others may take to notice that a connection has broken, and to sign."""
GRACE_S = 0.5
"""How long another one may take to sign once all but one have."""


class Roll:
    """Every rank signs with its process at the start, and again when a connection breaks: who does not sign is gone.

    The store is that of torchrun's agent, which outlives the ranks; without torchrun it is rank 0's, and dies with it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._set("present", json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))

    def leave(self, why: str) -> None:
        """This rank ends in an orderly way, so that the others need not report its death."""
        self._set("left", why)

    def missing(self, doing: str, error: Exception) -> str:
        """The sentence about a connection that broke in ``doing``; waits a little for the others to sign."""
        try:
            self._set("alive", "")
            signed = self._await_signatures()
            gone = [rank for rank in range(self.size) if rank not in signed]
            left = [rank for rank in range(self.size) if self._has("left", rank)]
            names = {rank: self._name(rank) for rank in gone}
        except RuntimeError:
            return f"The processes of this training lost each other at {doing}: rank 0, which kept their roll, is gone. {_GO_ON}"
        if left:
            return f"Rank {left[0]} has ended: {self._get('left', left[0])}"
        if not gone:
            return f"The connection between the processes broke at {doing}, though all are there: {_first_line(error)} {_GO_ON}"
        which = " and ".join(f"rank {rank} ({names[rank]})" for rank in gone)
        which = which[0].upper() + which[1:]
        return f"{which} died; the other ranks noticed at {doing} and have ended too. {_GO_ON}"

    def _await_signatures(self) -> set[int]:
        began, enough = time.monotonic(), 0.0
        while True:
            signed = {rank for rank in range(self.size) if self._has("alive", rank) or self._has("left", rank)}
            now = time.monotonic()
            if len(signed) >= self.size - 1:
                enough = enough or now
            if len(signed) == self.size or now - began > ANSWER_S or (enough and now - enough > GRACE_S):
                return signed
            time.sleep(0.05)

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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
