"""Between a producer and the server no message is out of sight, not even while it is being packed."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from faults import wait_until

from esper.bus.config import RedisConfig
from esper.bus.protocol import Counts
from esper.bus.server.outbox import Outbox
from esper.bus.server.spool import Spool
from esper.messages import TickEnded


class Packing:
    """An outbox whose first message is being packed by another thread, until told to go on."""

    def __init__(self, folder):
        self.go_on, self._started = threading.Event(), threading.Event()
        config = RedisConfig()
        self.outbox = Outbox("run", "main", 1, config, Spool(folder, config.spool_mb << 20), Counts(), self._seal)
        self.outbox.put(TickEnded(tick=7), ())
        self.thread = threading.Thread(target=self.outbox.batch)
        self.thread.start()
        assert self._started.wait(5)

    def _seal(self, wire, envelope):
        if threading.current_thread() is self.thread:
            self._started.set()
            assert self.go_on.wait(5)
        return wire


@pytest.fixture
def packing(tmp_path):
    begun = Packing(tmp_path / "spool")
    yield begun
    begun.go_on.set()
    begun.thread.join()


def test_a_message_that_is_being_packed_waits(packing):
    assert packing.outbox.waiting == 1
    packing.go_on.set()
    packing.thread.join()
    assert packing.outbox.waiting == 1
    packing.outbox.confirm((1, 1))
    assert packing.outbox.waiting == 0


def test_a_message_whose_packing_ends_while_a_checkpoint_puts_all_on_disk_is_on_it(packing, tmp_path):
    class Slow(deque):
        """Read slowly: the packing ends before what was read is used."""

        def __iter__(self):
            items = list(super().__iter__())
            packing.go_on.set()
            if threading.current_thread() is not packing.thread:
                packing.thread.join(0.5)
            return iter(items)

    packing.outbox.sending = Slow()
    packing.outbox.to_disk()
    packing.thread.join()
    assert len(Spool(tmp_path / "spool", 1 << 20).read(10, 1 << 20)) == 1


def test_what_is_on_its_way_from_disk_to_the_server_waits(tmp_path):
    spool = Spool(tmp_path / "spool", 1 << 20)
    spool.append(1, 1, b"from an earlier start")
    read, seen = spool.read, []
    outbox = Outbox("run", "main", 2, RedisConfig(), spool, Counts(), lambda wire, envelope: wire)

    def slowly(count, size):
        records = read(count, size)
        asking = threading.Thread(target=lambda: seen.append(outbox.waiting))
        asking.start()
        asking.join(0.3)
        return records

    spool.read = slowly
    outbox.batch()
    assert wait_until(lambda: seen) and seen == [1]
