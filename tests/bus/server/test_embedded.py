"""The server of a run's own: one for a folder, however the process that started it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from esper.bus.server import embedded
from esper.bus.server.connection import connect
from esper.bus.server.embedded import EmbeddedServer
from esper.errors import UserError

OWNER = """
import sys, time
from pathlib import Path
from esper.bus.server.connection import connect
from esper.bus.server.embedded import EmbeddedServer

server = EmbeddedServer(Path(sys.argv[1]))
connect(server.address, 30.0).set("kept", "yes")
print(server.process.pid, server.address.tcp_port, flush=True)
time.sleep(600)
"""


def gone(process: int) -> bool:
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("processes")
def test_a_server_that_was_stopped_when_its_owner_was_killed_makes_room_for_the_next(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        first, port = map(int, owner.stdout.readline().split())
        os.kill(first, signal.SIGSTOP)
        owner.kill()
        owner.wait()
    assert not gone(first)
    server = EmbeddedServer(tmp_path)
    try:
        assert gone(first)
        assert server.address.tcp_port == port
        assert connect(server.address, 30.0).get("kept") == b"yes"
    finally:
        server.stop()


@pytest.mark.usefixtures("processes")
def test_a_folder_whose_server_is_at_work_gets_no_second_one(tmp_path, monkeypatch):
    server = EmbeddedServer(tmp_path)
    note = (tmp_path / "address.json").read_bytes()
    try:
        monkeypatch.setattr(embedded, "START_S", 0.2)
        with pytest.raises(UserError, match=rf"at work already \(process {server.process.pid}\).*is not over"):
            EmbeddedServer(tmp_path)
        assert (tmp_path / "address.json").read_bytes() == note
    finally:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    monkeypatch.undo()
    EmbeddedServer(tmp_path).stop()
