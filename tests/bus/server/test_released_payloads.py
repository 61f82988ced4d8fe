"""After a finished run no large payload is left; while `esper track` could be started again, all are."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import msgspec
import pytest
from faults import wait_until

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, MemoryConfig
from esper.bus.discovery import invite
from esper.bus.programs import tracker as track
from esper.bus.server.payloads import keep_all, kept
from esper.bus.trainer.bus_port import BusPort
from esper.errors import UserError
from esper.messages import Metrics
from esper.running.connections import let_payloads_go, let_them_read, refuse_untrackable
from esper.tracking import RunInfo

LARGE = {f"a-metric-with-a-long-name/{number}": float(number) for number in range(40_000)}


@pytest.fixture
def bus(processes, tmp_path):
    """The server of a run that is tracked by another process."""
    opened = open_bus(EmbeddedConfig(claim_s=20.0), tmp_path)
    config = {"seed": 0, "tracking": {"name": "csv", "process": "external", "figures": False}}
    record = RunInfo(run="run", name="run", folder=str(tmp_path), outputs=str(tmp_path), started_ms=1, config=config)
    invite(tmp_path, "run", opened.config, msgspec.to_builtins(record))
    keep_all(tmp_path / "bus" / "payloads")
    yield opened
    opened.close()


def payloads(folder):
    return list((folder / "bus" / "payloads").iterdir())


def say_all(bus, status):
    port = BusPort(bus, "run", ("a",))
    port.started(0, 3, [])
    for tick in (1, 2, 3):
        port.emit(Metrics(tick=tick, values=LARGE))
        port.end_tick(tick)
    port.ended(3, status, {})
    port.close()
    return port


@pytest.mark.parametrize(("status", "left"), [("FINISHED", 0), ("KILLED", 4)])
def test_a_tracker_removes_at_its_end_what_only_another_start_of_it_would_need(tmp_path, bus, status, left):
    say_all(bus, status)
    assert len(payloads(tmp_path)) == 4
    assert track.main([str(tmp_path)]) == 0
    assert len(payloads(tmp_path)) == left
    before = (tmp_path / "metrics.csv").read_text()
    if left:
        assert track.main([str(tmp_path)]) == 0
        assert bus.dead_letters("run") == []
    else:
        with pytest.raises(UserError, match="cannot write it anew"):
            track.main([str(tmp_path)])
    assert (tmp_path / "metrics.csv").read_text() == before


def test_the_trainer_removes_them_before_the_server_of_the_run_ends(tmp_path, bus):
    outside, inside = (SimpleNamespace(process=name) for name in ("external", "internal"))
    config = SimpleNamespace(bus=bus.config, controller=inside, tracking=outside)
    tracker = threading.Thread(target=track.main, args=([str(tmp_path)],))
    tracker.start()
    port = say_all(bus, "FINISHED")
    port.silent = None
    let_payloads_go(bus, "run", port, let_them_read(config, bus, "run", port, quiet=True))
    assert payloads(tmp_path) == []
    tracker.join(60)
    assert not tracker.is_alive()
    with pytest.raises(UserError, match=r"tracking\.process=internal"):
        refuse_untrackable(config, tmp_path)


def test_what_nobody_tracked_or_what_may_go_on_stays(tmp_path, bus):
    finished = say_all(bus, "FINISHED")
    let_payloads_go(bus, "run", finished, False)
    killed = say_all(bus, "KILLED")
    let_payloads_go(bus, "run", killed, True)
    assert kept(tmp_path / "bus" / "payloads")
    assert wait_until(lambda: len(payloads(tmp_path)) == 7)


def test_a_run_with_its_bus_in_memory_ends_without_loading_the_client_of_a_server(tmp_path, monkeypatch):
    bus = open_bus(MemoryConfig(), tmp_path)
    finished = say_all(bus, "FINISHED")
    monkeypatch.setitem(sys.modules, "redis", None)  # an import of it would be an error
    let_payloads_go(bus, "run", finished, True)
    bus.close()
