"""MLflow in another process: the frames that cross the boundary, and the two trackers on this side of it.

A frame is length-prefixed msgpack, without pickle. ``MlflowSubprocess`` starts a process of its own for a run and talks to it over pipes
(``esper.tracking.remote_process`` is that process's program); ``MlflowOverSocket`` shares the one process of a sweep.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

import esper
from esper.bus.codec import message_hook, to_plain
from esper.errors import TrackerError, UserError
from esper.messages import Message
from esper.tracking.config import MlflowConfig
from esper.tracking.run_info import RunInfo

LOG = "tracker.log"

#: Environment variable with the path of the sweep's socket; set in a sweep's workers.
SOCKET = "ESPER_TRACKER"

# --- frames ---------------------------------------------------------------------------------------------------------------


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Sent as early as possible, before Open: import the libraries, and test whether the store accepts this run."""

    config: MlflowConfig
    outputs: str
    folder: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """The run begins."""

    config: MlflowConfig
    info: RunInfo


class Messages(msgspec.Struct, frozen=True, tag=True):
    """Messages of the bus; the one frame that is not answered."""

    messages: list[Message]


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Make all messages so far durable."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Last frame."""

    status: str
    summary: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """Answer to a frame; ``error`` is empty on success, ``refused`` marks an error that the user can fix."""

    error: str = ""
    refused: bool = False


Frame = Prepare | Open | Messages | Flush | Close
_encoder = msgspec.msgpack.Encoder()


class Readable(Protocol):
    """A stream of bytes to read from."""

    def read(self, size: int, /) -> bytes: ...


class Writable(Protocol):
    """A stream of bytes to write to."""

    def write(self, data: bytes, /) -> Any: ...

    def flush(self) -> None: ...


def write_frame(stream: Writable, frame: Frame | Reply) -> None:
    """Send one frame."""
    plain: Any = frame
    if isinstance(frame, Messages):
        plain = {"type": "Messages", "messages": [to_plain(message) for message in frame.messages]}
    body = _encoder.encode(plain)
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def read_frame(stream: Readable) -> Frame:
    """The next frame; raises EOFError when the other side has gone."""
    frame: Frame = msgspec.msgpack.decode(_body(stream), type=Frame, dec_hook=message_hook)
    return frame


def read_reply(stream: Readable) -> Reply:
    """The answer to a frame; raises EOFError when the other side has gone."""
    return msgspec.msgpack.decode(_body(stream), type=Reply)


def _body(stream: Readable) -> bytes:
    head = stream.read(4)
    size = int.from_bytes(head, "big")
    body = stream.read(size) if len(head) == 4 else b""
    if len(head) < 4 or len(body) < size:
        raise EOFError("the other side of the pipe has gone")
    return body


# --- trackers -------------------------------------------------------------------------------------------------------------


class RemoteMlflow:
    """Base of the trackers that leave the work to another process; subclasses send the frames."""

    called = "MLflow"

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self.wants_model = config.model

    def record(self, messages: Sequence[Message]) -> None:
        """Pass the messages on. A slow process makes this call wait, while the bus holds further messages."""
        self._send(Messages(list(messages)))

    def flush(self) -> None:
        """Wait until everything passed on is in the store."""
        self._ask(Flush())

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the run and the connection."""
        try:
            self._ask(Close(status, dict(summary)))
        finally:
            self._stop()

    def _raise_error(self, reply: Reply) -> None:
        """Raise the other process's error: a UserError if the user can fix it."""
        if reply.refused:
            raise UserError(reply.error)
        if reply.error:
            raise TrackerError(reply.error)

    def _send(self, frame: Frame) -> None:
        raise NotImplementedError(type(self).__name__)

    def _ask(self, frame: Frame) -> None:
        """Send the frame and wait for its answer."""
        raise NotImplementedError(type(self).__name__)

    def _stop(self) -> None:
        raise NotImplementedError(type(self).__name__)


