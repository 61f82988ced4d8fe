"""Does a controller that learns beat the best fixed schedule? Every controller at equal growth events, paired by seed, on two tasks.

python experiments/ab_controller/run.py                 # about three minutes with 16 processes; writes results.csv and README.md here
python experiments/ab_controller/run.py --pairs 2 --pilots 1 --steps 100 --tasks mnist1d --out /tmp/try
python experiments/ab_controller/run.py --again         # no runs: README.md once more from results.csv and measured.json

The fixed schedule that stands as the reference, the memory of the bandit that begins wiser, and the runs from which the policy is learnt
come from pilots on other seeds. A task whose data is not installed is left out, and the README says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FIXED = ("at_05", "at_10", "at_20", "at_35")
LEARNING = ("by_health", "by_bandit", "wiser_bandit", "by_probe", "by_allocator", "by_policy")
ARMS = ("host", "any_time", *FIXED, *LEARNING)
TASKS = ("mnist1d", "fashion_mnist")
PILOT = 1000
"""The pilots' first seed; the study's are 0, 1, 2, …"""
SIGNIFICANCE = 0.05
COLUMNS = (
    "phase",
    "task",
    "arm",
    "seed",
    "accuracy",
    "validation_accuracy",
    "macs",
    "parameters",
    "germinated",
    "fossilized",
    "culled",
    "seconds",
    "fingerprint",
)
Job = dict[str, Any]


def one(job: Job) -> dict[str, Any]:
    """One run of an arm; ``memory`` is the file that a bandit begins with, which it gets as a copy so that runs do not meet.

    ``weights`` is the file of a policy, and ``folder`` keeps the run for esper learn.
    """
    from esper.cli.compose import compose
    from esper.running.run import run

    with tempfile.TemporaryDirectory() as folder:
        arm = "by_bandit" if job["arm"] == "wiser_bandit" else job["arm"]
        words = ["experiment=ab_controller", f"arm={arm}", f"task={job['task']}", f"seed={job['seed']}", f"trainer.steps={job['steps']}"]
        words += ["tracking=none", "trainer.control=false", f"output={folder}"]
        config, memory = compose(words), Path(folder) / "memory.json"
        if job.get("memory"):
            if Path(job["memory"]).exists():
                shutil.copy(job["memory"], memory)
            config.controller.memory = str(memory)  # no override: an arm's own group may not be touched by one
        if job.get("weights"):
            config.controller.weights = job["weights"]
        began = time.perf_counter()
        summary = run(config, Path(job.get("folder") or folder) / "run", quiet=True).summary
        if job.get("remember"):
            shutil.copy(Path(folder) / "memory.json", job["memory"])
    final, seeds = summary["metrics"]["final"], summary["seeds"]
    return {name: job[name] for name in ("phase", "task", "arm", "seed")} | {
        "accuracy": final["test/accuracy"],
        "validation_accuracy": final["validation/accuracy"],
        "macs": summary["macs"],
        "parameters": summary["parameters"]["after"],
        "germinated": seeds["germinated"],
        "fossilized": seeds["fossilized"],
        "culled": seeds["culled"],
        "seconds": round(time.perf_counter() - began, 1),
        "fingerprint": summary["fingerprint"],
    }


def chain(jobs: list[Job]) -> list[dict[str, Any]]:
    """Runs one after the other: the pilots of a bandit, each of which begins with what the earlier ones have learnt."""
    return [one(job) for job in jobs]


def pilots(task: str, count: int, steps: int, folder: Path) -> list[list[Job]]:
    """The fixed schedules on seeds of their own, and a chain of bandits that leaves its memory in ``folder``, as all leave their runs."""

    def pilot(arm: str, seed: int) -> Job:
        place = {"folder": str(folder / "runs" / f"{task}-{arm}-{seed}")}
        return {"phase": "pilot", "task": task, "steps": steps, "arm": arm, "seed": seed} | place

    fixed = [[pilot(arm, PILOT + number)] for arm in FIXED for number in range(count)]
    remembering = {"memory": str(folder / f"{task}.json"), "remember": True}
    return [[pilot("wiser_bandit", PILOT + number) | remembering for number in range(count)], *fixed]


def learnt(task: str, folder: Path) -> None:
    """Learn a task's policy from its pilots, which have run."""
    from esper.learn.command import main as learn

    learn([*map(str, sorted((folder / "runs").glob(f"{task}-*/run"))), f"to={folder / task}.safetensors"])


