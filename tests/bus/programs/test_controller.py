"""An external controller follows a trainer that goes back to its checkpoint."""

from __future__ import annotations

import threading

import pytest
from faults import wait_until
from scripted_trainer import COLUMNS, ScriptedTrainer

from esper.bus.config import RedisConfig
from esper.bus.discovery import invite, joined
from esper.bus.programs.controller import ExternalRunner
from esper.bus.server.bus import ServerBus
from esper.bus.trainer.bus_port import BusPort, ControllerSilent
from esper.errors import UserError
from esper.messages import Checkpoint, Germinate, RunStarted, Telemetry, TickEnded


class Counting:
    """Remembers how many ticks it has decided on and says so in its commands."""

    def __init__(self):
        self.count = 0
        self.heard = []

    def observe(self, message):
        self.heard.append(type(message).__name__)

    def decide(self, tick):
        self.count += 1
        return [Germinate(id=f"{tick}-{self.count}", site="fc1", seed=self.count % 6)]

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


@pytest.fixture
def open_bus(server, tmp_path):
    opened = []

    def open_one(name):
        opened.append(ServerBus(RedisConfig(timeout_s=0.5), server.address, tmp_path / name))
        return opened[-1]

    yield open_one
    for bus in opened:
        bus.close()


def train(bus, run, first, last, state=None, checkpoint=-1):
    """Ticks ``first`` to ``last`` of a run; the port's state at the checkpoint, and what was applied."""
    port = BusPort(bus, run, COLUMNS, external=True, deadline_s=10)
    if state is not None:
        port.load_state(state)
    trainer = ScriptedTrainer(port, 20)
    trainer.tick = first
    port.started(first, 20, [])
    for tick in range(first + 1, last + 1):
        trainer.step()
        if tick == checkpoint:
            state = port.state()
            port.emit(Checkpoint(tick=tick, path="there", digest=""))
            port.barrier()
    return port, trainer.applied, state


def test_a_resumed_trainer_gets_the_decisions_it_would_have_got(open_bus, tmp_path):
    run = "rewound"
    control = ExternalRunner(open_bus("control"), run, Counting(), tmp_path / "memory")
    thread = threading.Thread(target=control.serve, daemon=True)
    thread.start()
    port, before, state = train(open_bus("trainer"), run, 0, 10, checkpoint=6)
    port.close()
    port, after, _ = train(open_bus("trainer"), run, 6, 14, state=state)
    port.ended(14, "FINISHED", {})
    thread.join(10)
    assert not thread.is_alive()
    replayed = [entry for entry in before if entry[0] > 6]
    assert after[: len(replayed)] == replayed
    assert [id for _, id, _ in after] == [f"{tick}-{tick}" for tick in range(6, 14)]
    port.close()
    control.close()


def test_a_trainer_that_goes_back_to_where_the_controller_was_not_is_refused(open_bus, tmp_path):
    run = "elsewhere"
    control = ExternalRunner(open_bus("control"), run, Counting(), tmp_path / "memory")
    failures = []

    def serve():
        try:
            control.serve()
        except UserError as error:
            failures.append(str(error))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    train(open_bus("trainer"), run, 0, 5)[0].close()
    port = BusPort(open_bus("trainer"), run, COLUMNS, external=True, deadline_s=1)
    port.started(3, 20, [])
    thread.join(10)
    assert "kept nothing at that tick" in failures[0]
    port.close()
    control.close()


def test_a_controller_killed_often_before_it_could_decide_still_knows_the_run(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_BUS_PASSWORD", server.address.password)
    config = RedisConfig(url=f"redis://127.0.0.1:{server.address.tcp_port}/0", timeout_s=0.5, deliveries=1)
    trainer = ServerBus(config, server.address, tmp_path / "trainer")
    invite(tmp_path, "often", config, {"config": {"controller": {"process": "external"}}})
    producer = trainer.producer("events", "often")
    producer.publish(RunStarted(tick=0, total_ticks=20, sites=[]))
    assert producer.flush(5)
    for _ in range(4):  # nothing is acknowledged before the first tick has ended
        with joined(tmp_path, "controller") as (bus, found):
            controller = Counting()
            ExternalRunner(bus, found.run, controller, tmp_path / "memory").serve(idle_s=0.5)
        assert controller.heard == ["RunStarted"]
    assert trainer.dead_letters("often") == []
    trainer.close()


class Watching(Counting):
    """Remembers what it had heard when it decided on a tick."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def decide(self, tick):
        self.known[tick] = self.heard.count("Telemetry")
        return []


def test_a_connection_that_breaks_while_a_tick_is_read_hides_none_of_its_telemetry(fragile, proxy, tmp_path):
    config, watching = RedisConfig(timeout_s=0.5), Watching()
    near, far = ServerBus(config, fragile.address, tmp_path / "near"), ServerBus(config, proxy.address, tmp_path / "far")
    events, telemetry = near.producer("events", "run"), near.producer("telemetry", "run")
    control = ExternalRunner(far, "run", watching, tmp_path / "memory")
    threading.Thread(target=control.serve, daemon=True).start()
    for tick in range(1, 25):
        telemetry.publish(Telemetry(site="a", ticks=[tick], seeds=1, columns=["x"], data=bytes(4)))
        assert telemetry.flush(5)
        proxy.reset_after_request(1, spare=tick % 6)
        events.publish(TickEnded(tick=tick))
        assert wait_until(lambda tick=tick: tick in watching.known)
        proxy.calm()
    assert watching.known == {tick: tick for tick in range(1, 25)}
    near.close()
    far.close()


def test_a_trainer_that_stopped_without_a_decision_gets_it_when_it_is_resumed(open_bus, tmp_path):
    run = "silent"
    port = BusPort(open_bus("trainer"), run, COLUMNS, external=True, deadline_s=0.2)
    trainer = ScriptedTrainer(port, 20)
    trainer.start()
    with pytest.raises(ControllerSilent):
        trainer.step()
    port.emit(Checkpoint(tick=1, path="", digest=""))
    state = port.state()
    port.barrier()
    port.ended(1, "KILLED", {})
    port.close()
    port = BusPort(open_bus("trainer"), run, COLUMNS, external=True, deadline_s=0.2)
    port.load_state(state)
    with pytest.raises(ControllerSilent, match="tick 1 "):
        port.started(1, 20, [])
    port.close()
    control = ExternalRunner(open_bus("control"), run, Counting(), tmp_path / "memory")
    thread = threading.Thread(target=control.serve, daemon=True)
    thread.start()
    port, applied, _ = train(open_bus("trainer"), run, 1, 5, state=state)
    assert [id for _, id, _ in applied] == [f"{tick}-{tick}" for tick in range(1, 5)]
    port.ended(5, "FINISHED", {})
    thread.join(10)
    assert not thread.is_alive()
    port.close()
    control.close()
