"""What goes to the server by itself, as plain commands or by claim check, is kept like everything else; and old writers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from faults import wait_until

from esper.bus.messages import Metrics, Telemetry, TickEnded
from esper.bus.programs.track import fresh_group
from esper.bus.protocol import Fenced
from esper.bus.server.claim_check import keep_all


def large(number):
    """A message that goes to the server by itself, as plain commands."""
    return Telemetry(site="a", ticks=[number], seeds=1000, columns=["x"] * 25, data=np.full(25_000, number, "<f4").tobytes())


def drain(consumer, wanted, seconds=15.0):
    found, deadline = [], time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        consumer.ack(got)
        found += got
    assert all(delivery.message == large(delivery.message.ticks[0]) for delivery in found)
    return [delivery.message.ticks[0] for delivery in found]


def test_whichever_reply_about_a_large_message_is_lost_it_is_stored_once(fragile, proxy, open_bus):
    bus = open_bus(proxy.address, codec="raw")
    producer = bus.producer("telemetry", "run")
    for number in range(40):
        proxy.reset_after_request(spare=number % 8)
        producer.publish(large(number))
        assert producer.flush(10)
    assert bus.counts()["retries"] >= 5
    assert bus.counts()["dropped"] == 0
    reader = open_bus(fragile.address)
    assert drain(reader.consumer("telemetry", "run", "group", "one"), 40) == list(range(40))
    assert reader.client.xlen("esper:{run}:telemetry:main") == 40


def test_a_large_message_whose_note_was_lost_before_it_was_read_and_trimmed_is_not_sent_again(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    producer.publish(large(0))
    assert producer.flush(5)
    assert drain(consumer, 1) == [0]
    key, last = "esper:{run}:telemetry:main", "esper:{run}:last:telemetry:main"
    bus.client.delete(last)  # as when the connection broke between the two
    bus.client.xtrim(key, maxlen=0)
    for number in (1, 2):
        producer.publish(large(number))
        assert producer.flush(5)
    assert drain(consumer, 2) == [1, 2]
    assert consumer.read(1, 0.1) == []
    assert bus.client.get(last) == b"1-3"
    assert bus.counts()["dropped"] == bus.counts()["gaps"] == 0


def test_a_server_that_lost_large_messages_is_given_them_again_before_the_next(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    for number in range(20):
        producer.publish(large(number))
    assert producer.flush(5)
    first = drain(consumer, 8)
    fragile.restart(cut_bytes=1_000_000)
    for number in range(20, 24):
        producer.publish(large(number))
    assert producer.flush(10)
    assert first + drain(consumer, 24 - len(first)) == list(range(24))
    assert bus.counts()["gaps"] == bus.counts()["dropped"] == 0


def test_large_messages_are_added_without_a_script_and_so_keep_others_waiting_less(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("telemetry", "run")
    bus.client.config_resetstat()
    for number in range(10):
        producer.publish(large(number))
    assert producer.flush(5)
    calls = {name: found["calls"] for name, found in bus.client.info("commandstats").items()}
    assert calls["cmdstat_exec"] == calls["cmdstat_xadd"] == 10


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_a_zombie_that_slept_through_its_replacement_is_fenced(fragile, proxy, open_bus, say):
    zombie = open_bus(proxy.address, codec="raw")
    old = zombie.producer("events", "run")
    old.publish(say(0))
    assert old.flush(5)
    new = open_bus(fragile.address, folder="other", codec="raw").producer("events", "run")
    for number in range(1, 5):
        old.publish(say(100 + number))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in zombie.incidents))
    new.publish(say(1))
    assert new.flush(5)
    consumer = open_bus(fragile.address, folder="reader").consumer("events", "run", "group", "one")
    found = consumer.read(10, 1) + consumer.read(10, 0.5)
    assert [delivery.message for delivery in found] == [say(0), say(1)]


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_an_intruder_who_writes_under_a_producers_ids_is_noticed(fragile, open_bus, say):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("events", "run")
    producer.publish(say(0))
    assert producer.flush(5)
    bus.client.xadd("esper:{run}:events:main", {"m": b"mine"}, id="1-2")
    producer.publish(say(1))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in bus.incidents))
    with pytest.raises(Fenced, match="another process writes to the bus"):
        producer.publish(TickEnded(tick=2))


def test_a_large_message_goes_by_claim_check_and_its_file_goes_when_all_groups_have_it(fragile, open_bus):
    bus = open_bus(fragile.address)
    readers = [bus.consumer("events", "run", group, "one") for group in ("tracker", "controller")]
    for reader in readers:
        assert reader.read(1, 0.0) == []
    producer = bus.producer("events", "run")
    for reader in readers:
        time.sleep(0.21)
        reader.read(1, 0.01)
    producer.publish(Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(100_000)}))
    assert producer.flush(5)
    payloads = bus.folder / "payloads"
    for reader in readers:
        assert len(list(payloads.iterdir())) == 1
        (delivery,) = reader.read(1, 2)
        assert len(delivery.message.values) == 100_000
        reader.ack([delivery])
    assert list(payloads.iterdir()) == []


def test_a_tampered_payload_is_refused(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    producer.publish(Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(100_000)}))
    assert producer.flush(5)
    (path,) = (bus.folder / "payloads").iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert consumer.read(1, 1) == []
    (letter,) = bus.dead_letters("run")
    assert "does not have its hash" in letter.reason


def test_a_tracker_killed_after_it_acknowledged_a_large_message_finds_it_again(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, controller = bus.producer("events", "run"), bus.consumer("events", "run", "controller", "one")
    assert controller.read() == []
    keep_all(bus.folder / "payloads")  # as a run with tracking.process=external does
    said = Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(100_000)})
    producer.publish(said)
    assert producer.flush(5)
    for _ in range(3):  # every start reads all again
        controller.ack(controller.read(1, 2))
        reader = bus.consumer("events", "run", fresh_group(bus, "run", ["events"]), "tracker")
        (delivery,) = reader.read(1, 2)
        assert delivery.message == said
        reader.ack([delivery])
