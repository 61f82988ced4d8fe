"""The runner: what is said in a tick is decided at its end, and every decision is marked."""

from __future__ import annotations

import threading

import pytest

from esper.controllers import ControllerRunner
from esper.controllers.none import NoneConfig
from esper.controllers.scheduled import ScheduledConfig
from esper.messages import Decided, Germinate, RunEnded, RunStarted, Telemetry, TickEnded

SCRIPT = ScheduledConfig(script=[{"at": "2step", "command": "germinate", "site": "fc1", "seeds": [0]}])


class Listener:
    """Writes down what it hears, and when it is asked."""

    def __init__(self):
        self.log = []

    def observe(self, message):
        self.log.append(type(message).__name__)

    def decide(self, tick):
        self.log.append(tick)
        return []


def test_it_hears_all_of_a_tick_before_it_decides(run):
    listener = Listener()
    run(listener).start().until(2, lambda tick: {"a": 1.0})
    heard = ["Metrics", "TickEnded", "Telemetry", "Telemetry"]
    assert listener.log == ["RunStarted", *heard, 1, *heard, 2]


def test_what_is_said_of_a_seed_comes_after_its_site_was_named(run):
    listener = Listener()
    run(listener).start().until(1)
    assert listener.log.index("RunStarted") < listener.log.index("Telemetry")


def test_each_tick_ends_with_a_mark_that_repeats_the_epoch(bus):
    runner = ControllerRunner(bus, "run", SCRIPT.build(0))
    commands = bus.consumer("commands", "run", "test", "test")
    events = bus.producer("events", "run")
    events.publish(RunStarted(tick=0, total_ticks=10, sites=[{"name": "fc1", "seeds": 1}]))
    for tick in (1, 2):
        events.publish(TickEnded(tick=tick, epoch=7))
        runner.step(tick)
    runner.close()
    assert [d.message for d in commands.read()] == [
        Decided(id="controller-1-decided", tick=1, epoch=7),
        Germinate(id="controller-2-0", site="fc1", seed=0),
        Decided(id="controller-2-decided", tick=2, epoch=7),
    ]


def test_deciding_on_a_tick_that_has_not_ended_is_a_programmers_mistake(bus):
    runner = ControllerRunner(bus, "run", NoneConfig().build(0))
    with pytest.raises(AssertionError, match="asked to decide on tick 3"):
        runner.step(3)


def test_served_apart_it_decides_the_same_and_returns_how_the_run_ended(bus):
    runner = ControllerRunner(bus, "run", SCRIPT.build(0))
    ended = []
    thread = threading.Thread(target=lambda: ended.append(runner.serve(block_s=0.05)))
    thread.start()
    commands = bus.consumer("commands", "run", "test", "test")
    events = bus.producer("events", "run")
    events.publish(RunStarted(tick=0, total_ticks=10, sites=[{"name": "fc1", "seeds": 1}]))
    sent = []
    for tick in range(1, 5):
        events.publish(TickEnded(tick=tick))
        while not sent or not isinstance(sent[-1], Decided) or sent[-1].tick < tick:
            sent += [d.message for d in commands.read(block_s=2.0)]
    events.publish(RunEnded(tick=4, status="FINISHED", summary={}))
    thread.join(timeout=5)
    assert ended == ["FINISHED"]
    assert [m.id for m in sent] == [
        "controller-1-decided",
        "controller-2-0",
        "controller-2-decided",
        "controller-3-decided",
        "controller-4-decided",
    ]


def test_served_apart_it_hears_the_other_streams_before_it_decides(bus):
    listener = Listener()
    runner = ControllerRunner(bus, "run", listener)
    bus.producer("telemetry", "run").publish(Telemetry(site="fc1", ticks=[], seeds=0, columns=[]))
    events = bus.producer("events", "run")
    events.publish(TickEnded(tick=1))
    events.publish(RunEnded(tick=1, status="KILLED", summary={}))
    assert runner.serve() == "KILLED"
    assert listener.log == ["TickEnded", "Telemetry", 1, "RunEnded"]


def test_it_gives_up_when_nobody_speaks(bus):
    assert ControllerRunner(bus, "run", NoneConfig().build(0)).serve(block_s=0.01, idle_s=0.03) is None


def test_its_state_is_the_controllers(bus):
    runner = ControllerRunner(bus, "run", SCRIPT.build(0))
    runner.load_state({"view": {"stages": [["fc1", 0, 3]]}, "sent": [0]})
    assert runner.state() == {"view": {"stages": [["fc1", 0, 3]]}, "sent": [0]}
    other = ControllerRunner(bus, "other", NoneConfig().build(0))
    other.load_state(other.state())
    assert other.state() == {}
