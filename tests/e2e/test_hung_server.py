"""A bus server that is stopped in the middle of a run for good: the run ends, says what did not get out, and it can be sent later."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.bus.config import RedisConfig
from esper.bus.protocol import STREAMS
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import PASSWORD_VARIABLE
from esper.running.connections import RunPort
from tests.here import here
from tests.resume.conftest import SHORT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bus"))

from faults import FragileServer

pytestmark = pytest.mark.e2e
STEPS, STOPPED_AT = 40, 20
WORDS = (*SHORT[1:], f"trainer.steps={STEPS}", "bus.timeout_s=0.3", "bus.retry_s=0.1")
UNSENT = r"(\d+) messages did not reach the bus server"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FragileServer]:
    """A real server, on which something is stopped or killed at a tick of the run that ``ends_at`` is called for."""
    running = FragileServer(tmp_path / "server")
    monkeypatch.setenv(PASSWORD_VARIABLE, running.note.password)
    yield running
    running.process.kill()
    running.process.wait()


def at_tick(tick: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``act`` called when the run has ended this tick."""
    ended = RunPort.end_tick

    def end_tick(port: RunPort, number: int) -> None:
        ended(port, number)
        if number == tick:
            act()

    monkeypatch.setattr(RunPort, "end_tick", end_tick)


def stored(server: FragileServer, folder: Path) -> dict[str, list[str]]:
    """The ids on the server, by stream."""
    bus = ServerBus(RedisConfig(), server.address, folder / "reader")
    found = {stream: [id.decode() for id, _ in bus.client.xrange(f"esper:{{{folder.name}}}:{stream}:main")] for stream in STREAMS}
    bus.close()
    return found


def without_hole(ids: list[str]) -> bool:
    return ids == [f"1-{number}" for number in range(1, len(ids) + 1)]


@pytest.mark.parametrize("fate", ["freeze", "kill"])
def test_what_a_hung_or_killed_server_did_not_get_is_said_and_sent_by_flush_once(
    fate: str, server: FragileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    at_tick(STOPPED_AT, getattr(server, fate), monkeypatch)
    ended = here(*WORDS, "bus=redis", f"bus.url=redis://127.0.0.1:{server.address.tcp_port}/0", f"hydra.run.dir={folder}")
    assert ended.returncode == 0, ended.stderr
    counted = json.loads((folder / "summary.json").read_text())["bus"]
    assert counted["waiting"] > 0 and counted["dropped"] == 0
    said = f"{counted['waiting']} messages did not reach the bus server"
    assert said in ended.stderr and f"esper bus flush {folder}" in ended.stderr and str(folder / "bus" / "spool") in ended.stderr
    assert said in (folder / "esper.log").read_text()
    refused = here("bus", "flush", str(folder))
    assert refused.returncode == 2 and "no bus answers" in refused.stderr and "Traceback" not in refused.stderr
    server.thaw() if fate == "freeze" else server.start()
    before = stored(server, folder)
    flushed = here("bus", "flush", str(folder), "--json")
    assert flushed.returncode == 0, flushed.stderr
    after = stored(server, folder)
    assert json.loads(flushed.stdout) == {"sent": sum(len(after[s]) - len(before[s]) for s in STREAMS), "waiting": 0}
    assert all(without_hole(after[stream]) for stream in STREAMS)
    assert sum(map(len, after.values())) == counted["sent"] + counted["waiting"]
    again = here("bus", "flush", str(folder))
    assert again.returncode == 0 and "nothing waits" in again.stdout
    assert stored(server, folder) == after
