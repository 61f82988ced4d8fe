"""What a process left on disk for a server: whose it is, who may send it, and that it is sent once."""

from __future__ import annotations

import json
import logging

import pytest
from faults import wait_until

from esper.bus import open_bus as opened_as
from esper.bus.config import EmbeddedConfig, RedisConfig
from esper.bus.discovery import invite
from esper.bus.programs import inspect
from esper.bus.programs.flush import leftovers, missing, send
from esper.bus.server.bus import ServerBus
from esper.bus.server.embedded import address_in
from esper.errors import UserError
from esper.messages import Alert, TickEnded

RUN = "a.run.events/of mine"


def say(producer, first, last):
    for number in range(first, last):
        producer.publish(TickEnded(tick=number))


@pytest.fixture
def left(fragile, open_bus):
    """40 messages published, 10 of them stored; the process is gone, and the server is back."""
    bus = open_bus(fragile.address)
    producer = bus.producer("events", RUN, "main.one")
    say(producer, 0, 10)
    assert producer.flush(60)
    fragile.kill()
    say(producer, 10, 40)
    assert wait_until(lambda: bus.sender.open, 60)
    bus.close()
    fragile.start()
    return bus.folder / "spool"


def test_messages_say_themselves_whose_they_are_and_are_sent_once(left, fragile, open_bus):
    (found,) = leftovers(left)
    assert (found.stream, found.run, found.producer) == ("events", RUN, "main.one")
    bus = open_bus(fragile.address)
    assert missing(bus, found) == 30
    assert send(bus, found, 60) == 0
    assert [id.decode() for id, _ in bus.client.xrange(f"esper:{{{RUN}}}:events:main.one")] == [f"1-{n}" for n in range(1, 41)]
    bus.close()
    assert leftovers(left) == []


def test_the_next_start_sends_them_before_its_own(left, fragile, open_bus):
    bus = open_bus(fragile.address)
    producer = bus.producer("events", RUN, "main.one")
    say(producer, 40, 42)
    assert producer.flush(60)
    ids = [id.decode() for id, _ in bus.client.xrange(f"esper:{{{RUN}}}:events:main.one")]
    assert ids == [*(f"1-{n}" for n in range(1, 41)), "2-1", "2-2"]


def test_nobody_sends_what_a_process_at_work_will_send_itself(left, fragile, open_bus):
    trainer = open_bus(fragile.address)
    trainer.producer("events", RUN, "main.one")
    other = open_bus(fragile.address)
    with pytest.raises(UserError, match="belong to a process that is at work"):
        other.producer("events", RUN, "main.one", alone=True)
    trainer.close()
    other.producer("events", RUN, "main.one", alone=True)
    with pytest.raises(UserError, match="`esper bus flush` is sending the messages"):
        open_bus(fragile.address).producer("events", RUN, "main.one")


def test_a_server_that_takes_nothing_is_given_up_on_and_nothing_is_lost(left, fragile, open_bus):
    (found,) = leftovers(left)
    bus = open_bus(fragile.address)
    key = f"esper:{{{RUN}}}:events:main.one"
    bus.client.rename(key, "aside")
    bus.client.set(key, "no stream")
    assert send(bus, found, 0.3) >= 30
    bus.close()
    bus = open_bus(fragile.address)
    bus.client.config_set("maxmemory", "1")
    (found,) = leftovers(left)
    with pytest.raises(UserError, match=r"the bus at .* refuses what esper asks of it: .*maxmemory"):
        send(bus, found, 60)
    bus.client.config_set("maxmemory", "0")
    bus.close()
    bus = open_bus(fragile.address)
    bus.client.rename("aside", key)
    assert (missing(bus, found), send(bus, found, 60)) == (30, 0)


def test_the_end_says_what_is_left_and_what_was_dropped(fragile, open_bus, caplog):
    bus = open_bus(fragile.address, spool_mb=0)
    producer = bus.producer("events", "run")
    fragile.freeze()
    producer.publish(Alert(tick=1, level="info", code="x", text="y"))
    assert wait_until(lambda: bus.sender.open, 60)
    with caplog.at_level(logging.WARNING, "esper.bus"):
        bus.close()
    said = [record.getMessage() for record in caplog.records]
    assert any("1 messages did not reach" in text and f"esper bus flush {bus.folder.parent}" in text for text in said)
    caplog.clear()
    fragile.thaw()
    quiet = open_bus(fragile.address)
    quiet.close()
    assert caplog.records == []


@pytest.mark.usefixtures("processes")
def test_a_server_that_ended_with_its_run_is_started_for_what_it_did_not_get(tmp_path, capsys):
    settings = EmbeddedConfig(timeout_s=0.3, retry_s=0.1)
    bus = opened_as(settings, tmp_path)
    invite(tmp_path, "run", bus.config, {})
    producer = bus.producer("events", "run")
    bus.server.process.kill()
    bus.server.process.wait()
    say(producer, 0, 5)
    assert wait_until(lambda: bus.sender.open, 60)
    producer.barrier(0)
    with pytest.raises(UserError, match="belong to a process that is at work"):
        inspect.main(["flush", str(tmp_path)])
    bus.close()
    assert inspect.main(["flush", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sent": 5, "waiting": 0}
    with pytest.raises(UserError, match="ended with it"):
        inspect.main(["status", str(tmp_path)])
    again = opened_as(settings, tmp_path)
    assert again.client.xlen("esper:{run}:events:main") == 5
    assert ServerBus(RedisConfig(), address_in(tmp_path / "bus" / "server"), tmp_path / "x").runs() == ["run"]
    again.close()


def test_a_folder_of_no_run_and_a_patience_of_nothing_are_sentences(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run that others can join"):
        inspect.main(["flush", str(tmp_path)])
    for given in ("0", "nan"):
        with pytest.raises(UserError, match="--patience"):
            inspect.main(["flush", str(tmp_path), "--patience", given])
