"""`esper bus`: what is on a run's bus, for people on narrow terminals and for programs."""

from __future__ import annotations

import json

import pytest

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, RedisConfig
from esper.bus.discovery import invite
from esper.bus.programs import inspect
from esper.bus.server.status import status
from esper.errors import UserError
from esper.messages import TickEnded


def publish(producer, numbers):
    for number in numbers:
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)


@pytest.fixture
def bus(processes, tmp_path):
    """A run's own server, and the note in its folder."""
    opened = open_bus(EmbeddedConfig(claim_s=0.05, deliveries=1), tmp_path)
    invite(tmp_path, "run", opened.config, {})
    yield opened
    opened.close()


def test_status_tail_and_dead_letters_show_what_is_there(tmp_path, bus, capsys):
    consumer = bus.consumer("events", "run", "tracker", "one")
    publish(bus.producer("events", "run"), range(5))
    consumer.ack(consumer.read(2, 1))
    consumer.read(1, 1)
    folder = str(tmp_path)

    def ask(*words):
        assert inspect.main([*words, folder, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (found,) = ask("status")
    (stream,) = found["streams"]
    assert (stream["stream"], stream["entries"], stream["last"]) == ("events", 5, "1-5")
    group = stream["groups"][0]
    assert (group["name"], group["pending"], group["behind"]) == ("tracker", 1, 2)
    assert 0 < group["oldest_s"] < 60
    assert [line["message"]["tick"] for line in ask("tail")] == [0, 1, 2, 3, 4]
    while not bus.dead_letters("run"):
        consumer.ack([delivery for delivery in consumer.read(10, 0.05) if delivery.message.tick > 2])
    ((letter,),) = ask("dead-letters", "list")
    assert letter["message"] == {"kind": "TickEnded", "tick": 2, "epoch": 0}
    assert ask("dead-letters", "replay") == [{"replayed": 1}]
    (again,) = consumer.read(10, 1)
    assert again.message.tick == 2
    with pytest.raises(UserError, match="no dead letter 9-9"):
        inspect.main(["dead-letters", "purge", folder, "--id", "9-9"])
    assert inspect.main(["dead-letters", "purge", folder]) == 1
    assert inspect.main(["status", folder]) == 0
    assert "tracker" in capsys.readouterr().out
    assert inspect.main(["tail", folder, "--count", "1"]) == 0
    assert "TickEnded tick=4" in capsys.readouterr().out


def test_a_folder_without_a_bus_to_join_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run that others can join"):
        inspect.main(["status", str(tmp_path)])


def test_following_shows_new_messages_as_they_come(bus):
    producer = bus.producer("events", "run")
    followed = bus.newest("events", "run", 1, follow=True)
    publish(producer, [1])
    assert next(followed)[2].body.tick == 1
    producer.publish(TickEnded(tick=2))
    assert next(followed)[2].body.tick == 2


def test_another_run_that_the_server_does_not_know_is_refused_by_naming_those_it_does(tmp_path, bus):
    publish(bus.producer("events", "other"), [1])
    for words in (["status"], ["tail"], ["dead-letters", "list"]):
        with pytest.raises(UserError, match=r"no run nope: it has other$"):
            inspect.main([*words, str(tmp_path), "--run", "nope"])
    assert inspect.main(["status", str(tmp_path), "--run", "other"]) == 0


def test_a_server_that_goes_away_meanwhile_is_a_sentence(tmp_path, bus, monkeypatch):
    publish(bus.producer("events", "run"), [1])
    monkeypatch.setattr(inspect, "status", lambda *_: bus.server.stop() or status(bus, "run"))
    with pytest.raises(UserError, match=r"no bus answers at redis://127.0.0.1"):
        inspect.main(["status", str(tmp_path)])
    bus.server.start()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("words", [["status"], ["tail"], ["dead-letters", "list"]])
def test_a_run_whose_own_server_ended_with_it_says_so_and_what_can_still_be_seen(tmp_path, words):
    ended = open_bus(EmbeddedConfig(), tmp_path)
    invite(tmp_path, "run", ended.config, {})
    ended.close()
    with pytest.raises(UserError) as said:
        inspect.main([*words, str(tmp_path)])
    assert f"this server belongs to the run in {tmp_path} and ended with it" in str(said.value)
    assert "summary.json" in str(said.value) and f"resume={tmp_path}" in str(said.value)
    assert "bus.url" not in str(said.value) and "bus=embedded" not in str(said.value)


@pytest.mark.slow
def test_a_server_of_others_that_is_gone_is_not_said_to_have_ended_with_the_run(tmp_path):
    invite(tmp_path, "run", RedisConfig(url="redis://127.0.0.1:1/0"), {})
    with pytest.raises(UserError, match=r"no bus answers at .*: start the server or correct bus.url"):
        inspect.main(["status", str(tmp_path)])


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_tail_of_nothing_is_refused_in_a_sentence(tmp_path, bus, count):
    with pytest.raises(UserError, match=f"--count {count}: give how many"):
        inspect.main(["tail", str(tmp_path), "--count", count])


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_name_or_number_is_cut_in_a_table_however_narrow(tmp_path, bus, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    names = ("controller", "operator-of-the-night-shift")
    for name in names:
        publish(bus.producer("commands", "run", name), range(3))
    consumer = bus.consumer("commands", "run", "a-group-with-a-long-name", "one")
    assert consumer.read(1, 1)
    while not bus.dead_letters("run"):
        consumer.ack([delivery for delivery in consumer.read(10, 0.05) if delivery.id != "1-1"])
    assert inspect.main(["status", str(tmp_path)]) == 0
    assert inspect.main(["dead-letters", "list", str(tmp_path)]) == 0
    words = capsys.readouterr().out.split()
    for word in (*names, "commands", "a-group-with-a-long-name", "1-3", "behind", "TickEnded", "acknowledgement"):
        assert word in words
    assert not any("…" in word for word in words)


def test_what_a_group_is_behind_is_counted_over_every_start_of_the_producer(tmp_path, bus):
    publish(bus.producer("events", "run"), range(5))
    consumer = bus.consumer("events", "run", "slow", "one")
    consumer.ack(consumer.read(2, 1))
    publish(bus.producer("events", "run"), range(4))
    bus.producer("events", "run")  # a start that said nothing
    publish(bus.producer("events", "run"), range(2))
    (key,) = bus.streams("run", "events")
    bus.client.xgroup_create(key, "fresh", id="0")

    def behind():
        (stream,) = status(bus, "run").streams
        return {group.name: group.behind for group in stream.groups}

    assert behind() == {"slow": 3 + 4 + 2, "fresh": 5 + 4 + 2}
    bus.client.xtrim(key, minid="1-5", approximate=False)
    assert behind() == {"slow": 1 + 4 + 2, "fresh": 1 + 4 + 2}
