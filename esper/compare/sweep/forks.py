"""The sweep's side of the fork server: starting it, asking it for workers, hearing how they end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import esper

MESSAGE = 1 << 16  # bytes


class Fork:
    """One forked process: the socket to it, and how it ended.

    ``code`` is None where its server was lost before it could tell, and that of SIGTERM where the server ended before it had forked.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.answers = channel.makefile("r", encoding="utf-8")
        self.ended = threading.Event()
        self.code: int | None = None

    def end(self, code: int | None) -> None:
        """The process is gone; nothing more will be read from it, even if a child of it holds the socket."""
        self.code = code
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # a worker that has lost its server ends too
        self.ended.set()

    def close(self) -> None:
        """Let go of the socket, once the process has ended."""
        self.answers.close()
        self.channel.close()


class ForkServerClient:
    """The sweep's side of ``esper.compare.sweep.fork_server``: has loaded what jobs need, and forks the workers.

    Server and workers are a session of their own: Ctrl-C in the terminal reaches the sweep alone.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        root = str(Path(esper.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "esper.compare.sweep.fork_server"],
                stdin=theirs.fileno(),
                env=os.environ | {"PYTHONPATH": path} | self.environment,
                start_new_session=True,
            )
        self._forks: dict[int, Fork] = {}
        threading.Thread(target=_listen, args=(self._control, self._forks, self.process), daemon=True).start()

    def fork(self, environment: Mapping[str, str]) -> Fork:
        """A new worker; returns at once, the worker reads its first request when it is there."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            if self.process.poll() is not None:  # it was killed, and its workers end with it
                self._control.close()
                self._start()
            number, fork = next(self._numbers), Fork(ours)
            self._forks[number] = fork
            request = json.dumps({"worker": number, "environment": dict(environment)})
            try:
                socket.send_fds(self._control, [request.encode()], [theirs.fileno()])
            except OSError:  # it was killed just now
                fork.end(None)
        return fork

    def close(self) -> None:
        """Let the server end, after its last worker; at once if it is still loading."""
        with contextlib.suppress(OSError):  # it was killed
            self._control.shutdown(socket.SHUT_WR)
        self.process.terminate()

    def wait(self) -> None:
        """Wait until the server has ended, with all its workers."""
        self.process.wait()
        self._control.close()

    def kill(self) -> None:
        """Kill the server and its workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _listen(control: socket.socket, forks: dict[int, Fork], server: subprocess.Popen[bytes]) -> None:
    """Note the end of every worker, until the server is gone."""
    with contextlib.suppress(OSError):
        while told := control.recv(MESSAGE):
            message = json.loads(told)
            forks.pop(message["worker"]).end(message["code"])
    code = server.wait()
    while forks:
        forks.popitem()[1].end(code if code == -signal.SIGTERM else None)


_early: ForkServerClient | None = None


@contextlib.contextmanager
def early_server() -> Iterator[Callable[[int], None]]:
    """Within: the given function, called with the threads of each worker, starts the server that the first pool will use.

    So it loads while the sweep still composes its jobs. A server that no pool has taken ends here.
    """
    global _early

    def start(threads: int) -> None:
        global _early
        _early = ForkServerClient(thread_limits(threads))

    try:
        yield start
    finally:
        if _early is not None:
            _early.close()
            _early.wait()
            _early = None


def server_for(environments: Sequence[Mapping[str, str]]) -> ForkServerClient:
    """The server that was started early, if it fits these workers, or a new one."""
    global _early
    shared = dict(set.intersection(*(set(environment.items()) for environment in environments)))
    if _early is None or not _early.environment.items() <= shared.items():
        return ForkServerClient(shared)
    server, _early = _early, None
    return server


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables that give numerical libraries so many threads; they read them when they are loaded."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
