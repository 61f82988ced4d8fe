"""The trainer's side with a controller outside: whom it waits for and how long, and whose decisions count."""

from __future__ import annotations

import threading
import time

import pytest
from deciding import COLUMNS, Germinator, messages, rows

from esper.bus.trainer.bus_port import BusPort, ControllerSilent
from esper.messages import Acknowledgement, Alert, Decided, Germinate, TickEnded


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
    assert twin.flush(60)
    operator.publish(Germinate(id="last", site="fc", seed=5))
    assert operator.flush(60)
    came, deadline = [], time.monotonic() + 60
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
    go_on = threading.Event()  # the controller decides on nothing before the trainer has ended all its ticks
    runner = Germinator(used, f"free-{kind}", go_on=go_on)
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
    for tick in range(20):
        port.end_tick(tick)
    assert runner.decided == 0
    go_on.set()
    came, deadline = [], time.monotonic() + 60
    while len(came) < 20 and time.monotonic() < deadline:
        came += port.commands(20)
        time.sleep(0.01)
    port.ended(20, "FINISHED", {})
    port.close()
    assert [command.seed for command in came] == list(range(20))