def studied(task: str, pairs: int, steps: int, folder: Path) -> list[list[Job]]:
    """Every arm on every seed."""
    common = {"phase": "study", "task": task, "steps": steps}
    known = {"wiser_bandit": {"memory": str(folder / f"{task}.json")}, "by_policy": {"weights": str(folder / f"{task}.safetensors")}}
    return [[common | {"arm": arm, "seed": seed} | known.get(arm, {})] for seed in range(pairs) for arm in ARMS]


def available(tasks: list[str]) -> tuple[list[str], list[str]]:
    """The tasks whose data is here, and a sentence for each of the others."""
    from esper.cli.compose import compose
    from esper.errors import UserError

    there, sentences = [], []
    for task in tasks:
        try:
            compose(["experiment=ab_controller", f"task={task}"]).task.build()
            there.append(task)
        except UserError as error:
            sentences.append(f"`{task}` was left out: {error}")
    return there, sentences


def best_fixed(rows: list[dict[str, Any]], task: str) -> str:
    """The fixed schedule of the highest mean validation accuracy over the pilots."""
    mean = {arm: np.mean([row["validation_accuracy"] for row in rows if (row["task"], row["arm"]) == (task, arm)]) for arm in FIXED}
    return max(FIXED, key=lambda arm: (mean[arm], -FIXED.index(arm)))


def against(rows: list[dict[str, Any]], task: str, arm: str, reference: str) -> dict[str, float]:
    """Mean paired difference in test accuracy, its sign-flip interval (95 %) and two-sided p."""
    from esper.compare.statistics.sign_flip import interval, sign_flip

    value = {(row["arm"], row["seed"]): row["accuracy"] for row in rows if row["task"] == task}
    seeds = sorted({seed for _, seed in value})
    differences = np.array([value[arm, seed] - value[reference, seed] for seed in seeds])
    low, high = interval(differences, SIGNIFICANCE)
    return {"mean": float(differences.mean()), "low": low, "high": high, "p": float(sign_flip(differences))}


