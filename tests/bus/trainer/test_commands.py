"""Every command has an end, also one that comes late or whose effect a kill undoes."""

from __future__ import annotations

import time

import pytest
from faults import wait_until

from esper.bus.trainer.bus_port import BusPort
from esper.messages import Acknowledgement, Checkpoint, Germinate


def acknowledged(bus, run):
    """Status and reason of all acknowledgements."""
    consumer, found = bus.consumer("acks", run, "test", "one"), []
    while got := consumer.read(100, 0.3):
        consumer.ack(got)
        found += [delivery.message for delivery in got if isinstance(delivery.message, Acknowledgement)]
    return [(ack.command_id, ack.status, ack.reason) for ack in found]


def started(bus, hold, state=None):
    """The port of a run that is kept by checkpoints, or is not, and goes on from one."""
    port = BusPort(bus, "run", ("a",))
    port.safe.hold = hold
    if state is not None:
        port.load_state(state)
    port.started(0, 20, [])
    return port


def say(bus, id):
    operator = bus.producer("commands", "run", "operator")
    operator.publish(Germinate(id=id, site="fc", seed=0))
    assert operator.flush(60)


def came(port, tick, seconds=60.0):
    """The ids of what is to be applied."""
    found, deadline = [], time.monotonic() + seconds
    while not found and time.monotonic() < deadline:
        found = [command.id for command in port.commands(tick)]
        time.sleep(0.01)
    return found


def pending(bus):
    return bus.client.xpending("esper:{run}:commands:operator", "trainer")["pending"]


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_command_that_comes_too_late_is_refused_unless_the_run_may_go_on(fragile, open_bus, status):
    bus = open_bus(fragile.address)
    port = started(bus, hold=True)
    say(bus, "late")
    assert wait_until(lambda: port.state()["due"])
    port.ended(20, status, {})
    port.close()
    reason = "the run ended before it could be applied"
    assert acknowledged(bus, "run") == ([("late", "delivered", ""), ("late", "refused", reason)] if status == "FINISHED" else [])
    assert pending(bus) == (status == "KILLED")


def test_what_was_applied_after_the_checkpoint_that_a_killed_run_goes_on_from_is_applied_again(fragile, open_bus):
    bus = open_bus(fragile.address, folder="killed")
    port = started(bus, hold=True)
    for id, tick in (("before", 1), ("after", 2)):
        say(bus, id)
        assert came(port, tick) == [id]
        port.acknowledge(id, "applied", "", tick)
        if id == "before":
            state = port.state()
            port.emit(Checkpoint(tick=tick, path="there", digest=""))
    assert wait_until(lambda: port.end_tick(2) or pending(bus) == 1)
    port.barrier()
    again = open_bus(fragile.address, folder="killed")
    port = started(again, hold=True, state=state)
    assert came(port, 2) == ["after"]
    port.acknowledge("after", "applied", "", 2)
    port.state()  # of a checkpoint that came to nothing
    port.state()
    port.emit(Checkpoint(tick=3, path="there", digest=""))
    assert wait_until(lambda: pending(again) == 0)
    port.close()


def test_a_run_that_keeps_no_checkpoints_lets_the_server_forget_a_command_at_once(fragile, open_bus):
    bus = open_bus(fragile.address)
    port = started(bus, hold=False)
    say(bus, "g")
    assert came(port, 1) == ["g"]
    port.acknowledge("g", "applied", "", 1)
    assert wait_until(lambda: pending(bus) == 0)
    port.close()
