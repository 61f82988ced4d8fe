"""Telemetry rows between the trainer, who never waits, and whoever makes messages of them meanwhile."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch

from esper.bus.telemetry_codec import unpack
from esper.bus.trainer.telemetry_ring import ROOM, TelemetryRing

SEEDS, COLUMNS = 7, ("a", "b", "c")
FLUSH = 4


class Ring:
    """A ring and the messages it made."""

    def __init__(self, deferred=False):
        self.messages = []
        self.ring = TelemetryRing(COLUMNS, FLUSH, 1 << 20, self.messages.append)
        self.ring.deferred = deferred

    def say(self, tick, site="fc", in_place=True):
        rows = self.ring.slot(site, SEEDS) if in_place else torch.empty(SEEDS, len(COLUMNS))
        self.ring.put(tick, site, rows.fill_(float(tick)))

    def ticks(self, site="fc"):
        """Ticks of the messages, each checked to have its own values."""
        found = []
        for message in self.messages:
            if message.site == site:
                assert (unpack(message) == np.array(message.ticks, np.float32)[:, None, None]).all()
                found.append(message.ticks)
        return found


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_written_in_place_or_copied_come_out_as_they_went_in(in_place):
    said = Ring()
    for tick in range(10):
        said.say(tick, in_place=in_place)
    assert said.ticks() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    said.ring.drain()
    assert said.ticks()[-1] == [8, 9]


def test_rows_written_in_place_are_not_copied():
    said = Ring()
    slots = []
    for tick in range(ROOM * FLUSH + 1):
        slots.append(said.ring.slot("fc", SEEDS))
        said.say(tick)
    apart = {slot.data_ptr() for slot in slots[:-1]}
    assert len(apart) == ROOM * FLUSH
    assert slots[-1] is slots[0]
    slots[-1].fill_(0.5)  # it is the waiting row itself
    said.ring.drain()
    with pytest.raises(AssertionError):
        said.ticks()


def test_a_slot_stays_the_trainers_while_what_was_put_before_it_is_sent():
    said = Ring(deferred=True)
    said.say(0)
    slot = said.ring.slot("fc", SEEDS)
    said.ring.drain()
    assert said.ring.slot("fc", SEEDS) is slot
    said.ring.put(1, "fc", slot.fill_(1.0))
    said.ring.drain()
    assert said.ticks() == [[0], [1]]


def test_when_nobody_makes_messages_the_trainer_does_and_nothing_is_overwritten():
    said = Ring(deferred=True)
    for tick in range(ROOM * FLUSH - 1):
        said.say(tick)
    assert said.messages == []
    said.say(ROOM * FLUSH - 1)
    assert said.ticks() == [list(range(first, first + FLUSH)) for first in range(0, ROOM * FLUSH, FLUSH)]


@pytest.mark.parametrize("deferred", [True, False])
def test_a_writer_at_any_moment_makes_neither_hole_nor_double_nor_disorder(deferred):
    said, over = Ring(deferred), threading.Event()

    def write():
        while not over.is_set():
            said.ring.send_full()
            said.ring.drain()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for tick in range(3000):
            for site in ("fc1", "fc2"):
                said.say(tick, site, in_place=tick % 2 == 0)
    finally:
        over.set()
        writer.join()
        sys.setswitchinterval(before)
    said.ring.drain()
    for site in ("fc1", "fc2"):
        ticks = said.ticks(site)
        assert [tick for part in ticks for tick in part] == list(range(3000))
        assert max(map(len, ticks)) <= FLUSH
