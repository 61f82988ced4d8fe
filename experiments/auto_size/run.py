"""Does `esper auto` find a size as good as the best of a grid of static sizes, smaller, for at most half of the grid's MACs?

python experiments/auto_size/run.py --out folder      # about eight minutes with 16 processes; writes results.csv and README.md there
python experiments/auto_size/run.py --out /tmp/try --pairs 1 --names wine cars --short

On tables a gradient boosting that Optuna tunes is the third. No data is downloaded. `report.py` writes README.md from results.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from data_sets import NAMES, PLAIN, REGRESSIONS, TARGETS, task_words, write_tables
from report import write_report

WIDTHS = (16, 32, 64, 128, 256)
CHANNELS = ((4, 8), (8, 16), (12, 24), (16, 32), (32, 64))
RATES = (1e-3, 3e-3, 1e-2)
LENGTHS = (0.25, 1.0)
SHARE = 0.5  # of the grid's MACs that auto may spend
TRIALS = 40  # of the boosting's settings
COLUMNS = (
    "kind",
    "name",
    "pair",
    "size",
    "rate",
    "length",
    "validation",
    "test",
    "parameters",
    "macs",
    "budget",
    "attempts",
    "kept",
    "ended",
    "seconds",
)
Job = dict[str, Any]


def sizes(name: str) -> list[tuple[str, list[str]]]:
    """The static sizes of a data set's grid: their names and words; the first is the one that auto begins with."""
    if name in PLAIN:
        return [(f"{a}-{b}", ["model=cnn", f"model.channels=[{a},{b}]"]) for a, b in CHANNELS]
    return [(str(width), ["model=mlp", f"model.width={width}"]) for width in WIDTHS]


def full_length(name: str, folder: Path, short: bool) -> int:
    """Steps of a full run: those of auto's longest attempt."""
    from esper.auto.auto import EPOCHS, LEAST_CAP
    from esper.cli.compose import compose

    config = compose(task_words(name, folder, 0))
    steps = max(LEAST_CAP, EPOCHS * config.trainer.steps_per_epoch(len(config.task.build().train)))
    return 200 if short else steps


def trained(words: list[str]) -> dict[str, Any]:
    """The numbers of one run; ``validation`` is over the same rows as auto's."""
    from esper.auto.attempts import chosen_by
    from esper.cli.compose import compose
    from esper.running.run import run

    values: dict[str, float] = {}

    def watch(trainer: Any) -> None:
        if trainer.outcome.steps == trainer.total:
            values.update(chosen_by(trainer))

    with tempfile.TemporaryDirectory() as folder:
        common = ["tracking=none", "controller=none", "trainer.checkpoint_every=", "trainer.save=false"]
        summary = run(compose([*words, *common]), Path(folder), quiet=True, controls=(), watch=watch).summary
    metric, final = summary["primary"].removeprefix("validation/"), summary["metrics"]["final"]
    return {
        "validation": values[metric],
        "test": final[f"test/{metric}"],
        "parameters": summary["parameters"]["after"],
        "macs": summary["macs"],
    }


def static(job: Job) -> dict[str, Any]:
    """A size of the grid with one setting."""
    words = [*task_words(job["name"], job["data"], job["pair"]), *dict(sizes(job["name"]))[job["size"]], f"seed={job['pair']}"]
    rates = [f"optimizer.lr={job['rate']}", f"optimizer.branch_lr={job['rate']}"]
    return trained([*words, *rates, f"trainer.steps={max(1, round(job['length'] * job['full']))}"])


def auto(job: Job) -> dict[str, Any]:
    """One search for a size."""
    from rich.console import Console

    from esper.auto.auto import Auto
    from esper.auto.command import prepared

    words = [
        *task_words(job["name"], job["data"], job["pair"]),
        f"seed={job['pair']}",
        f"budget={job['budget']:.6e}macs".replace("e+", "e"),
    ]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        search: Auto = prepared([*words, f"to={folder}/auto"], Console(file=nothing))
        report = search.run()
        path = job["out"] / "paths"
        path.mkdir(exist_ok=True)
        shutil.copy(f"{folder}/auto/auto.json", path / f"{job['name']}-{job['pair']}.json")
        if job["pair"] == 0:
            shutil.copy(f"{folder}/auto/path.png", path / f"{job['name']}.png")
    best = report.path[-1]
    return {
        "validation": best.quality,
        "test": report.test[report.metric],
        "parameters": best.parameters,
        "macs": report.spent,
        "attempts": len(report.attempts),
        "kept": len(report.path),
        "ended": report.ended.partition(":")[0],
    }


