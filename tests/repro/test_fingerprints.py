"""Same config and seed: same bits, in one process and in two; every experiment file repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from esper.cli.compose import compose
from esper.running.run import run

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "experiment"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BRIEF = ["trainer.steps=80", "tracking=none", "trainer.control=false", "trainer.validate_every=50%"]
GROWS = ["controller=scheduled", "controller.script=[{at: 2step, command: germinate, seeds: [0]}]"]


def summary(words: list[str], folder: Path) -> dict[str, Any]:
    config = compose([*words, f"output={folder}"])
    return dict(run(config, folder / "run", quiet=True).summary)


def first_values(experiment: str) -> list[str]:
    """The first value of each key that the file sweeps, as overrides."""
    swept = OmegaConf.select(OmegaConf.load(FOLDER / f"{experiment}.yaml"), "hydra.sweeper.params") or {}
    values = {key: "0" if str(value).startswith("range(") else str(value).split(",")[0] for key, value in swept.items()}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_file_runs_and_repeats_its_fingerprint(experiment: str, tmp_path: Path):
    words = [f"experiment={experiment}", *first_values(experiment), *BRIEF]
    first, second = (summary(words, tmp_path / name) for name in ("first", "second"))
    assert first["status"] == "FINISHED" and first["steps"] == 80
    assert first["fingerprint"] == second["fingerprint"]


RUNS: dict[str, list[str]] = {
    "mlp": ["grafting=performance"],
    "cnn": ["model=cnn", "model.norm=batch", "blueprint=conv", "optimizer=sgd", "scheduler=warmup_cosine", "trainer.accumulate=2"],
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
