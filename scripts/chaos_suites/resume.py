"""`scripts/chaos resume`: runs killed with SIGKILL at random moments and resumed must end as undisturbed ones do.

Goes over hosts, tasks, strategies, controllers, objectives, buses and trackers; some runs are killed again after they were
resumed. Compared are the fingerprint, ``summary.json`` but for wall time, every row of the four Parquet files and of the CSV
files, and the history of the MLflow run. The undisturbed runs must grow something, of every host at least one branch to the
end, or a late kill would find nothing to spoil. Writes what came of it to ``scripts/chaos_suites/resume.json``, where there is a
GPU (then the runs are on it) to ``resume_cuda.json``; the exit code is 1 when anything differed.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {False: Path(__file__).with_suffix(".json"), True: Path(__file__).with_name("resume_cuda.json")}
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from esper.checkpoint import disk  # noqa: E402
from esper.cli.compose import compose  # noqa: E402
from esper.config import RootConfig  # noqa: E402
from esper.lifecycle import Stage  # noqa: E402
from esper.report.summary_file import read_summary  # noqa: E402
from esper.tracking import MlflowConfig  # noqa: E402
from tests.resume import killing  # noqa: E402

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
LEARNING = ("lifecycle.gain=0.0001", "lifecycle.significance=0.5", "optimizer.branch_lr=0.03")  # so that branches last in short runs
CNN = ("model=cnn", "trainer.steps=100", "trainer.batch_size=16", *LEARNING)
TRANSFORMER = (
    "task=text",
    "task.path={text}",
    "task.context=32",
    "task.held_out=0.005",
    "model=transformer",
    "model.width=32",
    "model.depth=2",
    "model.dropout=0.1",
    "optimizer.lr=0.01",
    "trainer.steps=100",
    "trainer.batch_size=8",
    "lifecycle.judge_every=10%",
    *LEARNING,
)
SCRIPT = (
    "{at: 10%, command: germinate, site: fc1, seeds: [0, 1]}",
    "{at: 12%, command: germinate, site: fc2, strategy: drift}",
    "{at: 15%, command: pause, site: fc1, stage: grafting}",
    "{at: 18%, command: resume, site: fc1, stage: grafting}",
    "{at: 18%, command: change_strategy, site: fc2, stage: grafting, strategy: momentum}",
    "{at: 25%, command: germinate, site: inputs, blueprint: low_rank}",
    "{at: 26%, command: cancel, site: inputs, seeds: [0]}",
    "{at: 28%, command: set_stage, site: inputs, seeds: [1], target: culled}",
    "{at: 40%, command: set_stage, site: fc1, seeds: [1], target: culled}",  # refused: it is too young in its stage
    "{at: 50%, command: report}",
)
RUNS: dict[str, tuple[str, ...]] = {
    "mlp linear heuristic": (),
    "mlp drift random": ("grafting=drift", "controller=random"),
    "mlp momentum heuristic sgd": ("grafting=momentum", "optimizer=sgd", "optimizer.lr=0.05", *LEARNING),
    "mlp adaptive random": ("grafting=adaptive", "controller=random"),
    "mlp stability plateau": ("grafting=stability", "controller.plateau=5%"),
    "mlp grad_norm functional": ("grafting=grad_norm", "lifecycle.objective=functional_gradient"),
    "mlp performance reconstruction": ("grafting=performance", "lifecycle.objective=reconstruction"),
    "mlp none": ("controller=none",),
    "mlp scheduled": ("controller=scheduled", f"controller.script=[{','.join(SCRIPT)}]"),
    "mlp epochs, low rank": (
        "lifecycle.clock=epoch",
        "blueprint=low_rank",
        "trainer.batch_size=512",
        "trainer.steps=120",
        "controller.embargo=5step",
        "lifecycle.embargo=5%",
    ),
    "mlp workers, accumulation": ("trainer.num_workers=1", "trainer.accumulate=2"),
    "mlp whose never-grown host is kept": (
        *("controller=random", "grafting=adaptive", "seed=3"),
        *("trainer.control=true", "trainer.keep=better"),
    ),
    "mlp embedded server": ("bus=embedded",),
    "mlp mlflow": (
        "tracking=mlflow",
        "tracking.figures=false",
        "tracking.model=false",
        "tracking.system_s=0",
        "tracking.points=30",
        "trainer.steps=300",
    ),
    "cnn conv linear": (*CNN, "blueprint=conv", "sites.per_site=2"),
    "cnn block drift": (*CNN, "blueprint=block", "sites.per_site=1", "grafting=drift", "optimizer.branch_lr=0.01"),
    "cnn conv adaptive": (*CNN, "blueprint=conv", "sites.per_site=2", "grafting=adaptive"),
    "transformer low rank stability": (*TRANSFORMER, "blueprint=low_rank", "sites.per_site=2", "grafting=stability"),
    "transformer low rank momentum": (*TRANSFORMER, "blueprint=low_rank", "sites.per_site=2", "grafting=momentum"),
    "transformer block random": (
        *TRANSFORMER,
        "blueprint=block",
        "sites.per_site=1",
        "controller=random",
        "optimizer.branch_lr=0.01",
        "lifecycle.readiness=-1.0",
    ),
}
HOSTS = ("mlp", "cnn", "transformer")  # a run's name begins with its host's


def main(arguments: list[str]) -> int:
    """Kill, resume, compare; 0 when nothing differed."""
    parser = argparse.ArgumentParser(prog="scripts/chaos resume", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills in all; every chosen run is killed at least once")
    parser.add_argument("--each", type=int, default=5, help="kills of one run: at any moment of it, then of what was left of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name holds one of these")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        report = _kill_them(options, Path(place))
    print(json.dumps(report, indent=2))
    return 0 if report["differences"] == 0 else 1


def _kill_them(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Kills the chosen runs in turn, as often as asked; the report, which is also written after every run."""
    lot, began = random.Random(options.seed), time.monotonic()
    (place / "text.txt").write_text(_language(), encoding="utf-8")
    chosen = [name for name in RUNS if any(part in name for part in options.only)]
    references = {name: _reference(name, place, place / f"reference-{number}") for number, name in enumerate(chosen)}
    for host in HOSTS:
        kept = [reference.fossilized for name, reference in references.items() if name.startswith(host)]
        assert not kept or any(kept), f"no run of the host {host} fossilized a branch: its late kills would spoil nothing"
    results = {name: Result() for name in chosen}
    while True:
        report = _report(options, references, results, time.monotonic() - began)
        if not options.dry:  # after every run, so that an interrupted suite leaves what it found
            RESULTS[torch.cuda.is_available()].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        name = min(chosen, key=lambda key: results[key].runs)
        if report["kills"] >= options.kills and results[name].runs:
            return report
        _one(name, references[name], place / "case", lot, options.each, results[name])


