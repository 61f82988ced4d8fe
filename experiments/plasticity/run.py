"""Does growing and culling keep a network plastic, as continual backprop does?

    python experiments/plasticity/run.py                 # the whole study: tuning.csv, runs.csv, comparison.json, the figure, the README
    python experiments/plasticity/run.py --quick         # a minute: few tasks, few seeds, into --out
    python experiments/plasticity/run.py --again         # verdicts, figure and README once more from the files

``--minutes 8 --workers 6 --out results/`` begins no run that would end later, and judges what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from grown import Grown  # noqa: E402
from learners import KINDS as LEARNERS  # noqa: E402
from learners import Learner  # noqa: E402
from stream import BATCH, KINDS, digits, tasks  # noqa: E402
from study_runs import Row, TimeLimit, best, carry_out, job, mean, note_machine, read, tuning_jobs  # noqa: E402

from esper.randomness import generator  # noqa: E402

WIDTH, SMALL = 64, 40
MATURITY = 100
PARTS = 20
"""The curve has as many points."""


def _base(base: str, *rates: float, **more: Any) -> list[dict[str, Any]]:
    return [{"base": base, "lr": rate, **more} for rate in rates]


def _strengths(*strengths: float) -> list[dict[str, Any]]:
    sgd = [{"base": "sgd", "lr": rate, "strength": strength} for rate in (0.1, 0.2, 0.3) for strength in strengths]
    return [*sgd, {"base": "adam", "lr": 0.003, "strength": strengths[1]}]


SHAPES = (((40, 28), (500, 3000), (0.2,)), ((58, 7), (100, 500), (0.1, 0.2)))
"""Hidden units of the host and of a branch, in either layer (9,018 and 9,126 parameters; 64 units without branches have 8,970), the steps
between two removals, and the host's rates."""
_GROWN = [
    {"base": "sgd", "lr": lr, "branch_lr": 0.003, "host": host, "units": units, "every": every, "maturity": MATURITY}
    for (host, units), times, rates in SHAPES
    for every in times
    for lr in rates
]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "sgd": _base("sgd", 0.03, 0.1, 0.2, 0.3),
    "adam": _base("adam", 3e-4, 1e-3, 3e-3),
    "l2_init": _strengths(3e-4, 1e-3, 3e-3),
    "shrink_perturb": _strengths(1e-4, 3e-4, 1e-3),
    "continual_backprop": _strengths(3e-4, 1e-3, 4e-3),
    "grown": [settings | {"strength": 0.0} for settings in _GROWN],
    "grown_l2": [settings | {"strength": 1e-3} for settings in _GROWN],
}
CONTROLS = {"kept": "grown_l2", "host": "l2_init"}
"""Control and the arm whose tuned settings it has: the same branches, never culled; the smaller host that nothing grows on."""
REFERENCE = "continual_backprop"


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    tasks: int = 120
    tuning_tasks: int = 100
    grown_tuning_tasks: int = 60
    seeds: int = 15
    control_seeds: int = 4
    tune_seeds: int = 2
    short_grids: bool = False


QUICK = Plan(tasks=6, tuning_tasks=1, grown_tuning_tasks=1, seeds=2, control_seeds=1, tune_seeds=1, short_grids=True)


def learner(arm: str, settings: dict[str, Any], steps: int, seed: int) -> Learner:
    """The learner of an arm with the initial weights of a seed."""
    draws = generator(seed, "host")
    if arm in ("grown", "grown_l2", "kept"):
        return Grown(settings | {"culls": arm != "kept"}, settings["host"], draws, steps, seed)
    if arm == "host":
        return LEARNERS["l2_init"](settings, SMALL, draws)
    return LEARNERS.get(arm, Learner)(settings, WIDTH, draws)


def one(given: Row) -> Row:
    """One run: the online accuracy of the stream in PARTS parts, of its last quarter, and what the net cost."""
    per_task = len(digits()[1]) // BATCH
    net = learner(given["arm"], given["settings"], per_task * given["tasks"], given["seed"])
    accuracies = []
    for task in tasks(given["block"], given["tasks"], given["seed"]):
        accuracies.append(sum(net.step(inputs, labels) for inputs, labels in task.batches()) / (per_task * BATCH))
    parts = min(PARTS, given["tasks"])
    curve = {
        f"part{part:02}": mean(accuracies[part * given["tasks"] // parts : (part + 1) * given["tasks"] // parts]) for part in range(parts)
    }
    late = mean(accuracies[-max(1, given["tasks"] // 4) :])
    costs = {"parameters": net.parameters(), "steps": per_task * given["tasks"], **net.counts()}
    return {"late_accuracy": late, "accuracy": mean(accuracies), **costs, **curve}


def tune(plan: Plan, out: Path, workers: int, limit: TimeLimit) -> list[Row]:
    """Runs of every arm and stream with each of its settings, with seeds of their own."""
    jobs = tuning_jobs({arm: grid[:2] if plan.short_grids else grid for arm, grid in GRIDS.items()}, KINDS, plan.tune_seeds)
    for given in jobs:
        given["tasks"] = plan.grown_tuning_tasks if given["arm"].startswith("grown") else plan.tuning_tasks
    jobs.sort(key=lambda given: -given["arm"].startswith("grown"))  # the longest first
    return carry_out(one, jobs, out / "tuning.csv", workers, limit)


def judged_jobs(plan: Plan, chosen: dict[tuple[str, str], dict[str, Any]]) -> list[Row]:
    """Every arm with every seed, seed by seed; then the controls with the first seeds alone."""
    places = [(arm, kind, seed) for seed in range(plan.seeds) for kind in KINDS for arm in GRIDS]
    places += [(arm, kind, seed) for seed in range(plan.control_seeds) for kind in KINDS for arm in CONTROLS]
    return [job(arm, kind, seed, chosen[CONTROLS.get(arm, arm), kind], tasks=plan.tasks) for arm, kind, seed in places]


def main(arguments: list[str]) -> int:
    """Tune, run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run that would end later; 0: no limit")
    parser.add_argument("--tuned", type=Path, help="a tuning.csv of before, so that nothing is tuned again")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="no runs: from the files alone")
    options = parser.parse_args(arguments)
    if not options.again:
        plan, limit = QUICK if options.quick else Plan(), TimeLimit(options.minutes)
        note_machine(options.out, options.workers)
        (options.out / "plan.json").write_text(json.dumps(dataclasses.asdict(plan), indent=2) + "\n", encoding="utf-8")
        tuned = read(options.tuned) if options.tuned else tune(plan, options.out, options.workers, limit)
        chosen = best(tuned, "late_accuracy")
        carry_out(one, judged_jobs(plan, chosen), options.out / "runs.csv", options.workers, limit)
    from report import report  # matplotlib and pandas only now, after the processes

    report(read(options.out / "runs.csv"), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
