"""On a shared server anybody may write anything anywhere: no run ends for it, no message gets lost unsaid, no tool dies of it."""

from __future__ import annotations

import contextlib

import pytest
import redis
from deciding import COLUMNS, rows
from faults import wait_until

from esper.bus.codec import Envelope, encode
from esper.bus.discovery import invite
from esper.bus.programs import inspect
from esper.bus.programs.tracker import fresh_group
from esper.bus.protocol import STREAMS
from esper.bus.server import keys
from esper.bus.trainer.bus_port import BusPort
from esper.errors import UserError
from esper.messages import Germinate, TickEnded

RUN = "run"
GARBAGE = b"\xff\xfe\x00 \x1b[2J no text"
HUGE = str((1 << 64) - 1).encode()
STRINGS = (b"", GARBAGE, b"-1-5", b"999-9", b"0-0", HUGE + b"-" + HUGE, b"9" * 500, b"inf", b"nan", b"0x10", b"-3", b'{"sent": "many"}')
KEYS = {
    "runs": keys.RUNS,
    **{f"producers of {stream}": keys.producers(RUN, stream) for stream in STREAMS},
    **{f"entries of {stream}": keys.entries(RUN, stream, "main") for stream in ("telemetry", "events", "acks")},
    "entries of an operator": keys.entries(RUN, "commands", "operator"),
    **{f"epoch of {stream}": keys.epoch(RUN, stream, "main") for stream in ("telemetry", "events")},
    **{f"last of {stream}": keys.last(RUN, stream, "main") for stream in ("telemetry", "events")},
    "dead letters": keys.dead(RUN),
    "replays": keys.replays(RUN, "commands", "trainer"),
    "counts": keys.counts(RUN, "tracker"),
}
TOOLS = (["status"], ["tail"], ["tail", "--stream", "commands"], *(["dead-letters", act] for act in ("list", "replay", "purge")))


def values(client, key):
    """Puts one thing after the other under a key, and says what."""
    for value in STRINGS:
        client.set(key, value)
        yield value
    for name, put in {
        "list": lambda: client.rpush(key, GARBAGE),
        "hash": lambda: client.hset(key, GARBAGE, GARBAGE),
        "set": lambda: client.sadd(key, GARBAGE, "poison", "a\x1b[2Jb", ""),
        "stream": lambda: client.xadd(key, {"m": GARBAGE, GARBAGE: b"x"}, id=HUGE + b"-7"),
        "letters": lambda: client.xadd(key, {"m": b"", "deliveries": GARBAGE, "stream": GARBAGE, "origin": b"x"}),
    }.items():
        client.delete(key)
        put()
        yield name


def look(folder, capsys):
    """Every tool on this run; what they print stays on its line."""
    for words in TOOLS:
        for form in ([], ["--json"]):
            try:
                inspect.main([*words, str(folder), *form])
            except UserError:
                continue
            out = capsys.readouterr().out
            assert "\x1b" not in out