@dataclass
class Reference:
    """An undisturbed run: how long it took and what it grew, ``furthest`` the last stage that any branch came to."""

    config: RootConfig
    folder: Path
    seconds: float
    germinated: int
    fossilized: int
    furthest: str
    device: str


@dataclass
class Result:
    """What came of the kills of one kind of run."""

    kills: int = 0
    runs: int = 0
    from_checkpoint: int = 0
    differences: list[str] = field(default_factory=list)


def _reference(name: str, place: Path, output: Path) -> Reference:
    """The undisturbed run, which must have grown something to be worth killing."""
    words = [word.replace("{text}", str(place / "text.txt")) for word in RUNS[name]]
    config, folder = compose([*SHORT, *words, f"output={output}"]), output / "day" / "run"
    folder.mkdir(parents=True)
    done = killing.child(lambda: killing.start(config, folder), output / "log")
    assert done.code == 0, f"{name}: {(output / 'log').read_text()}"
    if isinstance(config.tracking, MlflowConfig):
        assert killing.history(output)["runs"] == ["FINISHED"], f"{name}: {killing.history(output)['runs']}"
    told = read_summary(folder)
    seeds, branches, environment = told["seeds"], told.get("grown", told)["branches"], told["environment"]
    assert config.trainer.keep == "grown" or "kept" in told, f"{name}: growing paid, so nothing takes its place"
    passed = [Stage[stage] for branch in branches for stage, _ in branch["path"]]
    furthest = max((stage for stage in passed if stage <= Stage.FOSSILIZED), default=Stage.DORMANT)
    assert furthest >= Stage.GRAFTING or config.controller.name == "none", f"{name}: nothing was grafted, {seeds}"
    return Reference(config, folder, done.seconds, seeds["germinated"], seeds["fossilized"], furthest.name, environment["gpu"] or "cpu")