def boosting(job: Job) -> dict[str, Any]:
    """Gradient boosting, its settings by Optuna on the rows that choose auto's too; then fitted to all rows but those of the test."""
    import numpy as np
    import optuna
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    from esper.cli.compose import compose

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task: Any = compose(task_words(job["name"], job["data"], job["pair"])).task.build()
    regression = job["name"] in REGRESSIONS
    kind = HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier

    def rows(*sets: str) -> list[Any]:
        return [np.concatenate([getattr(getattr(task, which), part).numpy() for which in sets]) for part in ("inputs", "targets")]

    def fitted(settings: dict[str, Any], *sets: str) -> Any:
        return kind(**settings, early_stopping=False, random_state=job["pair"]).fit(*rows(*sets))

    def score(model: Any, *sets: str) -> float:
        inputs, targets = rows(*sets)
        found = model.predict(inputs)
        return float(1 - np.mean((found - targets) ** 2) if regression else np.mean(found == targets))

    def tried(trial: optuna.Trial) -> float:
        settings = {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "max_iter": trial.suggest_int("max_iter", 20, 400, log=True),
            "max_leaf_nodes": trial.suggest_int("max_leaf_nodes", 4, 64, log=True),
            "min_samples_leaf": trial.suggest_int("min_samples_leaf", 2, 50, log=True),
            "l2_regularization": trial.suggest_float("l2_regularization", 1e-3, 10.0, log=True),
        }
        return score(fitted(settings, "train"), "validation", "judge")

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=job["pair"]))
    study.optimize(tried, n_trials=job["trials"])
    best = fitted(study.best_params, "train", "judge", "validation")
    return {"validation": study.best_value, "test": score(best, "test"), "attempts": job["trials"]}


def one(job: Job) -> dict[str, Any]:
    """A job's row."""
    began = time.monotonic()
    row = {"static": static, "cost": static, "auto": auto, "boosting": boosting}[job["kind"]](job)
    return {key: job.get(key, "") for key in COLUMNS} | row | {"seconds": time.monotonic() - began}


def jobs_of(given: argparse.Namespace, data: Path, pool: Any) -> list[Job]:
    """All jobs: pair by pair, and within a pair those that take longest first."""
    found: list[Job] = []
    full = dict(zip(given.names, pool.starmap(full_length, [(name, data, given.short) for name in given.names]), strict=True))
    common = {"data": data, "out": given.out, "trials": 3 if given.short else TRIALS}
    grid = [(name, size) for name in given.names for size, _ in sizes(name)]
    steps = [
        {"kind": "cost", "name": name, "pair": 0, "size": size, "rate": 1e-3, "length": 0.0, "full": 1, **common} for name, size in grid
    ]
    cost = {(row["name"], row["size"]): row["macs"] for row in pool.map(one, steps, chunksize=1)}
    for name in given.names:
        lengths = [round(length * full[name]) for length in LENGTHS]
        budget = SHARE * sum(cost[name, size] * sum(lengths) for size, _ in sizes(name)) * len(RATES)
        for pair in range(given.pairs):
            base = {"name": name, "pair": pair, "full": full[name], **common}
            found.append({"kind": "auto", "budget": budget, **base})
            for (size, _), rate, length in product(sizes(name), RATES, LENGTHS):
                found.append({"kind": "static", "size": size, "rate": rate, "length": length, **base})
            if name in TARGETS:
                found.append({"kind": "boosting", **base})
    weight = {"auto": 30.0, "boosting": 3.0}
    return sorted(found, key=lambda job: (job["pair"], -weight.get(job["kind"], 1.0) * job["full"] * (3 if job["name"] in PLAIN else 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--pairs", type=int, default=2, help="divisions of every data set, each with a random seed of its own")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=8.3, help="what has not ended by then is left out")
    parser.add_argument("--short", action="store_true", help="200 steps a run, to see that everything works")
    given = parser.parse_args()
    began = time.monotonic()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, total, failed = [], 0, 0
    with tempfile.TemporaryDirectory() as data, multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        there = write_tables(Path(data))
        given.names = [name for name in given.names if name in there]
        jobs = jobs_of(given, Path(data), pool)
        total = len(jobs)
        results = pool.imap_unordered(one, jobs, chunksize=1)  # a row is written as soon as its job has ended
        with (given.out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            while True:
                left = given.minutes * 60 - (time.monotonic() - began)
                try:
                    rows.append(results.next(timeout=max(0.0, left)))
                except (StopIteration, multiprocessing.TimeoutError):
                    break
                except Exception as error:  # of one job: the others' results are not lost, and the report says how many there are
                    print(f"a job failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    failed += 1
                    continue
                writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in rows[-1].items()})
                file.flush()
        pool.terminate()
    about = {
        "planned": total,
        "made": len(rows),
        "failed": failed,
        "minutes": (time.monotonic() - began) / 60,
        "processes": given.processes,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    import sklearn
    import torch

    about |= {
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
        "load": math.nan if not hasattr(os, "getloadavg") else os.getloadavg()[0],
    }
    (given.out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    if find_spec("matplotlib"):
        write_report(given.out)


if __name__ == "__main__":
    main()
