"""Run studies side by side on one machine, each with its share of the cores or of the GPU.

    python experiments/side_by_side.py MINUTES OUT LANE...

A lane is one argument: its share, and the words of a study. ``cpu:4`` gives four cores and no GPU, ``gpu:10`` ten processes that share
the GPU, with a core each. The study is the name of an experiment (``conf/experiment``) with overrides, or a program with its arguments::

    python experiments/side_by_side.py 8 results 'gpu:10 growth_frontier task.path={torch} task.files=[*.py] task.cache={cache}' \\
        'cpu:4 digits_why + growth_map_quick' 'cpu:2 experiments/aa/run.py --out {out} --cores {cores}'

``+`` puts studies into a lane one after another; each gets an equal part of the time that is left. ``{torch}`` stands for the sources of
torch, ``{cache}`` for a folder that all studies share, ``{out}``, ``{cores}`` and ``{minutes}`` for a study's own folder, cores and time.

MINUTES are those of the studies; starting, judging and packing take about another one. OUT gets a log of every study, and of every
experiment an archive of its sweep: unpacked, ``experiments/write_up.py`` or the study's ``report.py`` writes the README from it. A
study that does not end by itself is stopped a minute after its time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".parquet", ".safetensors", "events.jsonl", "metrics.csv")
"""Ends of names that an archive leaves out."""
GRACE_S = 60.0
TRY_S = 45.0
CONTROL = "nvidia-cuda-mps-control"


@dataclass(frozen=True)
class Lane:
    """A share of the machine and the studies that use it, one after another."""

    gpu: bool
    cores: tuple[int, ...]
    studies: tuple[tuple[str, ...], ...]


def lanes_of(words: list[str], available: list[int]) -> list[Lane]:
    """The lanes, each with cores of its own as far as there are enough. Raises SystemExit for one that says no share or no study."""
    found: list[Lane] = []
    taken = 0
    for text in words:
        share, *rest = shlex.split(text)
        kind, _, number = share.partition(":")
        studies: list[list[str]] = [[]]
        for word in rest:
            studies.append([]) if word == "+" else studies[-1].append(word)
        if kind not in ("cpu", "gpu") or not number.isdecimal() or not int(number) or not all(studies):
            raise SystemExit(f"side_by_side: '{text}' is no lane; write 'cpu:4 STUDY…' or 'gpu:10 STUDY…'.")
        cores = tuple(sorted({available[(taken + place) % len(available)] for place in range(int(number))}))
        found.append(Lane(kind == "gpu", cores, tuple(tuple(one) for one in studies)))
        taken += int(number)
    return found


def named(study: tuple[str, ...]) -> str:
    """The experiment's name, or that of the program's folder in ``experiments``."""
    program = Path(study[0])
    return study[0] if program.suffix != ".py" else program.parent.name if program.parent.name != "experiments" else program.stem


class SideBySide:
    """One call: its end, its folders, and what its processes find in their environment."""

    def __init__(self, minutes: float, out: Path, work: Path, shared: dict[str, str]) -> None:
        self.ends, self.out, self.work, self.shared = time.monotonic() + 60.0 * minutes, out.resolve(), work, shared
        self.codes: dict[str, int] = {}

    def run_all(self, lanes: list[Lane]) -> None:
        """All lanes at once; returns when the last has ended."""
        threads = [threading.Thread(target=self.run, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run(self, lane: Lane) -> None:
        """The lane's studies, one after another; called in a thread, which keeps to the lane's cores as what it starts does."""
        os.sched_setaffinity(0, lane.cores)
        for number, study in enumerate(lane.studies):
            minutes = (self.ends - time.monotonic()) / 60.0 / (len(lane.studies) - number)
            name, began = named(study), time.monotonic()
            self.codes[name] = self._study(name, lane, study, minutes)
            if study[0] == name:
                self._pack(name)
            print(f"{name} ended with code {self.codes[name]} after {time.monotonic() - began:.0f} s", flush=True)

    def _study(self, name: str, lane: Lane, study: tuple[str, ...], minutes: float) -> int:
        environment = (
            os.environ | self.shared | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
        )
        if not lane.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (self.out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *self._words(name, lane, study, minutes)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return _ended(process, 60.0 * minutes + GRACE_S)

    def _words(self, name: str, lane: Lane, study: tuple[str, ...], minutes: float) -> list[str]:
        torch = find_spec("torch")
        sources = torch.submodule_search_locations if torch else None
        places = {"torch": (sources or [""])[0], "cache": self.work / "cache", "out": self.out / name}
        values = {key: str(value) for key, value in places.items()} | {"cores": str(len(lane.cores)), "minutes": f"{minutes:.2f}"}
        words = list(study)
        for key, value in values.items():
            words = [word.replace(f"{{{key}}}", value) for word in words]
        if study[0] != name:
            return words
        settings = {"output": self.work, "hydra.sweep.dir": self.work / name, "hydra.launcher.minutes": values["minutes"]}
        settings |= {"hydra.launcher.workers": len(lane.cores), "tracking": "csv"}
        own = {word.partition("=")[0] for word in words}
        return ["-m", "esper", f"experiment={name}", *(f"{key}={value}" for key, value in settings.items() if key not in own), *words[1:]]

    def _pack(self, name: str) -> None:
        if (self.work / name).exists():
            with tarfile.open(self.out / f"{name}.tgz", "w:gz") as archive:
                archive.add(self.work / name, name, filter=lambda one: None if one.name.endswith(LEFT_OUT) else one)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process that has so many seconds; then SIGTERM, and after half of the grace SIGKILL."""
    for wait, number in ((seconds, signal.SIGTERM), (GRACE_S / 2, signal.SIGKILL)):
        try:
            return process.wait(wait)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
    return process.wait()


def shared_gpu(folder: Path) -> dict[str, str]:
    """Start NVIDIA's MPS, with which kernels of several processes run at once; its environment, or none where it does not work here."""
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    for place in environment.values():
        Path(place).mkdir(parents=True)
    try:
        subprocess.run([CONTROL, "-d"], env=os.environ | environment, check=True, timeout=TRY_S)
        trial = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
        subprocess.run(trial, env=os.environ | environment, check=True, timeout=TRY_S, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"MPS does not work here ({error}); the processes take turns on the GPU.", flush=True)
        end_sharing(environment)
        return {}
    print("The processes share the GPU by MPS.", flush=True)
    return environment


def end_sharing(environment: dict[str, str]) -> None:
    """End the MPS that was started with this environment."""
    if environment and shutil.which(CONTROL):
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run([CONTROL], input=b"quit\n", env=os.environ | environment, timeout=GRACE_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("lane", nargs="+")
    parser.add_argument("--mps", action="store_true", help="share the GPU by NVIDIA's MPS, where that works")
    given = parser.parse_args()
    lanes = lanes_of(given.lane, sorted(os.sched_getaffinity(0)))
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        shared = shared_gpu(Path(work) / "mps") if given.mps else {}
        call = SideBySide(given.minutes - (time.monotonic() - began) / 60.0, given.out, Path(work), shared)
        call.run_all(lanes)
        end_sharing(shared)
    for name in call.codes:
        print(f"--- {name}\n" + "\n".join((given.out / f"{name}.log").read_text(errors="replace").splitlines()[-12:]))
    return max(call.codes.values(), key=abs)


if __name__ == "__main__":
    sys.exit(main())