@pytest.mark.parametrize("name", KEYS)
def test_whatever_lies_under_a_key_the_run_goes_on_and_every_tool_answers(name, fragile, open_bus, tmp_path, capsys, monkeypatch):
    bus = open_bus(fragile.address, timeout_s=5.0, flush_s=0.01)
    monkeypatch.setenv("ESPER_BUS_PASSWORD", fragile.note.password)
    bus.config.url = f"redis://127.0.0.1:{fragile.address.tcp_port}/0"
    invite(tmp_path, RUN, bus.config, {})
    port = BusPort(bus, RUN, COLUMNS)
    port.started(0, 99, [])
    operator = open_bus(fragile.address, folder="operator").producer("commands", RUN, "operator")
    tick = 0
    for value in values(bus.client, KEYS[name]):
        tick += 1
        port.telemetry(tick, "fc", rows(tick))
        operator.publish(Germinate(id=f"g{tick}", site="fc", seed=tick))
        for command in port.commands(tick):
            port.acknowledge(command.id, "applied", "", tick)
        port.end_tick(tick)
        port._remote[-1].flush(0.05)
        if tick % 6 == 0 or value in ("list", "set", "stream", "letters"):
            look(tmp_path, capsys)
            with contextlib.suppress(redis.RedisError):  # said by the run, whose large messages then stay
                bus.payloads(RUN).release()
            with contextlib.suppress(UserError):  # a stream replaced as a whole has lost its beginning
                fresh_group(bus, RUN, ("events", "telemetry"))
    bus.client.delete(KEYS[name])
    if name.startswith("producers"):  # what a set has lost is in it again with the next look whether the server still has all
        bus.client.sadd(KEYS[name], "main", "operator")
    operator.publish(Germinate(id="last", site="fc", seed=0))
    assert operator.flush(60)
    came = []
    assert wait_until(lambda: came.extend(command.id for command in port.commands(tick)) or "last" in came, 60)
    port.acknowledge("last", "applied", "", tick)
    port.ended(tick, "FINISHED", {})
    port.barrier(60)
    assert bus.counts()["waiting"] == 0
    assert not any(producer.fenced for producers in (port._remote,) for producer in producers)
    port.close()


@pytest.mark.parametrize("name", [name for name in KEYS if not name.startswith("entries")])
@pytest.mark.parametrize("value", [GARBAGE, HUGE, "list"])
def test_a_run_begins_whatever_lies_under_its_keys(name, value, fragile, open_bus):
    bus = open_bus(fragile.address, timeout_s=5.0)
    bus.client.rpush(KEYS[name], "x") if value == "list" else bus.client.set(KEYS[name], value)
    port = BusPort(bus, RUN, COLUMNS)
    port.started(0, 9, [])
    port.end_tick(1)
    assert all(producer.flush(60) for producer in port._remote)
    assert bus.client.xlen(keys.entries(RUN, "events", "main")) >= 2
    port.close()


def forged(id, producer="main"):
    epoch, sequence = map(int, id.split("-"))
    return encode(Envelope(RUN, producer, epoch, sequence, 1.0, (), TickEnded(tick=77)))


@pytest.mark.parametrize("wire", [GARBAGE, forged("1-2"), forged("1-21", "other")], ids=["garbage", "other id", "other name"])
@pytest.mark.parametrize("id", ["1-21", "1-60", "2-1", f"{HUGE.decode()}-{HUGE.decode()}"])
def test_entries_in_a_producers_place_keep_its_messages_waiting_and_never_count_as_them(id, wire, fragile, open_bus):
    bus = open_bus(fragile.address, timeout_s=5.0)
    producer = bus.producer("events", RUN)
    key = keys.entries(RUN, "events", "main")
    for number in range(20):
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)
    bus.client.xadd(key, {"m": wire}, id=id)
    for number in range(20, 30):
        producer.publish(TickEnded(tick=number))
    assert wait_until(lambda: any(code == "bus_refused" and "delete that key" in text and key in text for code, text in bus.incidents), 60)
    assert (producer.waiting, producer.fenced, bus.counts()["sent"]) == (10, "", 20)
    bus.client.delete(key)
    assert producer.flush(60)
    assert [id.decode() for id, _ in bus.client.xrange(key)] == [f"1-{number}" for number in range(1, 31)]
    assert bus.counts()["dropped"] == 0


@pytest.mark.parametrize("note", STRINGS)
def test_a_wrong_note_of_the_last_id_loses_and_doubles_nothing(note, fragile, open_bus):
    bus = open_bus(fragile.address, timeout_s=5.0)
    producer = bus.producer("events", RUN)
    for number in range(30):
        if number == 15:
            assert producer.flush(60)
            bus.client.set(keys.last(RUN, "events", "main"), note)
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)
    assert [id.decode() for id, _ in bus.client.xrange(keys.entries(RUN, "events", "main"))] == [f"1-{n}" for n in range(1, 31)]
    assert bus.counts()["dropped"] == 0 and bus.counts()["sent"] == 30
