"""Alerts about the bus are held back when there are too many, which is an alert itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from esper.bus import open_bus
from esper.bus.config import MemoryConfig
from esper.bus.trainer.alert_limit import A_MINUTE, AlertLimit
from esper.bus.trainer.bus_port import BusPort
from esper.cli.compose import compose
from esper.messages import Alert
from esper.running.connections import RunPort
from esper.running.run import run


@pytest.fixture
def clock(monkeypatch):
    """Seconds, for the limit and the library it uses."""
    moment = [1_000_000.0]
    monkeypatch.setattr("esper.bus.trainer.alert_limit.time.monotonic", lambda: moment[0])
    monkeypatch.setattr("limits.storage.memory.time.time", lambda: moment[0])
    return moment


def flap(port, times, code="bus_down"):
    port.bus.incidents.extend((code, "the server is gone") for _ in range(times))


@pytest.fixture
def port(tmp_path):
    bus = open_bus(MemoryConfig(), tmp_path)
    consumer = bus.consumer("events", "run", "tracker", "one")
    port = BusPort(bus, "run", ("a",))
    port.started(0, 9, [])
    port.read = lambda: [d.message for d in consumer.read(1000) if isinstance(d.message, Alert)]
    yield port
    bus.close()


def test_the_first_alert_that_is_held_back_is_said_and_at_the_end_how_many_were(port):
    flap(port, A_MINUTE + 3)
    flap(port, 1, "bus_refused")
    port.end_tick(1)
    *told, limit, other = port.read()
    assert [alert.code for alert in told] == ["bus_down"] * A_MINUTE
    assert (limit.code, limit.level, limit.tick) == ("alerts_held_back", "warning", 1)
    assert limit.text.startswith("more than 6 alerts bus_down came within 60 s")
    assert other.code == "bus_refused"
    flap(port, 2)
    port.end_tick(2)
    assert port.read() == []
    port.ended(3, "FINISHED", {})
    (rest,) = port.read()
    assert (rest.code, rest.level, rest.text) == ("alerts_held_back", "info", "5 alerts bus_down were held back since tick 1")
    assert port.counts()["alerts_held_back"] == 5


def test_when_they_are_published_again_it_is_said_how_many_were_not(port, clock):
    flap(port, A_MINUTE + 3)
    port.end_tick(1)
    clock[0] += 59
    flap(port, 1)
    port.end_tick(2)
    port.read()
    clock[0] += 2
    port.end_tick(3)
    (opened,) = port.read()
    assert opened.text == "4 alerts bus_down were held back since tick 1; they are published again"
    flap(port, 1)
    port.end_tick(4)
    assert [alert.code for alert in port.read()] == ["bus_down"]
    port.ended(5, "FINISHED", {})
    assert port.read() == []


def test_a_server_that_flaps_all_night_says_eight_things_in_two_minutes(clock):
    limit, said = AlertLimit(), 0
    for _ in range(120):
        clock[0] += 1
        said += len(limit.over()) + sum(limit.offer("bus_down", "gone", 0) is not None for _ in range(10))
    assert said <= 2 * (A_MINUTE + 2)
    assert limit.held_back >= 1200 - 2 * A_MINUTE


@pytest.mark.usefixtures("whole_runs")
def test_a_runs_summary_counts_what_was_held_back(tmp_path, monkeypatch):
    began = RunPort.started

    def started(self: RunPort, *arguments: Any) -> None:
        began(self, *arguments)
        flap(self, A_MINUTE + 4)

    monkeypatch.setattr(RunPort, "started", started)
    words = ["trainer.steps=40", "trainer.control=false", "tracking=csv", "tracking.figures=false", f"output={tmp_path}"]
    run(compose(words), tmp_path / "run", quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bus"]["alerts_held_back"] == 4
    assert [alert["code"] for alert in summary["alerts"]].count("alerts_held_back") == 1
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event.get("code") == "alerts_held_back"]
    assert [text.split()[0] for text in told] == ["more", "4"]
