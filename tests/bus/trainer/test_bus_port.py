"""The trainer's side: what a tick leads to comes at the next, every command ends once, and nothing that is said is lost."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from deciding import COLUMNS, Germinator, messages, rows

from esper.bus import open_bus
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.telemetry_codec import unpack
from esper.bus.trainer.bus_port import BusPort
from esper.messages import (
    Acknowledgement,
    Alert,
    Checkpoint,
    Decided,
    EmergencyStop,
    GateResult,
    Germinate,
    Metrics,
    Report,
    Telemetry,
    TickEnded,
    Transition,
)


def test_in_lockstep_what_a_tick_leads_to_is_applied_at_the_next_always(bus):
    runner = Germinator(bus, "run")
    port = BusPort(bus, "run", COLUMNS, runner=runner)
    port.started(0, 50, [])
    for tick in range(50):
        assert [command.seed for command in port.commands(tick)] == ([tick - 1] if tick else [])
        port.telemetry(tick, "fc", rows(tick))
        port.end_tick(tick)
        assert runner.rows == tick + 1
        if tick:
            port.acknowledge(f"g{tick - 1}", "applied", "", tick)


def test_a_checkpoint_taken_at_the_end_of_a_tick_hands_out_the_same_commands_after_a_resume(bus, tmp_path):
    runner = Germinator(bus, "run")
    port = BusPort(bus, "run", COLUMNS, runner=runner)
    port.started(0, 50, [])
    port.end_tick(0)
    state = json.loads(json.dumps(port.state()))
    resumed = BusPort(open_bus(MemoryConfig(), tmp_path / "other"), "run", COLUMNS)
    resumed.load_state(state)
    assert resumed.commands(1) == port.commands(1) == [Germinate(id="g0", site="fc", seed=0)]


def test_every_command_is_delivered_and_then_ends_exactly_once(bus):
    port = BusPort(bus, "run", COLUMNS)
    acks = bus.consumer("acks", "run", "test", "one")
    port.started(0, 50, [])
    operator = bus.producer("commands", "run", "operator")
    operator.publish(Germinate(id="late", site="fc", seed=0, deadline=4))
    operator.publish(Germinate(id="low", site="fc", seed=1))
    operator.publish(Germinate(id="high", site="fc", seed=2, priority=9))
    operator.publish(EmergencyStop(id="stop"))
    operator.publish(Germinate(id="low", site="fc", seed=1))
    assert [command.id for command in port.commands(5)] == ["stop", "high", "low"]
    port.acknowledge("stop", "applied", "", 5)
    port.acknowledge("high", "refused", "seed 2 is FOSSILIZED", 5)
    port.acknowledge("low", "applied", "", 5)
    with pytest.raises(AssertionError):
        port.acknowledge("low", "applied", "", 5)
    operator.publish(Germinate(id="high", site="fc", seed=2))
    assert port.commands(6) == []
    found = messages(acks, Acknowledgement)
    for id, end in {"late": "expired", "low": "applied", "high": "refused", "stop": "applied"}.items():
        assert [ack.status for ack in found if ack.command_id == id] == ["delivered", end]
    assert port.counts()["commands_repeated"] == 2


def test_an_emergency_stop_overtakes_what_the_controller_has_not_finished_deciding(bus):
    port = BusPort(bus, "run", COLUMNS)
    controller = bus.producer("commands", "run", "controller")
    controller.publish(Germinate(id="g", site="fc", seed=0))
    controller.publish(EmergencyStop(id="stop"))
    assert [command.id for command in port.commands(1)] == ["stop"]
    controller.publish(Decided(id="d", tick=1))
    assert [command.id for command in port.commands(2)] == ["g"]


def test_a_command_that_waits_long_for_its_tick_is_neither_handed_out_again_nor_buried(server, tmp_path):
    settings = RedisConfig(timeout_s=0.5, claim_s=0.1, deliveries=3)
    served = ServerBus(settings, server.address, tmp_path / "bus")
    port = BusPort(served, "patient", COLUMNS)
    acks = served.consumer("acks", "patient", "test", "one")
    port.started(0, 9, [])
    operator = served.producer("commands", "patient", "operator")
    operator.publish(Germinate(id="g", site="fc", seed=0))
    assert operator.flush(60)
    time.sleep(1.0)
    assert [command.id for command in port.commands(1)] == ["g"]
    time.sleep(0.5)
    port.acknowledge("g", "applied", "", 1)
    port.barrier()
    assert [ack.status for ack in messages(acks, Acknowledgement)] == ["delivered", "applied"]
    assert port.counts()["commands_repeated"] == port.counts()["dead_letters"] == 0
    assert served.dead_letters("patient") == []
    port.close()
    served.close()


@pytest.mark.parametrize("kind", ["memory", "server"])
def test_telemetry_comes_in_tick_order_without_a_hole(bus, served, kind):
    used = bus if kind == "memory" else served
    consumer = used.consumer("telemetry", f"rows-{kind}", "tracker", "one")
    port = BusPort(used, f"rows-{kind}", COLUMNS)
    port.started(0, 100, [])
    for tick in range(100):
        for site in ("fc1", "fc2"):
            port.telemetry(tick, site, rows(tick))
        port.end_tick(tick)
    port.ended(99, "FINISHED", {})
    port.close()
    found = messages(consumer, Telemetry)
    for site in ("fc1", "fc2"):
        own = [message for message in found if message.site == site]
        assert [tick for message in own for tick in message.ticks] == list(range(100))
        values = np.concatenate([unpack(message) for message in own])
        assert (values == np.arange(100, dtype=np.float32)[:, None, None]).all()


def test_what_happens_to_the_bus_is_said_as_an_alert(bus):
    consumer = bus.consumer("events", "run", "tracker", "one")
    port = BusPort(bus, "run", COLUMNS)
    port.started(0, 1, [])
    bus.incidents.append(("bus_down", "the bus server does not answer"))
    port.end_tick(3)
    (alert,) = messages(consumer, Alert)
    assert (alert.tick, alert.level, alert.code) == (3, "warning", "bus_down")


def test_everything_the_trainer_can_say_arrives(bus):
    consumer = bus.consumer("events", "run", "tracker", "one")
    port = BusPort(bus, "run", COLUMNS)
    port.started(3, 10, [{"name": "fc"}])
    grown = {"generation": 1, "blueprint": "mlp", "strategy": "linear"}
    port.emit(Transition(tick=4, site="fc", seed=1, branch=0, source=0, target=1, cause="command", **grown))
    port.emit(GateResult(tick=5, site="fc", seed=1, branch=0, gate="gain", value=float("nan"), threshold=0.1, passed=False, look=1))
    port.emit(Alert(tick=6, level="error", code="nan", text="loss is not finite", site="fc", seed=1))
    port.emit(Metrics(tick=7, values={"train/loss": 0.5}))
    port.emit(Checkpoint(tick=8, path="checkpoints/8", digest="ab"))
    port.emit(Report(tick=8, command_id="q", stages={"DORMANT": 3}, branches=[]))
    port.end_tick(9)
    port.ended(9, "FINISHED", {"germinated": 1})
    names = [type(message).__name__ for message in messages(consumer, object)]
    assert names == [*("RunStarted", "Transition", "GateResult", "Alert", "Metrics", "Checkpoint", "Report", "TickEnded", "RunEnded")]


def test_a_tick_with_nothing_due_says_one_thing_and_does_the_same_few_things_however_long_the_run(bus):
    """What it costs in seconds is for `scripts/bench calls`."""
    runner = Germinator(bus, "run")
    runner.step = lambda tick: [consumer.ack(consumer.read(1000)) for consumer in runner.consumers]
    port = BusPort(bus, "run", COLUMNS, runner=runner)
    port.started(0, 1000, [])

    def calls(tick):
        made = []
        sys.setprofile(lambda frame, event, argument: made.append(event) if event.endswith("call") else None)
        try:
            port.commands(tick)
            port.end_tick(tick)
        finally:
            sys.setprofile(None)
        return len(made)

    for tick in range(100):
        calls(tick)
    sent = bus.counts()["sent"]
    early = [calls(tick) for tick in range(100, 110)]
    assert bus.counts()["sent"] == sent + 10
    for tick in range(110, 900):
        port.commands(tick)
        port.end_tick(tick)
    late = [calls(tick) for tick in range(900, 910)]
    assert max(late) <= max(early) < 300


def test_nothing_that_is_sent_as_a_command_stops_the_trainer(served):
    port = BusPort(served, "hostile", COLUMNS)
    acks = served.consumer("acks", "hostile", "test", "one")
    port.started(0, 9, [])
    stranger = served.producer("commands", "hostile", "stranger")
    stranger.publish(TickEnded(tick=1))
    stranger.publish(Germinate(id="g", site="fc", seed=0))
    served.client.sadd("esper:{hostile}:commands", "broken", "poison")
    served.client.xadd("esper:{hostile}:commands:poison", {"m": b"\x00" * 99})
    assert stranger.flush(60)
    came, deadline = [], time.monotonic() + 60
    while not came and time.monotonic() < deadline:
        came += port.commands(1)
        port.end_tick(1)
    assert [command.id for command in came] == ["g"]
    port.acknowledge("g", "applied", "", 1)
    served.client.set("esper:{hostile}:commands:no-stream", "a string")
    served.client.sadd("esper:{hostile}:commands", "no-stream")
    served.client.delete("esper:{hostile}:commands:poison")
    served.client.set("esper:{hostile}:commands:poison", "a string now")
    time.sleep(0.5)
    stranger.publish(Germinate(id="again", site="fc", seed=0))
    assert stranger.flush(60)
    deadline = time.monotonic() + 60
    while not (came := port.commands(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [command.id for command in came] == ["again"]
    port.acknowledge("again", "applied", "", 2)
    assert served.counts()["refused"] >= 3
    assert messages(acks, Acknowledgement)[-1].status == "applied"
    port.close()
