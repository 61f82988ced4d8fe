"""``python -m esper.compare.sweep.fork_server``: loads once what every job needs, and forks a sweep's workers.

Standard input is a socket to the sweep. Each of its messages asks for a worker: its number and environment in JSON, and the socket
that the worker answers on. The server tells every worker's end and exit code. It ends after its last worker when the sweep is gone.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from esper import user_code
from esper.cli.system_errors import say_anything

LONGEST = 1 << 20  # bytes of a message, most of them an environment


def main() -> int:
    """Serve until the sweep closes its end of the socket, or dies."""
    say_anything()
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print is no result of the sweep
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the sweep, which tells its workers
    import esper.running.run  # noqa: F401  every job needs it; pyarrow and pandas start a thread and are left to the workers

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where it goes to all processes, the workers save their jobs and the server tells so
    gc.collect()
    gc.freeze()  # what was loaded stays: a worker that cleans up after a job looks only at what the job has left
    with user_code.decided():
        ForkServer(control).serve()
    return 0


class ForkServer:
    """Forks workers and tells how they end.

    It starts no thread, so that a fork is whole. OpenBLAS, where it may use several, ends them before a fork and starts its own after it.
    """

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.numbers: dict[int, int] = {}  # of the workers that live, by process
        self.woken, self.waker = socket.socketpair()

    def serve(self) -> None:
        """Until the sweep is gone and the last worker has ended."""
        for one in (self.woken, self.waker):
            one.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        sweep = True
        while sweep or self.numbers:
            ready, _, _ = select.select([self.woken, *([self.control] if sweep else [])], [], [])
            if self.woken in ready:
                self.woken.recv(LONGEST)
                self._tell_ends()
            if self.control in ready:
                text, sockets, _, _ = socket.recv_fds(self.control, LONGEST, 1)
                if text:
                    self._start(json.loads(text), socket.socket(fileno=sockets[0]))
                sweep = bool(text)

    def _start(self, request: dict[str, Any], channel: socket.socket) -> None:
        process = os.fork()
        if not process:
            self._become_worker(request["environment"], channel)
        self.numbers[process] = request["worker"]
        channel.close()

    def _become_worker(self, environment: dict[str, str], channel: socket.socket) -> NoReturn:
        from esper.compare.sweep.worker import serve

        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (self.control, self.woken, self.waker):
                one.close()
            os.environ.update(environment)
            _forget_shared_draws()
            code = serve(channel)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # at once: no time for taking apart what the system frees anyway, no way back into the server

    def _tell_ends(self) -> None:
        while self.numbers:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            message = {"worker": self.numbers.pop(process), "code": os.waitstatus_to_exitcode(status)}
            try:
                self.control.send(json.dumps(message).encode())
            except OSError:  # the sweep was killed: nobody asks
                continue


def _forget_shared_draws() -> None:
    """NumPy's global generator begins anew in every worker, as in every process; esper draws from none, but parts of the user's may."""
    import numpy

    numpy.random.seed()


if __name__ == "__main__":
    sys.exit(main())
