"""Same config and seed: same bits, in one process and in two; every experiment file repeats itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from esper.cli.compose import compose
from esper.compare.sweep.arms import lay_out
from esper.compare.sweep.dependencies import derive, run_order
from esper.compare.sweep.sweep import PreparedJob
from esper.running.run import run

pytestmark = pytest.mark.usefixtures("whole_runs")

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "experiment"
STUDIES = {"growth_map", "growth_map_adamw", "growth_frontier", "defaults", "reason"}
"""They have several blocks or a large text; ``tests/compare/test_studies.py`` runs their arms."""
EXPERIMENTS = sorted({path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("_quick")} - STUDIES)
BRIEF = ["trainer.steps=80", "tracking=none", "trainer.control=false", "trainer.validate_every=50%"]
BRIEFER = ["trainer.steps=40", *BRIEF[1:], "trainer.checkpoint_every="]
GROWS = ["controller=scheduled", "controller.script=[{at: 2step, command: germinate, seeds: [0]}]"]


def summary(words: list[str], folder: Path) -> dict[str, Any]:
    config = compose([*words, f"output={folder}"])
    return dict(run(config, folder / "run", quiet=True).summary)


def arms_of(experiment: str, folder: Path) -> list[PreparedJob]:
    """One job of every arm that the file sweeps over, composed as the command line would."""
    swept = OmegaConf.select(OmegaConf.load(FOLDER / f"{experiment}.yaml"), "hydra.sweeper.params")
    values = [[f"{key}={value}" for value in str(values).split(",")] for key, values in swept.items() if key != "seed"]
    layout = lay_out([[*words, "seed=0"] for words in itertools.product(*values)], [])
    folders = [folder / str(job.number) for job in layout.jobs]
    configs = [compose([f"experiment={experiment}", *job.overrides, *BRIEFER, f"output={folder}"]) for job in layout.jobs]
    return [PreparedJob(*one) for one in zip(layout.jobs, configs, itertools.repeat({}), folders)]


def all_arms(jobs: list[PreparedJob], name: str) -> dict[str, dict[str, Any]]:
    """The summary of every arm, run in the order in which they take over from each other."""
    done: dict[str, dict[str, Any]] = {}
    for wave in run_order([one.job.arm for one in jobs], jobs[0].config.compare):
        for one in (derive(one, lambda arm, block, seed: done[arm]) for one in jobs if one.job.arm in wave):
            done[one.job.arm] = dict(run(one.config, one.folder / name, quiet=True).summary)
    return done


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_arm_of_every_experiment_file_runs_and_repeats_its_fingerprint(experiment: str, tmp_path: Path):
    jobs = arms_of(experiment, tmp_path)
    first, second = (all_arms(jobs, name) for name in ("first", "second"))
    assert len(first) == len(jobs) >= 2
    assert {told["status"] for told in first.values()} == {"FINISHED"}
    still = {arm for arm, told in first.items() if told["seeds"]["germinated"] == 0}
    assert still <= {"host", "plain", "plain_macs", "cnn_deep", "cnn_deep_macs", "cnn_small"}
    assert {arm: told["fingerprint"] for arm, told in first.items()} == {arm: told["fingerprint"] for arm, told in second.items()}


RUNS: dict[str, list[str]] = {
    "mlp": ["grafting=performance"],
    "cnn": ["model=cnn", "model.norm=batch", "blueprint=conv", "optimizer=sgd", "scheduler=warmup_cosine", "trainer.accumulate=2",
            "trainer.batch_size=16"],
    "transformer": ["model=transformer", "model.width=16", "model.dropout=0.1", "task=text", f"task.path={__file__}", "task.context=16",
                    "task.stretches=10", "task.held_out=0.1", "trainer.batch_size=8", "blueprint=block", "sites.per_site=1"],
    "objective": ["lifecycle.objective=functional_gradient", "trainer.precision=bf16"],
    "epochs": ["lifecycle.clock=epoch", "trainer.steps=0", "trainer.epochs=16", "trainer.batch_size=250", "grafting.ramp=1epoch"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(RUNS))
def test_the_same_config_and_seed_give_the_same_fingerprint(name: str, tmp_path: Path):
    words = [*BRIEF, *GROWS, *RUNS[name]]
    first, second, other = (summary([*words, f"seed={seed}"], tmp_path / str(n)) for n, seed in enumerate((3, 3, 4)))
    assert first["seeds"]["germinated"] > 0, first["refusals"]
    assert first["fingerprint"] == second["fingerprint"] != other["fingerprint"]
    assert first["metrics"] == second["metrics"] and first["macs"] == second["macs"]


def test_two_processes_and_this_one_agree(esper: Any, tmp_path: Path):
    words = [*BRIEF, *GROWS, "seed=3"]
    mine = summary(words, tmp_path / "mine")["fingerprint"]
    for name in ("one", "two"):
        done = esper(*words, f"output={name}")
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / name).glob("*/*/summary.json")
        assert json.loads(path.read_text())["fingerprint"] == mine