class MlflowSubprocess(RemoteMlflow):
    """Passes everything to its own process, so that training has its interpreter to itself; its errors come back as TrackerError."""

    def __init__(self, config: MlflowConfig) -> None:
        super().__init__(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._tried = False

    def prepare(self, folder: Path, outputs: Path) -> None:
        """Start the process, which imports MLflow and tries the store meanwhile; returns at once, ``open`` has its answer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        root = str(Path(esper.__file__).resolve().parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),  # its 7 take minutes
            "CUDA_VISIBLE_DEVICES": "",  # its libraries must not touch the trainer's GPU; NVML sees it all the same
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "esper.tracking.remote_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )  # fmt: skip
        self._tried = False
        self._send(Prepare(self.config, str(outputs), str(folder)))

    def try_out(self) -> None:
        """Wait until the process that ``prepare`` started has tried the store; its refusal is raised."""
        if self._process is None or self._tried:
            return
        try:
            self._wait()
            self._tried = True
        except Exception:
            self._stop()
            raise

    def open(self, info: RunInfo) -> None:
        """Wait until the MLflow run exists (seconds; the caller is a separate thread)."""
        if self._process is None:
            self.prepare(Path(info.folder), Path(info.outputs))
        self.try_out()
        try:
            self._ask(Open(self.config, info))
        except Exception:
            self._stop()
            raise

    def let_go(self) -> None:
        """End the process if no run was opened in it, after its present work: the store must not be left half made.

        Harmless after ``close``.
        """
        self._stop(self.config.close_s)

    def _ask(self, frame: Frame) -> None:
        self._send(frame)
        self._wait()

    def _wait(self) -> None:
        _, answers = self._pipes()
        ready, _, _ = select.select([answers], [], [], self.config.close_s)
        if not ready:
            self._stop()
            raise TrackerError(f"the tracking process did not answer within {self.config.close_s:.0f} s (tracking.close_s)")
        self._answer()

    def _answer(self) -> None:
        assert self._process is not None
        try:
            reply = read_reply(self._pipes()[1])
        except EOFError:
            code = self._process.wait()
            raise TrackerError(f"the tracking process ended with code {code}; its last words are in {self._log}") from None
        self._raise_error(reply)

    def _send(self, frame: Frame) -> None:
        try:
            write_frame(self._pipes()[0], frame)
        except BrokenPipeError:
            self._answer()  # raises the reason, if the process gave one
            raise TrackerError(f"the tracking process went away; its last words are in {self._log}") from None

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """The process's standard input and output."""
        assert self._process is not None, "open() comes first"
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _stop(self, patience_s: float = 5.0) -> None:
        if self._process is None:
            return
        (asks, answers), process = self._pipes(), self._process
        self._process = None
        with contextlib.suppress(BrokenPipeError):  # it has gone already
            asks.close()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        answers.close()
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()


class MlflowOverSocket(RemoteMlflow):
    """Hands everything over a Unix socket to the one process that writes a sweep's store, however many jobs run."""

    def __init__(self, config: MlflowConfig, path: str) -> None:
        super().__init__(config)
        self._path = path

    def open(self, info: RunInfo) -> None:
        """Connect and open the MLflow run."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(self._path)
        except OSError as error:
            raise TrackerError(f"the sweep's tracking process at {self._path} cannot be reached: {error}") from error
        self._socket.settimeout(self.config.close_s)
        self._stream = self._socket.makefile("rwb")
        self._ask(Open(self.config, info))

    def _stop(self) -> None:
        self._stream.close()
        self._socket.close()

    def _send(self, frame: Frame) -> None:
        try:
            write_frame(self._stream, frame)
        except OSError as error:
            raise TrackerError(f"the sweep's tracking process went away: {error}") from error

    def _ask(self, frame: Frame) -> None:
        self._send(frame)
        try:
            reply = read_reply(self._stream)
        except TimeoutError:
            wait = f"{self.config.close_s:.0f} s (tracking.close_s)"
            raise TrackerError(f"the sweep's tracking process did not answer within {wait}") from None
        except (EOFError, OSError) as error:
            raise TrackerError(f"the sweep's tracking process went away: {error}") from error
        self._raise_error(reply)
