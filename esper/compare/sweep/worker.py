"""``python -m esper.compare.sweep.worker <process id of the sweep>``: a process that runs one job of a sweep after another.

It reads a JSON line a request from standard input and answers with one on its first standard output. The output of a job
goes to ``job.log`` in its own folder. Torch is imported once, so later jobs start at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from esper import custom
from esper.cli.system_errors import say_anything
from esper.config import build, plain
from esper.errors import Preempted, Terminated, UserError

LOG = "job.log"
ORPHANED_S = 0.5  # time between two looks at whether the sweep lives


SAVED, LOST = 75, 143
"""Exit codes after SIGTERM: the job under way, if there was one, has saved its state, or it has not."""


def main() -> int:
    """Serve until the input ends."""
    busy = False
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    say_anything()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the sweep, which tells its workers
    try:
        import esper.running.run  # noqa: F401  every job needs it: loaded while the sweep makes its plan and its tracker starts

        signal.signal(signal.SIGTERM, _stop)
        threading.Thread(target=_follow, args=(int(sys.argv[1]),), daemon=True).start()
        with custom.decided():
            for line in sys.stdin:
                busy = True
                answers.write(json.dumps(handle(json.loads(line))) + "\n")
                busy = False
    except Preempted:
        return SAVED
    except KeyboardInterrupt:
        return LOST if busy else SAVED
    except BrokenPipeError:  # the sweep was killed; its next start finds the job's folder
        return LOST
    return 0


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request: ``describe`` a config's task, or ``run`` it in a folder."""
    if request["ask"] == "describe":
        return describe(request)
    return run_job(request)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Primary metric, every metric's direction and the samples of the test set, from the task's data."""
    try:
        task = build(request["config"], request["choices"]).task.build()
    except UserError as error:
        return {"error": str(error)}
    directions = {name: metric.direction for name, metric in task.metrics.items()}
    return {"primary": task.primary, "directions": {"loss": "min", **directions}, "samples": len(task.test)}


def run_job(request: dict[str, Any]) -> dict[str, Any]:
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
        _train(request, folder)
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


def _train(request: dict[str, Any], folder: Path) -> None:
    import yaml

    from esper.compare.sweep.resume import can_resume, wait_for_orphan
    from esper.running.resume import state_in
    from esper.running.run import run

    config = build(request["config"], request["choices"])
    if wait_for_orphan(folder) == "FINISHED":
        return  # by the worker of a sweep that was killed
    state = state_in(folder) if can_resume(config, folder) else None
    if state is not None:
        print(f"going on after step {state['trainer']['steps']}", file=sys.stderr, flush=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
    run(config, folder, quiet=True, state=state, controls=request.get("controls", ()))


def _stop(signum: int, frame: object) -> NoReturn:
    raise Terminated


def _follow(sweep: int) -> None:
    """Send SIGTERM to this process when the sweep's process is gone: its answer is no longer awaited."""
    while os.getppid() == sweep:
        time.sleep(ORPHANED_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
