"""Real faults for real servers: killed, frozen, robbed of their tail, or behind a proxy that breaks lines."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path

from esper.bus.protocol import Consumer, Delivery
from esper.bus.server.connection import Address
from esper.bus.server.embedded import EmbeddedServer


class FragileServer(EmbeddedServer):
    """A real server on a fixed port to which bad things happen."""

    def kill(self) -> None:
        """``kill -9``; its append-only file stays as it was."""
        self.process.kill()
        self.process.wait()

    def restart(self, cut_bytes: int = 0) -> None:
        """Kill, take ``cut_bytes`` off the end of its append-only file, start."""
        self.kill()
        if cut_bytes:
            self.cut(cut_bytes)
        self.start()

    def cut(self, count: int) -> None:
        """Lose the last ``count`` bytes the server believed it had written."""
        path = max((self.folder / "appendonlydir").glob("*.incr.aof"))
        os.truncate(path, max(0, path.stat().st_size - count))

    def freeze(self) -> None:
        """SIGSTOP: it answers nothing and refuses nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)


class FaultProxy:
    """Forwards TCP to a server; ``reset_after_request`` swallows a reply and resets the connection instead.

    After ``spare`` more replies, that is: so each request of a conversation can be the one whose reply is lost.
    """

    def __init__(self, target: Address) -> None:
        self._target = (target.host, target.tcp_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1], user=target.user, password=target.password)
        self._resets = self._spare = 0
        self._closing = False
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def reset_after_request(self, times: int = 1, spare: int = 0) -> None:
        """Of the next replies, ``spare`` pass and ``times`` are lost, after their requests were carried out."""
        with self._lock:
            self._resets += times
            self._spare = spare

    def calm(self) -> None:
        """Lose no more replies."""
        with self._lock:
            self._resets = 0

    def reset_all(self) -> None:
        """Reset every connection now."""
        for pair in list(self._pairs):
            self._reset(pair)

    def close(self) -> None:
        """Stop listening and reset what is open."""
        self._closing = True
        self._listener.close()
        self.reset_all()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                upstream = socket.create_connection(self._target, timeout=1)
            except OSError:
                client.close()
                continue
            pair = (client, upstream)
            self._pairs.append(pair)
            threading.Thread(target=self._forward, args=(pair,), daemon=True).start()

    def _forward(self, pair: tuple[socket.socket, socket.socket]) -> None:
        client, upstream = pair
        logged_in = False
        try:
            while True:
                ready, _, _ = select.select(pair, [], [], 0.5)
                for source in ready:
                    data = source.recv(1 << 18)
                    if not data:
                        return
                    if source is upstream and logged_in and self._lose_this():
                        return
                    logged_in = logged_in or source is upstream
                    (upstream if source is client else client).sendall(data)
        except (OSError, ValueError):
            return
        finally:
            self._reset(pair)

    def _lose_this(self) -> bool:
        with self._lock:
            if self._resets and self._spare:
                self._spare -= 1
                return False
            lose = self._resets > 0
            self._resets -= lose
            return lose

    def _reset(self, pair: tuple[socket.socket, socket.socket]) -> None:
        if pair in self._pairs:
            self._pairs.remove(pair)
        for end in pair:
            try:  # no lingering: the peer sees RST, not an orderly end
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
            except OSError:
                continue


def wait_until(condition, seconds: float = 60.0) -> bool:
    """Whether ``condition()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def any_of(generator: random.Random, **weights: float) -> str:
    """One of the names, by weight."""
    return generator.choices(list(weights), list(weights.values()))[0]


def spool_folder(folder: Path) -> Path:
    """Where a bus with this folder keeps what waits."""
    return folder / "spool"


def drain(consumer: Consumer, wanted: int, seconds: float = 60.0) -> list[int]:
    """Read and acknowledge until ``wanted`` ticks are there or the time is up."""
    found: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        consumer.ack(got)
        found += got
    return [delivery.message.tick for delivery in found]
