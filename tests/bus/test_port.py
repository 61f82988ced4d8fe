"""The trainer's side: what a tick leads to comes at the next, every command ends once, and nobody waits in vain."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from esper.bus import open_bus
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.messages import (
    Acknowledgement,
    Alert,
    Decided,
    EmergencyStop,
    Germinate,
    RunEnded,
    Telemetry,
    TickEnded,
)
from esper.bus.port import BusPort, ControllerSilent
from esper.bus.server.bus import ServerBus
from esper.bus.telemetry import unpack

COLUMNS = ("a", "b", "c")


@pytest.fixture
def bus(tmp_path):
    opened = open_bus(MemoryConfig(), tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def served(server, tmp_path):
    opened = ServerBus(RedisConfig(timeout_s=0.5), server.address, tmp_path / "bus")
    yield opened
    opened.close()


class Germinator:
    """Decides to germinate seed ``tick`` at every tick, having counted the rows it was told."""

    def __init__(self, bus, run, wait_s=0.0):
        self.consumers = [bus.consumer(stream, run, "controller", "one") for stream in ("events", "telemetry")]
        self.producer = bus.producer("commands", run, "controller")
        self.rows = self.decided = 0
        self.wait_s = wait_s

    def step(self, tick):
        for consumer in self.consumers:
            found = consumer.read(1000)
            self.rows += sum(len(d.message.ticks) for d in found if isinstance(d.message, Telemetry))
            consumer.ack(found)
        self.producer.publish(Germinate(id=f"g{tick}", site="fc", seed=tick))
        self.producer.publish(Decided(id=f"d{tick}", tick=tick))

    def serve(self):
        while True:
            for delivery in self.consumers[0].read(100, 0.5):
                self.consumers[0].ack([delivery])
                if isinstance(delivery.message, TickEnded):
                    time.sleep(self.wait_s)
                    tick = delivery.message.tick
                    self.producer.publish(Germinate(id=f"g{tick}", site="fc", seed=tick))
                    self.producer.publish(Decided(id=f"d{tick}", tick=tick, epoch=delivery.message.epoch))
                    self.decided += 1
                if isinstance(delivery.message, RunEnded):
                    return


def rows(tick):
    return torch.full((4, 3), float(tick))


def messages(consumer, kind):
    found = []
    while got := consumer.read(1000, 0.05):
        consumer.ack(got)
        found += [delivery.message for delivery in got if isinstance(delivery.message, kind)]
    return found


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
    assert operator.flush(5)
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


def test_what_was_decided_for_an_earlier_start_of_the_trainer_is_not_applied(served):
    port = BusPort(served, "stale", COLUMNS, external=True)
    controller = served.producer("commands", "stale", "controller")
    port.started(0, 9, [])
    controller.publish(Germinate(id="old", site="fc", seed=0))
    controller.publish(Decided(id="d1", tick=5, epoch=77))
    controller.publish(Germinate(id="nobodys", site="fc", seed=0))
    controller.publish(Decided(id="d", tick=5))
    controller.publish(Germinate(id="new", site="fc", seed=0))
    controller.publish(Decided(id="d2", tick=0, epoch=1))
    port.end_tick(0)
    assert [command.id for command in port.commands(1)] == ["new"]
    port.close()


def test_a_second_controller_beside_a_run_that_has_its_own_changes_nothing_and_is_told(served):
    runner = Germinator(served.local, "twice")
    heard, events = (served.local.consumer(stream, "twice", "test", "one") for stream in ("acks", "events"))
    acks = served.consumer("acks", "twice", "test", "one")
    port = BusPort(served, "twice", COLUMNS, runner=runner)
    port.started(0, 20, [])
    port.end_tick(0)
    twin = served.producer("commands", "twice", "controller")
    operator = served.producer("commands", "twice", "operator")
    for id in ("g0", "other"):
        twin.publish(Germinate(id=id, site="fc", seed=77))
    twin.publish(Decided(id="d0", tick=0))
    assert twin.flush(5)
    operator.publish(Germinate(id="last", site="fc", seed=5))
    assert operator.flush(5)
    came, deadline = [], time.monotonic() + 5
    while (len(came) < 2 or port.counts()["refused"] < 3) and time.monotonic() < deadline:
        came += port.commands(1)
    assert sorted((command.id, command.seed) for command in came) == [("g0", 0), ("last", 5)]
    port.acknowledge("g0", "applied", "", 1)
    port.acknowledge("last", "applied", "", 1)
    port.end_tick(1)
    port.barrier()
    ends = [(ack.command_id, ack.status) for ack in messages(heard, Acknowledgement) if ack.status != "delivered"]
    assert ends == [("g0", "applied"), ("last", "applied")]
    (refused,) = [ack for ack in messages(acks, Acknowledgement) if ack.command_id == "other"]
    assert refused.status == "refused"
    assert "controller.process=external" in refused.reason
    assert port.counts()["refused"] == 3
    assert port.counts()["commands_repeated"] == 0
    alerts = [message.text for message in messages(events, Alert)]
    assert alerts == [refused.reason] * 3
    port.close()


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


@pytest.mark.parametrize(("timing", "total"), [("free", 300), ("lockstep", 60)])
def test_a_reader_who_sees_the_end_of_a_tick_finds_its_telemetry(served, timing, total):
    """Else an external controller would decide without what it should have heard."""
    run = f"causal-{timing}"
    events = served.consumer("events", run, "controller", "one")
    telemetry = served.consumer("telemetry", run, "controller", "one")
    commands = served.producer("commands", run, "controller")
    port = BusPort(served, run, COLUMNS, timing=timing, external=True)
    port.started(0, total, [])

    def train():
        for tick in range(total):
            port.telemetry(tick, "fc", rows(tick))
            port.end_tick(tick)

    trainer = threading.Thread(target=train)
    trainer.start()
    seen, ended = -1, -1
    while ended < total - 1:
        for delivery in events.read(100, 1.0):
            if isinstance(delivery.message, TickEnded):
                ended = delivery.message.tick
                while found := telemetry.read(1000):
                    seen = found[-1].message.ticks[-1]
                    telemetry.ack(found)
                assert seen >= ended
                commands.publish(Decided(id=f"d{ended}", tick=ended, epoch=delivery.message.epoch))
            events.ack([delivery])
    trainer.join()
    port.close()


def test_an_external_controller_is_waited_for_at_every_tick_in_lockstep(served):
    runner = Germinator(served, "waited", wait_s=0.005)
    port = BusPort(served, "waited", COLUMNS, external=True, deadline_s=5)
    port.started(0, 20, [])
    thread = threading.Thread(target=runner.serve)
    thread.start()
    for tick in range(20):
        commands = port.commands(tick)
        assert [command.seed for command in commands] == ([tick - 1] if tick else [])
        for command in commands:
            port.acknowledge(command.id, "applied", "", tick)
        port.end_tick(tick)
    port.ended(20, "FINISHED", {})
    thread.join(5)
    port.close()
    assert runner.decided == 20


def test_a_controller_that_stays_silent_stops_the_run_with_a_sentence(served):
    port = BusPort(served, "silent", COLUMNS, external=True, deadline_s=0.2)
    port.started(0, 20, [])
    with pytest.raises(ControllerSilent, match=r"did not decide on tick 0 within 0\.2 s.*esper control"):
        port.end_tick(0)
    port.close()


@pytest.mark.parametrize("kind", ["inside", "outside"])
def test_in_free_timing_nobody_is_waited_for(bus, served, kind):
    used = bus if kind == "inside" else served
    runner = Germinator(used, f"free-{kind}", wait_s=0.05)
    port = BusPort(
        used,
        f"free-{kind}",
        COLUMNS,
        runner=runner if kind == "inside" else None,
        timing="free",
        external=kind == "outside",
    )
    port.started(0, 20, [])
    if kind == "outside":
        threading.Thread(target=runner.serve, daemon=True).start()
    began = time.monotonic()
    for tick in range(20):
        port.end_tick(tick)
    assert time.monotonic() - began < 0.05 * 10
    came, deadline = [], time.monotonic() + 10
    while len(came) < 20 and time.monotonic() < deadline:
        came += port.commands(20)
        time.sleep(0.01)
    port.ended(20, "FINISHED", {})
    port.close()
    assert [command.seed for command in came] == list(range(20))


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
    port.transition(4, "fc", 1, 0, 0, 1, "command", 1, "mlp", "linear")
    port.gate(5, "fc", 1, 0, "gain", float("nan"), 0.1, False, 1)
    port.alert(6, "error", "nan", "loss is not finite", "fc", 1)
    port.metrics(7, {"train/loss": 0.5})
    port.checkpoint(8, "checkpoints/8", "ab")
    port.report(8, "q", {"DORMANT": 3}, [])
    port.end_tick(9)
    port.ended(9, "FINISHED", {"germinated": 1})
    names = [type(message).__name__ for message in messages(consumer, object)]
    assert names == [
        *("RunStarted", "Transition", "GateResult", "Alert", "Metrics", "Checkpoint", "Report", "TickEnded", "RunEnded")
    ]


def test_a_tick_with_nothing_due_costs_little(bus):
    runner = Germinator(bus, "run")
    runner.step = lambda tick: [consumer.ack(consumer.read(1000)) for consumer in runner.consumers]
    port = BusPort(bus, "run", COLUMNS, runner=runner)
    port.started(0, 1000, [])
    took = []
    for tick in range(1000):
        began = time.perf_counter()
        port.commands(tick)
        port.end_tick(tick)
        took.append(time.perf_counter() - began)
    assert np.median(took) < 100e-6


def test_nothing_that_is_sent_as_a_command_stops_the_trainer(served):
    port = BusPort(served, "hostile", COLUMNS)
    acks = served.consumer("acks", "hostile", "test", "one")
    port.started(0, 9, [])
    stranger = served.producer("commands", "hostile", "stranger")
    stranger.publish(TickEnded(tick=1))
    stranger.publish(Germinate(id="g", site="fc", seed=0))
    served.client.sadd("esper:{hostile}:commands", "broken", "poison")
    served.client.xadd("esper:{hostile}:commands:poison", {"m": b"\x00" * 99})
    assert stranger.flush(5)
    came, deadline = [], time.monotonic() + 5
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
    assert stranger.flush(5)
    deadline = time.monotonic() + 5
    while not (came := port.commands(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [command.id for command in came] == ["again"]
    port.acknowledge("again", "applied", "", 2)
    assert served.counts()["refused"] >= 3
    assert messages(acks, Acknowledgement)[-1].status == "applied"
    port.close()
