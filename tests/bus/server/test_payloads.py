"""What goes to the server by itself, as plain commands or by claim check, is kept like everything else; and old writers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import redis
from faults import wait_until

from esper.bus.codec import Envelope, encode
from esper.bus.programs.tracker import fresh_group
from esper.bus.protocol import Fenced
from esper.bus.server.payloads import keep_all
from esper.errors import UserError
from esper.messages import ClaimCheck, Metrics, Telemetry, TickEnded


def large(number):
    """A message that goes to the server by itself, as plain commands."""
    return Telemetry(site="a", ticks=[number], seeds=1000, columns=["x"] * 25, data=np.full(25_000, number, "<f4").tobytes())


def many(tick):
    """A message that goes by claim check."""
    return Metrics(tick=tick, values={f"metric/{number}": float(number) for number in range(100_000)})


def stored(bus):
    """Names of the stored payloads."""
    folder = bus.folder / "payloads"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def say(bus, *ticks):
    """Publish so many large messages."""
    producer = bus.producer("events", "run")
    for tick in ticks:
        producer.publish(many(tick))
    assert producer.flush(60)


def refused_often(bus, consumer):
    """Have one message become a dead letter, as a consumer does that fails whenever it is given it."""
    assert wait_until(lambda: not consumer.read(10, 0.05) and bool(bus.dead_letters("run")))


def drain(consumer, wanted, seconds=60.0):
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
        assert producer.flush(60)
    assert bus.counts()["retries"] >= 5
    assert bus.counts()["dropped"] == 0
    reader = open_bus(fragile.address)
    assert drain(reader.consumer("telemetry", "run", "group", "one"), 40) == list(range(40))
    assert reader.client.xlen("esper:{run}:telemetry:main") == 40


def test_a_large_message_whose_note_was_lost_before_it_was_read_and_trimmed_is_not_sent_again(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    producer.publish(large(0))
    assert producer.flush(60)
    assert drain(consumer, 1) == [0]
    key, last = "esper:{run}:telemetry:main", "esper:{run}:last:telemetry:main"
    bus.client.delete(last)  # as when the connection broke between the two
    bus.client.xtrim(key, maxlen=0)
    for number in (1, 2):
        producer.publish(large(number))
        assert producer.flush(60)
    assert drain(consumer, 2) == [1, 2]
    assert consumer.read(1, 0.1) == []
    assert bus.client.get(last) == b"1-3"
    assert bus.counts()["dropped"] == bus.counts()["gaps"] == 0


def test_a_server_that_lost_large_messages_is_given_them_again_before_the_next(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    for number in range(20):
        producer.publish(large(number))
    assert producer.flush(60)
    first = drain(consumer, 8)
    fragile.restart(cut_bytes=1_000_000)
    for number in range(20, 24):
        producer.publish(large(number))
    assert producer.flush(60)
    assert first + drain(consumer, 24 - len(first)) == list(range(24))
    assert bus.counts()["gaps"] == bus.counts()["dropped"] == 0


def test_large_messages_are_added_without_a_script_and_so_keep_others_waiting_less(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("telemetry", "run")
    bus.client.config_resetstat()
    for number in range(10):
        producer.publish(large(number))
    assert producer.flush(60)
    calls = {name: found["calls"] for name, found in bus.client.info("commandstats").items()}
    assert calls["cmdstat_exec"] == calls["cmdstat_xadd"] == 10


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_a_zombie_that_slept_through_its_replacement_is_fenced(fragile, proxy, open_bus, say):
    zombie = open_bus(proxy.address, codec="raw")
    old = zombie.producer("events", "run")
    old.publish(say(0))
    assert old.flush(60)
    new = open_bus(fragile.address, folder="other", codec="raw").producer("events", "run")
    for number in range(1, 5):
        old.publish(say(100 + number))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in zombie.incidents))
    new.publish(say(1))
    assert new.flush(60)
    consumer = open_bus(fragile.address, folder="reader").consumer("events", "run", "group", "one")
    found = consumer.read(10, 1) + consumer.read(10, 0.5)
    assert [delivery.message for delivery in found] == [say(0), say(1)]


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_another_process_that_writes_under_a_producers_ids_is_noticed(fragile, open_bus, say):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("events", "run")
    producer.publish(say(0))
    assert producer.flush(60)
    twin = encode(Envelope("run", "main", 1, 2, 1.0, (), say(7)))
    bus.client.xadd("esper:{run}:events:main", {"m": twin}, id="1-2")
    producer.publish(say(1))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in bus.incidents), 60)
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
    producer.publish(many(1))
    assert producer.flush(60)
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
    producer.publish(many(1))
    assert producer.flush(60)
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
    said = many(1)
    producer.publish(said)
    assert producer.flush(60)
    for _ in range(3):  # every start reads all again
        controller.ack(controller.read(1, 2))
        reader = bus.consumer("events", "run", fresh_group(bus, "run", ["events"]), "tracker")
        (delivery,) = reader.read(1, 2)
        assert delivery.message == said
        reader.ack([delivery])


def test_what_was_kept_for_a_tracker_goes_when_all_have_read_the_finished_run_and_the_rest_as_it_is_read(fragile, open_bus):
    bus = open_bus(fragile.address)
    tracker, controller = (bus.consumer("events", "run", group, "one") for group in ("tracker-1", "controller"))
    keep_all(bus.folder / "payloads")
    say(bus, 1, 2)
    tracker.ack(tracker.read(2, 2))
    held = controller.read(2, 2)
    controller.ack(held[:1])
    assert len(stored(bus)) == 2 + 1
    bus.payloads("run").release()
    assert len(stored(bus)) == 1
    controller.ack(held[1:])
    assert stored(bus) == []
    with pytest.raises(UserError, match=r"large messages of run run were removed.*tracking\.process=internal"):
        fresh_group(bus, "run", ["events"])


def test_what_a_server_that_is_gone_cannot_say_stays_kept(fragile, open_bus):
    bus = open_bus(fragile.address)
    tracker = bus.consumer("events", "run", "tracker-1", "one")
    keep_all(bus.folder / "payloads")
    say(bus, 1)
    tracker.ack(tracker.read(2, 2))
    fragile.kill()
    with pytest.raises(redis.ConnectionError):
        bus.payloads("run").release()
    assert len(stored(bus)) == 2
    fragile.start()

    def released() -> bool:
        bus.payloads("run").release()
        return stored(bus) == []

    assert wait_until(released), "the server may have to be asked again, since connections to the earlier one are broken"


def test_a_payload_whose_acknowledgement_was_sent_late_goes_too(fragile, open_bus):
    bus = open_bus(fragile.address)
    consumer = bus.consumer("events", "run", "group", "one")
    say(bus, 1)
    (delivery,) = consumer.read(1, 2)
    fragile.kill()
    consumer.ack([delivery])
    assert len(stored(bus)) == 1
    fragile.start()
    assert wait_until(lambda: consumer.read(1, 0.05) == stored(bus))


def test_a_dead_letter_keeps_its_payload_until_it_is_purged(fragile, open_bus):
    bus = open_bus(fragile.address, deliveries=1, claim_s=0.05)
    failing, other = (bus.consumer("events", "run", group, "one") for group in ("failing", "other"))
    say(bus, 1)
    refused_often(bus, failing)
    other.ack(other.read(1, 2))
    assert len(stored(bus)) == 1
    (letter,) = bus.dead_letters("run")
    assert letter.message == many(1)
    assert bus.purge("run", [letter.id]) == 1
    assert stored(bus) == []


def test_a_purged_letter_keeps_the_payload_for_groups_that_have_not_read_it(fragile, open_bus):
    bus = open_bus(fragile.address, deliveries=1, claim_s=0.05)
    failing, slow = (bus.consumer("events", "run", group, "one") for group in ("failing", "slow"))
    say(bus, 1)
    refused_often(bus, failing)
    bus.client.xgroup_create("esper:{run}:events:main", "slow", id="0")  # it is there, and reads later
    assert bus.purge("run", [bus.dead_letters("run")[0].id]) == 1
    assert len(stored(bus)) == 1
    slow.ack(slow.read(1, 2))
    assert stored(bus) == []


def test_a_replayed_letter_does_not_take_the_payload_from_others_and_takes_it_along_at_the_end(fragile, open_bus):
    bus = open_bus(fragile.address, deliveries=1, claim_s=0.05)
    failing, other = (bus.consumer("events", "run", group, "one") for group in ("failing", "other"))
    say(bus, 1)
    refused_often(bus, failing)
    assert bus.replay("run", [bus.dead_letters("run")[0].id]) == 1
    other.ack(other.read(1, 2))
    assert len(stored(bus)) == 1
    (again,) = failing.read(1, 2)
    failing.ack([again])
    assert again.message == many(1)
    assert stored(bus) == []


def test_a_hostile_letter_that_names_anothers_payload_does_not_take_it_along(fragile, open_bus):
    bus = open_bus(fragile.address)
    reader = bus.consumer("events", "run", "group", "one")
    assert reader.read() == []
    say(bus, 1)
    (digest,) = stored(bus)
    hostile = encode(Envelope("run", "poison", 1, 1, 0.0, (), ClaimCheck(digest=digest, size=5)))
    bus.client.sadd("esper:{run}:events", "poison")
    bus.client.xadd("esper:{run}:events:poison", {"m": hostile}, id="1-1")
    found = []
    assert wait_until(lambda: found.extend(reader.read(10, 0.05)) or (found and bus.dead_letters("run")))
    assert bus.purge("run", [letter.id for letter in bus.dead_letters("run")]) == 1
    assert stored(bus) == [digest]


def test_a_group_that_comes_after_a_payload_was_removed_is_told_and_counts_a_gap(fragile, open_bus):
    bus = open_bus(fragile.address)
    first = bus.consumer("events", "run", "first", "one")
    say(bus, 1, 2)
    first.ack(first.read(2, 2))
    assert stored(bus) == []
    late = open_bus(fragile.address)
    consumer = late.consumer("events", "run", "late", "one")
    assert consumer.read(10, 0.3) == []
    assert late.counts()["gaps"] == 2
    assert [code for code, _ in late.incidents] == ["bus_payload_gone"]
    assert "'late' came to the events after" in late.incidents[0][1]
    assert late.dead_letters("run") == []
    consumer.read(1, 0.05)
    assert bus.client.xpending("esper:{run}:events:main", "late")["pending"] == 0


def test_a_payload_that_is_lost_before_anybody_read_it_is_still_a_dead_letter(fragile, open_bus):
    bus = open_bus(fragile.address)
    consumers = [bus.consumer("events", "run", group, "one") for group in ("one", "two")]
    assert [consumer.read() for consumer in consumers] == [[], []]
    say(bus, 1)
    time.sleep(0.25)
    (bus.folder / "payloads" / stored(bus)[0]).unlink()
    assert consumers[0].read(1, 0.5) == []
    assert "is not there" in bus.dead_letters("run")[0].reason


def test_a_message_that_comes_again_after_its_payload_went_is_recognised(fragile, open_bus):
    bus = open_bus(fragile.address)
    consumer = bus.consumer("events", "run", "group", "one")
    say(bus, 1)
    consumer.ack(consumer.read(1, 2))
    assert stored(bus) == []
    bus.client.xgroup_setid("esper:{run}:events:main", "group", "0")
    assert consumer.read(1, 0.3) == []
    assert bus.dead_letters("run") == []
    assert bus.counts()["duplicates"] == 1