def _one(name: str, reference: Reference, output: Path, lot: random.Random, each: int, result: Result) -> None:
    """One run killed up to ``each`` times, and resumed until it ends."""
    shutil.rmtree(output, ignore_errors=True)
    config, folder = replace(reference.config, output=str(output)), output / "day" / "run"
    folder.mkdir(parents=True)
    log, moments, work, found = output / "log", [], killing.start, []
    for attempt in range(each + 1):
        kept = disk.checkpoints(folder / disk.FOLDER)
        result.from_checkpoint += attempt > 0 and bool(kept)
        when = _moment(reference, folder, lot, int(kept[-1].name) if kept else 0) if attempt < each else {}
        lived = killing.child(lambda work=work: work(config, folder), log, **when)
        if lived.code == 0:
            break
        if lived.code != -9:
            found.append(f"exit code {lived.code}: {log.read_text()[-600:]}")
            break
        moments.append(round(lived.seconds, 3))
        work = killing.go_on
    result.kills += len(moments)
    result.runs += 1
    if killing.ended(folder):
        found += killing.differences(folder, reference.folder)
        if isinstance(config.tracking, MlflowConfig):
            found += killing.different_histories(output, Path(reference.config.output))
    result.differences += [f"{name}, killed at {moments}: {text}" for text in found]
    print(f"{name}: killed at {moments} of {reference.seconds:.2f} s, {'NOT THE SAME' if found else 'same'}", file=sys.stderr)


def _moment(reference: Reference, folder: Path, lot: random.Random, done: int) -> dict[str, Any]:
    """When a run dies: at any moment of it, or (every other time) soon after a step whose checkpoint is on disk.

    A run that takes long to begin would otherwise nearly always die before it has learnt anything.
    """
    if lot.random() < 0.5:
        return {"kill_after_s": lot.uniform(0.0, 0.7 * reference.seconds)}
    step, wait = lot.uniform(done, 0.95 * reference.config.trainer.steps), lot.uniform(0.0, 0.15 * reference.seconds)
    reached, since = killing.reached(folder, round(step)), [0.0]

    def due() -> bool:
        since[0] = since[0] or (time.monotonic() if reached() else 0.0)
        return bool(since[0]) and time.monotonic() - since[0] >= wait

    return {"kill_when": due}


def _language() -> str:
    """A text that a small network learns something of in a hundred steps: twelve words of eight letters, drawn at random."""
    lot = random.Random(0)
    words = ["".join(lot.choice("abcdefgh") for _ in range(lot.randrange(2, 5))) for _ in range(12)]
    return " ".join(lot.choice(words) for _ in range(60_000))


def _report(options: argparse.Namespace, references: dict[str, Reference], results: dict[str, Result], seconds: float) -> dict[str, Any]:
    undisturbed = {
        name: {"germinated": found.germinated, "fossilized": found.fossilized, "furthest": found.furthest}
        for name, found in references.items()
    }
    return {
        "command": f"scripts/chaos resume --kills {options.kills} --seed {options.seed}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": ", ".join(sorted({found.device for found in references.values()})),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "kills": sum(result.kills for result in results.values()),
        "runs": sum(result.runs for result in results.values()),
        "resumed_from_checkpoint": sum(result.from_checkpoint for result in results.values()),
        "differences": sum(len(result.differences) for result in results.values()),
        "by_run": {name: {"undisturbed": undisturbed[name], **asdict(result)} for name, result in results.items()},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
