"""``python -m esper.tracking.remote_process``: the process that MLflow runs in, driven by frames on standard input.

MLflow has a process of its own because it is written in Python: in a thread of the training process, its import and every
batch would hold the interpreter lock. When the training process is killed, the run is marked KILLED here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import BinaryIO

from esper.errors import UserError
from esper.tracking import remote
from esper.tracking.mlflow_run import MlflowRun


def serve(asks: BinaryIO, answers: BinaryIO) -> int:
    """Handle frames until Close, end of input or an error, which is reported and ends the run as FAILED."""
    prepared: MlflowRun | None = None
    run: MlflowRun | None = None  # from when there is something to end
    try:
        while True:
            frame = remote.read_frame(asks)
            match frame:
                case remote.Prepare():
                    prepared = MlflowRun(frame.config)
                    prepared.prepare(frame.outputs, frame.folder)
                case remote.Open():
                    prepared = prepared or MlflowRun(frame.config)
                    prepared.open(frame.info)
                    run = prepared
                    if frame.config.figures:
                        threading.Thread(target=warm, daemon=True).start()
                case remote.Messages():
                    assert run is not None
                    run.record(frame.messages)
                    continue
                case remote.Flush():
                    assert run is not None
                    run.flush()
                case remote.Close():
                    assert run is not None
                    ending, run = run, None
                    ending.close(frame.status, frame.summary)
            remote.write_frame(answers, remote.Reply())
            if isinstance(frame, remote.Close):
                return 0
    except EOFError:
        if run is not None:
            run.close("KILLED", {})
        return 1
    except UserError as error:
        remote.write_frame(answers, remote.Reply(str(error), refused=True))
        if run is not None:
            run.close("FAILED", {})
        return 1
    except Exception as error:  # told to the training process, which raises it at the end of the run
        traceback.print_exc()
        remote.write_frame(answers, remote.Reply(f"{type(error).__name__}: {error}"))
        if run is not None:
            run.close("FAILED", {})
        return 1


def warm() -> None:
    """Import matplotlib for the figures at the end of the run, while there is time."""
    import matplotlib.figure  # noqa: F401


def main() -> int:
    """Leave the processor to training and Ctrl-C to the training process, which then says how the run ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the output of libraries goes to the log, not into the answers
    code = serve(sys.stdin.buffer, answers)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
