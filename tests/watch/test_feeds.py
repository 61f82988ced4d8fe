"""Where the messages come from: a real server, and the files of a real tracker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.bus.config import RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.server.embedded import EmbeddedServer
from esper.cli.compose import compose
from esper.errors import UserError
from esper.messages import Message, RunEnded, Telemetry
from esper.report.summary_file import write_summary
from esper.running.run_folder import hold_folder
from esper.tracking.parquet_files import ParquetFiles
from esper.tracking.run_info import RunInfo
from esper.watch.feeds import FileFeed, feed_elsewhere
from esper.watch.state import RunState
from tests.watch.conftest import story


def known(*feeds: list[Message]) -> dict[str, Any]:
    """The snapshot of these messages, without the speed of a clock."""
    state = RunState("mine")
    for found in feeds:
        state.take(found)
    return {key: value for key, value in state.snapshot().items() if key not in ("steps_per_second", "left_s")}


@pytest.fixture(scope="module")
def server(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    running = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    yield running
    running.stop()


@pytest.fixture
def settings(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("ESPER_BUS_PASSWORD", server.note.password)
    return {"url": f"redis://127.0.0.1:{server.note.tcp_port}/0"}


def said_on(bus: ServerBus, run: str, messages: list[Message]) -> None:
    """Publish like a trainer, and wait until the server has it all."""
    producers = {stream: bus.producer(stream, run) for stream in ("events", "telemetry")}
    for message in messages:
        producers["telemetry" if isinstance(message, Telemetry) else "events"].publish(message)
    assert all(producer.flush(10) for producer in producers.values())


@pytest.mark.server
def test_a_run_elsewhere_is_followed_over_its_server(settings: dict[str, str], tmp_path: Path) -> None:
    from esper.bus.server.connection import address_of

    config = RedisConfig(**settings)
    bus = ServerBus(config, address_of(config), tmp_path / "there")
    said_on(bus, "afar", story())
    with feed_elsewhere("afar", settings, tmp_path / "here") as (feed, run):
        assert run == "afar" and "127.0.0.1" in feed.place and os.environ["ESPER_BUS_PASSWORD"] not in feed.place
        first = feed.poll()
        assert known(first) == known(story())
        assert feed.poll() == []
        said_on(bus, "afar", [RunEnded(tick=20, status="FINISHED", summary={})])
        assert known(first, feed.poll())["status"] == "FINISHED"
    bus.close()
    with pytest.raises(UserError, match="has no run nowhere; name one of these: afar"), feed_elsewhere("nowhere", settings, tmp_path / "x"):
        pass


@pytest.mark.server
def test_watching_takes_nothing_from_those_who_read(settings: dict[str, str], tmp_path: Path) -> None:
    from esper.bus.server.connection import address_of

    config = RedisConfig(**settings)
    bus = ServerBus(config, address_of(config), tmp_path / "there")
    said_on(bus, "shared", story())
    with feed_elsewhere("shared", settings, tmp_path / "here") as (feed, _):
        feed.poll()
    consumer = bus.consumer("events", "shared", "tracker", "one")
    assert len(consumer.read(1000)) == sum(not isinstance(message, Telemetry) for message in story())
    consumer.close()
    bus.close()


def test_a_run_with_its_bus_in_memory_is_followed_by_its_files(tmp_path: Path) -> None:
    tracker, feed, messages = ParquetFiles(), FileFeed(tmp_path), story()
    with hold_folder(compose(["tracking=none"]), tmp_path) as lock:
        lock.begin()
        tracker.open(RunInfo(run="r", name="mine", folder=str(tmp_path), outputs=str(tmp_path), started_ms=0))
        found: list[list[Message]] = []
        for part in (messages[:8], messages[8:16], messages[16:]):
            tracker.record(part)
            tracker.flush()
            found.append(feed.poll())
        assert all(found) and feed.poll() == []
        assert known(*found) == known(messages)
        tracker.record([RunEnded(tick=10, status="FINISHED", summary={})])
        tracker.close("FINISHED", {})
        alerts = [{"tick": 7, "level": "warning", "code": "slow", "text": "the disk is <b>slow</b>"}]
        write_summary({"status": "FINISHED", "ticks": 10, "alerts": alerts}, tmp_path)
        lock.end()
    assert known(*found, feed.poll())["status"] == "FINISHED"
    assert feed.poll() == []
    alone = known(FileFeed(tmp_path).poll())  # begun to watch after its end
    for name in ("tick", "seeds", "gates", "transitions", "curves", "alerts", "loss", "value"):
        assert alone[name] == known(messages)[name], name


def test_a_run_that_died_is_said_to_have_died(tmp_path: Path) -> None:
    tracker = ParquetFiles()
    tracker.open(RunInfo(run="r", name="mine", folder=str(tmp_path), outputs=str(tmp_path), started_ms=0))
    tracker.record(story())
    tracker.flush()
    (tmp_path / "run.lock").write_text('{"config_hash": "x"}\n')
    shown = known(FileFeed(tmp_path).poll())
    assert shown["status"] == "DIED" and shown["tick"] == 10 and len(shown["seeds"]) == 1
