"""`scripts/chaos ddp`: a run of several processes of which one is killed every minute must lose nothing and little time.

Two runs of the same settings train side by side under `torchrun`, each in `--workers` processes. One is undisturbed. Of the other, one
process, drawn by chance, is killed with SIGKILL every `--every` seconds, and `torchrun --max-restarts` starts all of them again. Both train
the same steps, so many that the undisturbed run takes about `--minutes`. Compared are their times from the first line to the end, the
fingerprint, `summary.json` but for wall time, and every row of the Parquet and CSV files. Writes `scripts/chaos_suites/ddp.json`, or
`--output`. The exit code is 1 when anything differed, or the disturbed run had less than 90 % of the undisturbed throughput.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from esper.report.summary_file import read_summary  # noqa: E402
from tests.resume import killing  # noqa: E402

ENOUGH = 0.9
WORDS = (
    "trainer=ddp",
    "trainer.control=false",
    "trainer.validate_every=5%",
    "telemetry.every=20",
    "tracking=csv",
    "tracking.figures=false",
)
CALIBRATION = 1000  # steps


class Training:
    """A run under torchrun, in a folder of its own."""

    def __init__(self, options: argparse.Namespace, steps: int, folder: Path, restarts: int) -> None:
        folder.mkdir()
        self.folder, self.began = folder, time.monotonic()
        self.seconds = 0.0
        words = [*WORDS, f"trainer.steps={steps}", f"trainer.checkpoint_every={options.checkpoint_every}step", "resume=auto"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
        command = [*torchrun, f"--max-restarts={restarts}", "-m", "esper", *words]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
        with (folder / "said").open("w") as said:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)

    def over(self) -> bool:
        """Whether it has ended; notes when."""
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self.began
        return True

    def kill_one(self, lot: random.Random) -> bool:
        """Kill one of its processes, if all are there; False while torchrun starts them again."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ranks = [int(process) for process in children if _has_rank(process)]
        if not ranks:
            return False
        os.kill(lot.choice(ranks), signal.SIGKILL)
        return True

    @property
    def run(self) -> Path:
        """The run's folder."""
        (path,) = self.folder.glob("outputs/*/*/summary.json")
        return path.parent

    def text(self) -> str:
        """What was said."""
        return (self.folder / "said").read_text(encoding="utf-8")


def _has_rank(process: str) -> bool:
    try:
        return b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """Train both, kill, compare; 0 when nothing differed and enough was trained in the time."""
    parser = argparse.ArgumentParser(prog="scripts/chaos ddp", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the undisturbed run takes, about")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="draws the processes that are killed")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        report = _measure(options, Path(place))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0 if not report["differences"] and report["throughput"] >= ENOUGH else 1


def _measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    steps = int(60 * options.minutes * _steps_a_second(options, place))
    calm = Training(options, steps, place / "calm", 0)
    struck = Training(options, steps, place / "struck", 10_000)
    kills, due, lot = 0, struck.began + options.every, random.Random(options.seed)
    while not (calm.over() & struck.over()):
        if time.monotonic() >= due and not struck.over() and struck.kill_one(lot):
            kills, due = kills + 1, due + options.every
        time.sleep(0.05)
    for one in (calm, struck):
        assert one.process.returncode == 0, one.text()[-3000:]
    found = read_summary(calm.run)
    return {
        "command": f"scripts/chaos ddp --workers {options.workers} --minutes {options.minutes:g} --every {options.every:g}",
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": found["environment"]["packages"]["torch"],
        "workers": options.workers,
        "steps": steps,
        "kills": kills,
        "resumed": struck.text().count("going on in"),
        "seconds_undisturbed": round(calm.seconds, 1),
        "seconds_killed": round(struck.seconds, 1),
        "throughput": round(calm.seconds / struck.seconds, 4),
        "grown": found["seeds"],
        "fingerprints_equal": found["fingerprint"] == read_summary(struck.run)["fingerprint"],
        "differences": [
            text for text in killing.differences(struck.run, calm.run) if not text.startswith(("summary run:", "summary name:"))
        ],
    }


def _steps_a_second(options: argparse.Namespace, place: Path) -> float:
    """The rate of two runs side by side, as they will be; loading is not counted."""
    both = [Training(options, CALIBRATION, place / f"calibration-{number}", 0) for number in range(2)]
    for one in both:
        one.process.wait()
        assert one.process.returncode == 0, one.text()[-3000:]
    return CALIBRATION / max(float(read_summary(one.run)["seconds"]["total"]) for one in both)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
