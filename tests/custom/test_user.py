"""Everything a user brings, from an empty folder with the wheel installed: no fork, no checkout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

User = Callable[..., Any]
OWN = (
    "model=custom",
    "model.target=my_pkg.nets:MyNet",
    "model.args.width=12",
    "blueprint=custom",
    "blueprint.target=my_pkg.branches:Sine",
    "grafting=custom",
    "grafting.target=my_pkg.ramps:Calm",
    "grafting.args.patience=2",
    "controller=custom",
    "controller.target=my_pkg.gardener:Gardener",
    "controller.args.every=10",
)
QUICK = ("debug=tiny", "trainer.control=false")


def summary(home: Path, output: str) -> dict[str, Any]:
    """Of the only run in the folder ``output``."""
    (path,) = (home / output).glob("*/*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_wheel_carries_the_options_and_runs_without_the_checkout(user: User, installed: Path, home: Path) -> None:
    before = {path.name for path in home.iterdir()}  # other tests share the folder
    shown = user("--help")
    assert shown.returncode == 0, shown.stderr
    assert (installed / "esper" / "conf" / "config.yaml").is_file()
    composed = user("--cfg", "job", *OWN)
    assert composed.returncode == 0, composed.stderr
    assert "my_pkg.nets:MyNet" in composed.stdout and "patience: 2" in composed.stdout
    assert {path.name for path in home.iterdir()} <= before | {"__pycache__", "outputs"}


def test_own_model_blueprint_strategy_and_controller_train_export_and_start_the_next_run(user: User, home: Path) -> None:
    ran = user(*OWN, *QUICK, "output=first", "sites.match=[fc1,fc2]")
    assert ran.returncode == 0, ran.stderr
    told = summary(home, "first")
    assert told["status"] == "FINISHED"
    assert {branch["blueprint"] for branch in told["branches"]} == {"sine"}
    assert {branch["strategy"] for branch in told["branches"]} == {"custom"}
    assert any(name == "GRAFTING" for branch in told["branches"] for name, _ in branch["path"])
    run = Path(told["output"])
    exported = user("export", f"run={run}", "to=given")
    assert exported.returncode == 0, exported.stderr
    program = torch.export.load(home / "given" / "model.pt2").module()
    assert program(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    again = user(*OWN[:5], *QUICK, "output=second", f"model.weights={run}", "trainer.freeze_host=true", "controller=none")
    assert again.returncode == 0, again.stderr
    first, second = (summary(home, name)["metrics"]["final"]["test/accuracy"] for name in ("first", "second"))
    assert second == first  # nothing grew, and the host was frozen


def test_own_data(user: User, home: Path) -> None:
    ran = user(*QUICK, "output=waves", "task=custom", "task.target=my_pkg.data:waves", "task.args.noise=0.05", "tracking=none")
    assert ran.returncode == 0, ran.stderr
    assert set(summary(home, "waves")["metrics"]["final"]) == {
        f"{which}/{name}" for which in ("validation", "test") for name in ("loss", "within")
    }


def test_own_options_and_experiments(user: User, home: Path) -> None:
    (home / "conf" / "model").mkdir(parents=True)
    (home / "conf" / "experiment").mkdir()
    (home / "conf" / "model" / "mine.yaml").write_text('name: custom\ntarget: my_pkg.nets:MyNet\nargs: {width: 9}\nweights: ""\n')
    (home / "conf" / "experiment" / "narrow.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: mine\n\nseed: 5\n")
    (home / "esper.yaml").write_text("allow: [my_pkg]\n")
    ran = user("--config-dir", "conf", "experiment=narrow", *QUICK, "output=own", "tracking=none", allow="")
    (home / "esper.yaml").unlink()
    assert ran.returncode == 0, ran.stderr
    assert summary(home, "own")["seed"] == 5
    assert summary(home, "own")["parameters"]["before"] == 64 * 9 + 9 + 9 * 9 + 9 + 9 * 10 + 10
    shown = user("--config-dir", "conf", "--help")
    assert "mine" in shown.stdout and "narrow" in shown.stdout


def test_what_is_not_allowed_not_there_or_does_not_fit_is_refused_in_words(user: User, home: Path) -> None:
    (home / "odd" / "modell").mkdir(parents=True)
    (home / "odd" / "modell" / "x.yaml").write_text("name: custom\n")
    refused = [
        (("model=custom", "model.target=os:system"), "would import 'os', which nobody allowed: set ESPER_ALLOW=os"),
        (("--config-dir", "odd"), "modell/x.yaml belongs to no group"),
    ]
    for words, sentence in refused:
        told = user(*words)
        assert told.returncode == 2 and sentence in told.stderr and "Traceback" not in told.stderr, told.stderr
