"""`scripts/chaos resume`: runs killed with SIGKILL at random moments and resumed must end as undisturbed ones do.

Goes over hosts, tasks, strategies, controllers, objectives and buses; some runs are killed again after they were resumed.
Compared are the fingerprint, ``summary.json`` but for wall time, and every row of the four Parquet files. Writes what came
of it to ``scripts/chaos_suites/resume.json``; the exit code is 1 when anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_suffix(".json")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "resume")]

import killing  # noqa: E402
import torch  # noqa: E402

from esper.cli.compose import compose  # noqa: E402

SHORT = (
    "trainer.steps=150",
    "trainer.batch_size=32",
    "trainer.control=false",
    "trainer.checkpoint_every=10%",
    "trainer.validate_every=20%",
    "telemetry.every=5",
    "tracking=csv",
    "tracking.figures=false",
    "lifecycle.judge_every=4%",
)
KILLS_A_RUN = 5  # the first at any moment of the run, the later ones at any moment of what was left of it
CNN = ("model=cnn", "trainer.steps=80", "trainer.batch_size=16")
TRANSFORMER = (
    "task=text",
    "task.context=32",
    "model=transformer",
    "model.width=32",
    "model.depth=2",
    "model.dropout=0.1",
    "trainer.steps=80",
    "trainer.batch_size=8",
    "lifecycle.judge_every=10%",
)
RUNS: dict[str, tuple[str, ...]] = {
    "mlp linear heuristic": (),
    "mlp drift random": ("grafting=drift", "controller=random"),
    "mlp momentum heuristic sgd": ("grafting=momentum", "optimizer=sgd", "optimizer.lr=0.05"),
    "mlp adaptive random": ("grafting=adaptive", "controller=random"),
    "mlp stability plateau": ("grafting=stability", "controller.plateau=5%"),
    "mlp grad_norm functional": ("grafting=grad_norm", "lifecycle.objective=functional_gradient"),
    "mlp performance reconstruction": ("grafting=performance", "lifecycle.objective=reconstruction"),
    "mlp none": ("controller=none",),
    "mlp epochs, low rank": (
        "lifecycle.clock=epoch",
        "blueprint=low_rank",
        "trainer.batch_size=512",
        "trainer.steps=120",
        "controller.embargo=5step",
        "lifecycle.embargo=5%",
    ),
    "mlp workers, accumulation": ("trainer.num_workers=1", "trainer.accumulate=2"),
    "mlp embedded server": ("bus=embedded",),
    "cnn conv linear": (*CNN, "blueprint=conv", "sites.per_site=2"),
    "cnn block drift": (*CNN, "blueprint=block", "sites.per_site=1", "grafting=drift"),
    "transformer low rank momentum": (*TRANSFORMER, "blueprint=low_rank", "sites.per_site=2", "grafting=momentum"),
    "transformer block random": (*TRANSFORMER, "blueprint=block", "sites.per_site=1", "controller=random"),
}


def main(arguments: list[str]) -> int:
    """Kill, resume, compare; 0 when nothing differed."""
    parser = argparse.ArgumentParser(prog="scripts/chaos resume", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lot = random.Random(options.seed)
    chosen = {name: words for name, words in RUNS.items() if options.only in name}
    began, results = time.monotonic(), {name: {"kills": 0, "runs": 0, "from_checkpoint": 0, "differences": []} for name in chosen}
    with tempfile.TemporaryDirectory() as place:
        references = {}
        while sum(result["kills"] for result in results.values()) < options.kills:
            name = min(chosen, key=lambda key: results[key]["runs"])
            if name not in references:
                references[name] = _reference(chosen[name], Path(place) / f"reference-{len(references)}" / "run")
            _one(name, *references[name], Path(place) / "case" / "run", lot, results[name])
            report = _report(options, results, time.monotonic() - began)
            if not options.dry:  # after every run, so that an interrupted suite leaves what it found
                RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0 if report["differences"] == 0 else 1


def _reference(words: tuple[str, ...], folder: Path) -> tuple[Any, Path, float]:
    """(config, folder, seconds) of the undisturbed run."""
    config = compose([*SHORT, *words, f"output={folder.parent.parent}"])
    folder.mkdir(parents=True)
    done = killing.child(lambda: killing.start(config, folder), folder.parent / "log")
    assert done.code == 0, (folder.parent / "log").read_text()
    return config, folder, done.seconds


def _one(name: str, config: Any, reference: Path, seconds: float, folder: Path, lot: random.Random, result: dict[str, Any]) -> None:
    """One run killed once or more often, and resumed until it ends."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    log, moments, work = folder.parent / "log", [], killing.start
    for attempt in range(KILLS_A_RUN + 1):
        moment = lot.uniform(0.0, 0.7 * seconds) if attempt < KILLS_A_RUN else None
        kept = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
        result["from_checkpoint"] += attempt > 0 and kept
        lived = killing.child(lambda work=work: work(config, folder), log, moment)
        if lived.code == 0:
            break
        if lived.code != -9:
            result["differences"].append(f"{name}, killed at {moments}: exit code {lived.code}: {log.read_text()[-600:]}")
            break
        moments.append(round(lived.seconds, 3))
        work = killing.go_on
    result["kills"] += len(moments)
    result["runs"] += 1
    if killing.ended(folder):
        result["differences"] += [f"{name}, killed at {moments}: {text}" for text in killing.differences(folder, reference)]
    print(f"{name}: killed at {moments} of {seconds:.2f} s, {'same' if not result['differences'] else 'NOT THE SAME'}", file=sys.stderr)


def _report(options: argparse.Namespace, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "command": f"scripts/chaos resume --kills {options.kills} --seed {options.seed}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "kills": sum(result["kills"] for result in results.values()),
        "runs": sum(result["runs"] for result in results.values()),
        "resumed_from_checkpoint": sum(result["from_checkpoint"] for result in results.values()),
        "differences": sum(len(result["differences"]) for result in results.values()),
        "by_run": results,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
