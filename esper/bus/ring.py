"""The preallocated ring for telemetry rows: copying into it is the only telemetry work inside a training step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.bus.messages import Telemetry

SPARES = 3  # buffers a site has beside the one being filled; when they are used up the trainer empties one itself


@dataclass
class SiteRing:
    """Rows of one site that wait: ``buffer`` float32 ``[ticks, seeds, columns]``, filled up to ``len(ticks)``."""

    buffer: Tensor
    spares: list[Tensor]
    ticks: list[int] = field(default_factory=list)

    @classmethod
    def allocate(cls, ticks: int, seeds: int, columns: int) -> SiteRing:
        """All the memory this site will need, touched now so that no page fault comes later."""
        buffers = [torch.full((ticks, seeds, columns), torch.nan) for _ in range(1 + SPARES)]
        return cls(buffers[0], buffers[1:])


class TelemetryRing:
    """Buffers into which ``put`` copies; full ones, and on ``drain`` all, become messages handed to ``emit``.

    With ``deferred`` the trainer only swaps a full buffer for a spare one, and a writer thread that calls ``send_full``
    makes the messages. Messages of a site leave in the order of their ticks whoever makes them.
    """

    def __init__(
        self, columns: tuple[str, ...], flush_ticks: int, flush_bytes: int, emit: Callable[[Telemetry], None]
    ) -> None:
        self.deferred = False
        self._columns = list(columns)
        self._flush_ticks = flush_ticks
        self._flush_bytes = flush_bytes
        self._emit = emit
        self._sites: dict[str, SiteRing] = {}
        self._full: deque[tuple[str, list[int], Tensor]] = deque()
        self._lock = threading.Lock()  # the buffers being filled
        self._emitting = threading.Lock()  # the order of messages
        self._oldest = 0.0  # when the first row that waits came in, 0 when none waits

    def put(self, tick: int, site: str, rows: Tensor) -> None:
        """Copy ``rows`` (float32 ``[seeds, columns]``, CPU).

        By torch: between two steps neither side is in the processor's caches, and there its copy takes a third of numpy's time.
        """
        ring = self._sites.get(site)
        if ring is None:
            ring = self._sites[site] = self._allocate(*rows.shape)
        with self._lock:
            ring.buffer[len(ring.ticks)].copy_(rows)
            ring.ticks.append(tick)
            if self._oldest == 0.0:
                self._oldest = time.monotonic()
            full = len(ring.ticks) == len(ring.buffer)
            swapped = full and self._swap(site, ring)
        if full and not (self.deferred and swapped):
            self.drain()

    def drain(self, older_than_s: float = 0.0) -> None:
        """Emit everything that is in the ring, if its first row has waited at least ``older_than_s`` seconds."""
        if self._oldest == 0.0 or time.monotonic() - self._oldest < older_than_s:
            return
        with self._emitting:
            with self._lock:
                self._oldest = 0.0  # before anything is taken: a row that comes in meanwhile starts a new wait
            self._emit_full()
            for site, ring in self._sites.items():
                with self._lock:
                    if ring.ticks:
                        self._swap(site, ring)
                self._emit_full()

    def send_full(self) -> None:
        """Emit the buffers that are full, for the writer thread."""
        if self._full:
            with self._emitting:
                self._emit_full()

    def _allocate(self, seeds: int, columns: int) -> SiteRing:
        assert columns == len(self._columns), (columns, self._columns)
        row_bytes = max(1, seeds * columns * 4)
        return SiteRing.allocate(max(1, min(self._flush_ticks, self._flush_bytes // row_bytes)), seeds, columns)

    def _swap(self, site: str, ring: SiteRing) -> bool:
        """Set the filled buffer aside and go on with a spare one, if there is one; the caller holds the lock."""
        if not ring.spares:
            return False
        self._full.append((site, ring.ticks, ring.buffer))
        ring.buffer, ring.ticks = ring.spares.pop(), []
        return True

    def _emit_full(self) -> None:
        """Make messages of the buffers set aside; the caller holds the right to emit."""
        while self._full:
            site, ticks, buffer = self._full.popleft()
            data = buffer.numpy()[: len(ticks)].tobytes()
            self._sites[site].spares.append(buffer)
            self._emit(Telemetry(site=site, ticks=ticks, seeds=buffer.shape[1], columns=self._columns, data=data))
