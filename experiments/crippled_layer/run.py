"""Do controllers find the one layer that needs growth? A host of which one layer is crippled, so that the right answer is known.

python experiments/crippled_layer/run.py                  # about two minutes with 16 processes; writes results.csv, README.md and a figure
python experiments/crippled_layer/run.py --seeds 1 --pilots 1 --steps 200 --out /tmp/try
python experiments/crippled_layer/run.py --again          # no runs: README.md and the figure once more from results.csv

Every arm may grow six branches. The bandit that begins wiser has the memory of pilots on other data, in which other layers were crippled;
the policy was learnt by esper learn from pilots at random places and by health.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from report import machine, read, summed_up, verdict, write_up  # noqa: E402

__all__ = ["chain", "machine", "main", "summed_up", "verdict", "write_up"]

LAYERS = 6
EVENTS = 6
ALIVE = 4
COMMON = (
    "model=custom",
    "model.target=crippled:Host",
    "task=custom",
    "task.target=crippled:sums",
    "sites.per_site=8",
    "blueprint.hidden=32",
    "optimizer.lr=0.01",
    "lifecycle.training_min=1%",
    "lifecycle.fine_tuning_min=40%",
    "telemetry.every=10",
    "trainer.validate_every=2%",
    "trainer.control=false",
    "tracking=none",
)
_BANDIT = (
    "controller=bandit",
    "controller.germinate_at=5%",
    "controller.every=2%",
    "controller.max_active=6",
    f"controller.most={EVENTS}",
    "controller.blueprints=[mlp]",  # as in the other arms: where to grow is the question here
    "controller.strategies=[linear]",
    "controller.objectives=[shadow]",
)
_POLICY = (
    "controller=policy",
    "controller.germinate_at=5%",
    "controller.every=2%",
    "controller.max_active=6",
    f"controller.most={EVENTS}",
)
_LOCAL = "{germinate_at: 5%, count: 6, max_active: 6}"
ARMS: dict[str, tuple[str, ...]] = {
    "healthy": ("controller=none",),
    "host": ("controller=none",),
    "by_lot": ("controller=random", "controller.earliest=5%", "controller.latest=20%", f"controller.count={EVENTS}"),
    "by_health": ("controller=heuristic", "controller.germinate_at=5%", f"controller.count={EVENTS}", "controller.max_active=6"),
    "by_bandit": _BANDIT,
    "wiser_bandit": _BANDIT,
    "by_probe": ("controller=probe", "controller.germinate_at=5%", "controller.candidates=6", f"controller.most={EVENTS}"),
    "by_allocator": (
        "controller=hierarchical",
        "controller.local=heuristic",
        f"controller.local_settings={_LOCAL}",
        f"controller.most={EVENTS}",
        "controller.max_active=6",
    ),
    "by_policy": _POLICY,
}
TAUGHT_BY = ("by_lot", "by_health")
"""The arms whose pilots the policy is learnt from."""
FIRST, PILOT = 100, 1000
"""The first seed of the study and of the pilots. The settings above were chosen on seeds below 100."""
COLUMNS = ("phase", "arm", "seed", "crippled", "error", "validation_error", "germinated", "there", "kept", "kept_there", "macs", "seconds")
Job = dict[str, Any]


def one(job: Job) -> dict[str, Any]:
    """One run: the seed draws the data and the weights, and says which layer is crippled.

    ``memory`` is a bandit's file, ``weights`` a policy's, and ``folder`` keeps the run for esper learn.
    """
    os.environ["ESPER_ALLOW"] = "crippled"
    from esper.cli.compose import compose
    from esper.running.run import run

    seed, layer = job["seed"], job["seed"] % LAYERS
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMON, *ARMS[job["arm"]], f"seed={seed}", f"+task.args.seed={seed}", f"trainer.steps={job['steps']}", f"output={folder}"]
        words += [f"+model.args.crippled={-1 if job['arm'] == 'healthy' else layer}", f"+model.args.alive={ALIVE}"]
        words += [f"controller.weights={job['weights']}"] if job["arm"] == "by_policy" else []
        config, memory = compose(words), Path(folder) / "memory.json"
        if job.get("memory"):
            if Path(job["memory"]).exists():
                shutil.copy(job["memory"], memory)
            config.controller.memory = str(memory)
        began = time.perf_counter()
        summary = run(config, Path(job.get("folder") or folder) / "run", quiet=True).summary
        if job.get("remember"):
            shutil.copy(memory, job["memory"])
    branches = summary["branches"]
    there = [branch for branch in branches if branch["site"] == f"layer{layer}"]
    return {name: job[name] for name in ("phase", "arm", "seed")} | {
        "crippled": layer,
        "error": summary["metrics"]["final"]["test/error"],
        "validation_error": summary["metrics"]["final"]["validation/error"],
        "germinated": len(branches),
        "there": len(there),
        "kept": sum(branch["stage"] == "FOSSILIZED" for branch in branches),
        "kept_there": sum(branch["stage"] == "FOSSILIZED" for branch in there),
        "macs": summary["macs"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def chain(jobs: list[Job]) -> list[dict[str, Any]]:
    """Runs one after the other: the pilots of a bandit, each of which begins with what the earlier ones have learnt."""
    return [one(job) for job in jobs]


def lessons(pilots: int, steps: int, place: Path) -> list[Job]:
    """The pilots from which the policy is learnt, each in a folder of its own."""
    common = {"phase": "lesson", "steps": steps}
    named = [(arm, PILOT + number) for arm in TAUGHT_BY for number in range(pilots)]
    return [common | {"arm": arm, "seed": seed, "folder": str(place / f"{arm}-{seed}")} for arm, seed in named]


def learnt(jobs: list[Job], target: Path) -> Path:
    """The policy of these pilots, which have run, as a file."""
    from esper.learn.command import main as learn

    learn([*(f"{job['folder']}/run" for job in jobs), f"to={target}"])
    return target


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The pilots, then every arm on every seed."""
    rows: list[dict[str, Any]] = []
    seeds = range(FIRST, FIRST + options.seeds)
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        memory = {"memory": str(Path(folder) / "memory.json"), "steps": options.steps}
        pilots = [{"phase": "pilot", "arm": "wiser_bandit", "seed": PILOT + n, "remember": True} | memory for n in range(options.pilots)]
        remembered = pool.apply_async(chain, (pilots if "wiser_bandit" in options.arms else [],))
        unlearnt = [arm for arm in options.arms if arm not in ("wiser_bandit", "by_policy")]
        jobs = [{"phase": "study", "arm": arm, "seed": seed, "steps": options.steps} for seed in seeds for arm in unlearnt]
        for row in pool.imap_unordered(one, jobs):
            rows.append(row)
            save(rows, options.out)
            print(f"{row['arm']} {row['seed']}: {row['error']:.4f}, {row['there']} of {row['germinated']} there", flush=True)
        rows += remembered.get()
        if "wiser_bandit" in options.arms:
            rows += pool.map(one, [{"phase": "study", "arm": "wiser_bandit", "seed": seed} | memory for seed in seeds])
        if "by_policy" in options.arms:
            taught = lessons(options.pilots, options.steps, Path(folder))
            rows += pool.map(one, taught)
            known = {"weights": str(learnt(taught, Path(folder) / "policy.safetensors")), "steps": options.steps}
            rows += pool.map(one, [{"phase": "study", "arm": "by_policy", "seed": seed} | known for seed in seeds])
    return rows


def save(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the results so far, so that a study that is stopped has some."""
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["phase"], list(ARMS).index(row["arm"]), row["seed"])))


def main(arguments: list[str] | None = None) -> int:
    """Run, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=18)
    parser.add_argument("--pilots", type=int, default=18)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--again", action="store_true", help="no runs: the README and the figure once more from results.csv")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.again:
        began = time.perf_counter()
        save(measure(options), options.out)
        seconds = time.perf_counter() - began
        given = f"--seeds {options.seeds} --pilots {options.pilots} --steps {options.steps}"
        machine(options.out, given, f"{seconds:.0f} s with {options.processes} processes")
    print(write_up(read(options.out / "results.csv"), options.out, LAYERS, EVENTS, list(ARMS)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