def holm(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The p-values of the arms, adjusted for being several."""
    from esper.compare.statistics.verdicts import holm as adjusted

    return dict(zip(found, adjusted(np.array([one["p"] for one in found.values()])).tolist(), strict=True))


def verdict(found: dict[str, float], p: float) -> str:
    """What the test says of an arm beside the best fixed schedule."""
    if p < SIGNIFICANCE:
        return "beats it" if found["mean"] > 0 else "is worse"
    return "does not beat it"


def table(rows: list[dict[str, Any]], task: str, reference: str) -> list[str]:
    """The README's table of one task."""
    mine = [row for row in rows if row["task"] == task]
    host = np.mean([row["macs"] for row in mine if row["arm"] == "host"])
    there = [arm for arm in ARMS if any(row["arm"] == arm for row in mine)]
    found = {arm: against(mine, task, arm, reference) for arm in there if arm != reference}
    adjusted = holm({arm: found[arm] for arm in LEARNING if arm in there})
    lines = [
        "| arm | test accuracy | against the best fixed (95 %) | p | p (Holm) | verdict | MACs | parameters | grown / kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in there:
        some = [row for row in mine if row["arm"] == arm]
        mean = {name: np.mean([row[name] for row in some]) for name in ("accuracy", "macs", "parameters", "germinated", "fossilized")}
        difference = "reference | – | – | –"
        if arm in found:
            one_ = found[arm]
            text = f"{100 * one_['mean']:+.2f} ({100 * one_['low']:+.2f} to {100 * one_['high']:+.2f})"
            decided = f"{adjusted[arm]:.4f} | {verdict(one_, adjusted[arm])}" if arm in adjusted else "– | –"
            difference = f"{text} | {one_['p']:.4f} | {decided}"
        cost = f"{mean['macs'] / host:.2f} × host | {mean['parameters']:.0f} | {mean['germinated']:.1f} / {mean['fossilized']:.1f}"
        lines.append(f"| `{arm}` | {100 * mean['accuracy']:.2f} % | {difference} | {cost} |")
    return lines


def measured(options: argparse.Namespace, missing: list[str], seconds: float) -> dict[str, Any]:
    """What the README says beside the results: where they were measured, how, in what time, and what was left out."""
    import torch

    place = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    said = {name: getattr(options, name) for name in ("pairs", "pilots", "steps", "tasks", "processes")}
    return said | {"seconds": round(seconds), "place": place, "missing": missing}


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results.csv, numbers as numbers."""
    texts = ("phase", "task", "arm", "fingerprint")
    with path.open(newline="") as file:
        return [{key: value if key in texts else float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def report(rows: list[dict[str, Any]], said: dict[str, Any]) -> str:
    """The study's README."""
    pilot = [row for row in rows if row["phase"] == "pilot"]
    references = {task: best_fixed(pilot, task) for task in TASKS if any(row["task"] == task for row in pilot)}
    study = [row for row in rows if row["phase"] == "study"]
    pairs = len({row["seed"] for row in study})
    lines = [
        "# Does a controller that learns beat the best fixed schedule?",
        "",
        "**Question.** Six growth events in every arm: does it pay to choose their time, place and kind by health, by a bandit",
        "(from nothing, or with the memory of pilot runs), by a short trial, by an allocator over local bandits, or by a policy that was",
        "learnt from pilot runs, beside the best of four fixed times?",
        "",
        f"**Plan, stated beforehand.** {pairs} paired seeds, test accuracy, two-sided sign-flip test, Holm's correction over the",
        f"controllers that learn or look, α = {SIGNIFICANCE}. The reference is the fixed schedule of the highest mean validation",
        f"accuracy in {said['pilots']} pilots on other seeds; the bandit's memory comes from pilots too, one after the other, and the",
        "policy is learnt from all of these. Places of fixed schedules are drawn by lot. A controller that does not beat the reference",
        "is said not to.",
        "",
        f"**Command.** `python experiments/ab_controller/run.py --pairs {said['pairs']} --pilots {said['pilots']} --steps {said['steps']}",
        f"--tasks {' '.join(said['tasks'])}` ({said['seconds']} s with {said['processes']} processes; {said['place']}, one thread a run).",
        "Every run is in `results.csv`; the arms are in `conf/arm`, the rest in `conf/experiment/ab_controller.yaml`.",
        "",
        *said["missing"],
    ]
    for task, reference in references.items():
        learning = [arm for arm in LEARNING if any(row["arm"] == arm for row in study)]
        found = {arm: against(study, task, arm, reference) for arm in learning}
        adjusted = holm(found)
        winners = [f"`{arm}`" for arm in learning if verdict(found[arm], adjusted[arm]) == "beats it"]
        lines += ["", f"## {task}: the best fixed schedule is `{reference}`", "", *table(study, task, reference), ""]
        lines.append(f"**Verdict.** {' and '.join(winners) or 'No controller'} {'beat' if len(winners) != 1 else 'beats'} `{reference}`.")
    idle = [row for row in study if row["arm"] != "host" and row["germinated"] == 0]
    if idle:
        lines += ["", f"In {len(idle)} runs of growing arms nothing germinated: " + ", ".join(sorted({row["arm"] for row in idle})) + "."]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Run, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--pilots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--again", action="store_true", help="no runs: README.md once more from results.csv and measured.json")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.again:
        measure(options)
    text = report(read(options.out / "results.csv"), json.loads((options.out / "measured.json").read_text()))
    (options.out / "README.md").write_text(text)
    print(text)
    return 0


def measure(options: argparse.Namespace) -> None:
    """All the runs, into results.csv and measured.json."""
    began = time.perf_counter()
    tasks, missing = available(options.tasks)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for make, count in ((pilots, options.pilots), (studied, options.pairs)):
            chains = [jobs for task in tasks for jobs in make(task, count, options.steps, Path(folder))]
            for found in pool.imap_unordered(chain, chains):
                rows += found
                print(
                    *(f"{row['phase']} {row['task']} {row['arm']} {row['seed']}: {row['accuracy']:.4f}" for row in found),
                    sep="\n",
                    flush=True,
                )
            if make is pilots:
                for task in tasks:
                    learnt(task, Path(folder))
    rows.sort(key=lambda row: (row["phase"], row["task"], ARMS.index(row["arm"]), row["seed"]))
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "measured.json").write_text(json.dumps(measured(options, missing, time.perf_counter() - began)) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
