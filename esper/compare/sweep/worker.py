"""A worker: a process that runs one job of a sweep after another.

It reads a JSON line a request from its socket and answers with one. A job that is ``watched`` sends a line with its metrics after every
look at the validation set, and is told whether to go on. The output of a job goes to ``job.log`` in its own folder. What jobs need was
imported before the process was forked, so that they start at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from esper.config import build, plain
from esper.errors import Preempted, Pruned, Terminated, UserError

LOG = "job.log"
SAVED, LOST = 75, 143
"""Exit codes after SIGTERM: the job under way, if there was one, has saved its state, or it has not."""


def serve(channel: socket.socket) -> int:
    """Answer requests until the sweep closes its end of ``channel``, or its writing half; the exit code of this process."""
    signal.signal(signal.SIGTERM, _stop)
    busy, over = threading.Event(), threading.Event()
    threading.Thread(target=_follow, args=(channel, busy, over), daemon=True).start()
    try:
        with channel.makefile("r", encoding="utf-8") as requests, channel.makefile("w", encoding="utf-8") as answers:
            for line in requests:
                busy.set()
                if over.is_set():
                    break
                _send(answers, handle(json.loads(line), lambda told: _goes_on(requests, answers, told)))
                busy.clear()
    except Preempted:
        return SAVED
    except KeyboardInterrupt:
        return LOST if busy.is_set() else SAVED
    except ConnectionError:  # the sweep was killed; its next start finds the job's folder
        return LOST
    return 0


def _send(answers: TextIO, told: dict[str, Any]) -> None:
    answers.write(json.dumps(told) + "\n")
    answers.flush()


def _goes_on(requests: TextIO, answers: TextIO, told: dict[str, Any]) -> bool:
    """Tell the sweep how the job under way is doing; whether it should go on. It ends with the sweep's process."""
    _send(answers, {"report": told})
    reply = requests.readline()
    return not reply or bool(json.loads(reply)["go_on"])


GoesOn = Callable[[dict[str, Any]], bool]


def handle(request: dict[str, Any], goes_on: GoesOn) -> dict[str, Any]:
    """The answer to one request: ``describe`` a config's task, or ``run`` it in a folder."""
    if request["ask"] == "describe":
        return describe(request)
    return run_job(request, goes_on)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Primary metric, every metric's direction and the samples of the test set, from the task's data."""
    try:
        task = build(request["config"], request["choices"]).task.build()
    except UserError as error:
        return {"error": str(error)}
    directions = {name: metric.direction for name, metric in task.metrics.items()}
    return {"primary": task.primary, "directions": {"loss": "min", **directions}, "samples": len(task.test)}


def run_job(request: dict[str, Any], goes_on: GoesOn) -> dict[str, Any]:
    """Run one job; an exception becomes its status and the last lines of its log."""
    started = time.perf_counter()
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / LOG).open("ab", buffering=0)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger().setLevel(logging.INFO)
    status, error = "FINISHED", ""
    try:
        _train(request, folder, goes_on)
    except Pruned as end:
        status = "PRUNED"
        print(f"esper: {end}", file=sys.stderr)
    except UserError as refusal:
        status, error = "FAILED", str(refusal)
        print(f"esper: {refusal}", file=sys.stderr)
    except Exception as fault:  # a job that breaks must not take the sweep along: it is counted and its log says why
        status, error = "FAILED", f"{type(fault).__name__}: {fault}"
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        log.close()
    gc.collect()
    return {"status": status, "error": error, "seconds": time.perf_counter() - started}


def _train(request: dict[str, Any], folder: Path, goes_on: GoesOn) -> None:
    import yaml

    from esper.compare.sweep.resume import ORPHAN_S, can_resume, wait_for_orphan
    from esper.running.resume import state_in
    from esper.running.run import run

    config = build(request["config"], request["choices"])
    if wait_for_orphan(folder, request.get("wait_s", ORPHAN_S)) == "FINISHED":
        return  # by the worker of a sweep that was killed
    state = state_in(folder) if can_resume(config, folder) else None
    if state is not None:
        print(f"going on after step {state['trainer']['steps']}", file=sys.stderr, flush=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
    watch = _watch(goes_on) if request.get("watched") else None
    run(config, folder, quiet=True, state=state, controls=request.get("controls", ()), watch=watch)


def _watch(goes_on: GoesOn) -> Callable[[Any], None]:
    """Called with the trainer after a look at the validation set: tells its metrics, and ends the run where the sweep says so."""

    def watch(trainer: Any) -> None:
        steps, history = trainer.outcome.steps, trainer.outcome.history
        values = {name: value for tick, name, value in history if tick == history[-1][0] and name.startswith("validation/")}
        if steps < trainer.total and not goes_on({"step": steps, "of": trainer.total, "values": values}):
            raise Pruned(f"ended after step {steps} of {trainer.total}: on the validation set it has fallen behind earlier trials")

    return watch


def _stop(signum: int, frame: object) -> NoReturn:
    raise Terminated


def _follow(channel: socket.socket, busy: threading.Event, over: threading.Event) -> None:
    """Send SIGTERM to this process over its job when the sweep stops it or is gone; without a job it ends by itself."""
    ended = select.poll()
    ended.register(channel, select.POLLRDHUP)
    ended.poll()
    over.set()
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
