"""The preallocated ring for telemetry rows: putting them there is the only telemetry work inside a training step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.messages import Telemetry

ROOM = 4  # messages' worth of rows a site has place for; when all of it waits, the trainer makes messages itself


@dataclass(slots=True)
class SiteRing:
    """Rows of one site: number ``n`` lies at ``n % len(rows)``, and those from ``read`` up to ``written`` wait.

    One thread writes: it fills a row that does not wait, and then counts it in ``written``. The reader counts in ``read``
    the rows that it has copied. Neither needs a lock against the other, and no other thread touches a row that is being filled.
    """

    buffer: Tensor  # float32 [rows, seeds, columns]
    rows: list[Tensor]  # its rows, as views made once
    ticks: list[int]
    flush: int  # rows to a message
    written: int = 0
    read: int = 0

    @classmethod
    def allocate(cls, flush: int, seeds: int, columns: int) -> SiteRing:
        """All the memory this site will need, touched now so that no page fault comes later."""
        buffer = torch.full((ROOM * flush, seeds, columns), torch.nan)
        return cls(buffer, list(buffer), [0] * len(buffer), flush)

    def take(self, most: int) -> tuple[list[int], bytes]:
        """Ticks and bytes of the oldest waiting rows that lie side by side, at most ``most``; they wait no more."""
        first = self.read % len(self.rows)
        last = min(first + most, len(self.rows))
        ticks, data = self.ticks[first:last], self.buffer.numpy()[first:last].tobytes()
        self.read += last - first
        return ticks, data


class TelemetryRing:
    """Rows that wait, by site; full messages, and on ``drain`` all rows, are made into messages handed to ``emit``.

    ``slot`` and ``put`` are for one thread, the trainer's. With ``deferred`` it leaves full messages to a sender thread that
    calls ``send_full``. Messages of a site leave in the order of their ticks, whichever thread makes them.
    """

    def __init__(self, columns: tuple[str, ...], flush_ticks: int, flush_bytes: int, emit: Callable[[Telemetry], None]) -> None:
        self.deferred = False
        self._columns = list(columns)
        self._flush_ticks = flush_ticks
        self._flush_bytes = flush_bytes
        self._emit = emit
        self._sites: dict[str, SiteRing] = {}
        self._emitting = threading.Lock()  # reading, and the order of messages
        self._oldest = 0.0  # when the first row that waits came in, 0 when none waits

    def slot(self, site: str, seeds: int) -> Tensor:
        """The place of the site's next rows, float32 ``[seeds, columns]`` holding anything: filled and ``put``, they are not copied."""
        ring = self._sites.get(site) or self._open(site, seeds, len(self._columns))
        return ring.rows[ring.written % len(ring.rows)]

    def put(self, tick: int, site: str, rows: Tensor) -> None:
        """Take ``rows`` (float32 ``[seeds, columns]``, CPU): a filled ``slot`` without a copy, anything else by copying it there.

        By torch: between two steps neither side is in the processor's caches, and there its copy takes a third of numpy's time.
        """
        ring = self._sites.get(site) or self._open(site, *rows.shape)
        number = ring.written % len(ring.rows)
        slot = ring.rows[number]
        if rows is not slot:
            slot.copy_(rows)
        ring.ticks[number] = tick
        ring.written += 1
        if self._oldest == 0.0:  # after the row is counted: see drain
            self._oldest = time.monotonic()
        waiting = ring.written - ring.read
        if waiting >= ring.flush and not (self.deferred and waiting < len(ring.rows)):
            self.drain()

    def drain(self, older_than_s: float = 0.0) -> None:
        """Emit everything that is in the ring, if its first row has waited at least ``older_than_s`` seconds."""
        if self._oldest == 0.0 or time.monotonic() - self._oldest < older_than_s:
            return
        with self._emitting:
            self._oldest = 0.0  # before anything is read: a row that comes in meanwhile is read below, or starts a new wait
            for site, ring in list(self._sites.items()):
                self._emit_upto(site, ring, ring.written)

    def send_full(self) -> None:
        """Emit the messages that are full, for the sender thread."""
        for site, ring in list(self._sites.items()):
            if ring.written - ring.read >= ring.flush:
                with self._emitting:
                    self._emit_upto(site, ring, ring.written - (ring.written - ring.read) % ring.flush)

    def _open(self, site: str, seeds: int, columns: int) -> SiteRing:
        assert columns == len(self._columns), (columns, self._columns)
        row_bytes = max(1, seeds * columns * 4)
        flush = max(1, min(self._flush_ticks, self._flush_bytes // row_bytes))
        ring = self._sites[site] = SiteRing.allocate(flush, seeds, columns)
        return ring

    def _emit_upto(self, site: str, ring: SiteRing, last: int) -> None:
        """Make messages of the rows before number ``last``; the caller holds the right to emit."""
        while ring.read < last:
            ticks, data = ring.take(min(ring.flush, last - ring.read))
            self._emit(Telemetry(site=site, ticks=ticks, seeds=ring.buffer.shape[1], columns=self._columns, data=data))
