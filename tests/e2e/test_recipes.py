"""Every recipe of the README and of ``esper --help`` is run as it is written, in fewer steps; a new one cannot be forgotten."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.cli.help import RECIPES
from esper.cli.programs import PROGRAMS
from tests.here import here
from tests.resume.conftest import copied

pytestmark = pytest.mark.e2e
README = Path(__file__).parents[2] / "README.md"

#: Few steps, few looks at the validation set, no host alone.
SHORT = ("trainer.steps=20", "trainer.batch_size=16", "trainer.validate_every=50%", "trainer.control=false")

#: Stands for the folder of a run in a command that has been split into words.
FOLDER = "RUN_FOLDER"

#: A run that leaves checkpoints.
KEPT = ("trainer.checkpoint_every=25%", "tracking=csv")

#: Sweeps are many processes: ``test_sweep_recipes`` runs them.
SWEEPS = ("experiment=", "-m ", "--multirun ", "compare sweep=")


def written() -> list[str]:
    """The commands of both tables; ``debug=overfit`` beside a command of ``esper`` is one too."""
    section = README.read_text(encoding="utf-8").partition("## Recipes")[2].partition("\n## ")[0].partition("```")[0]
    found = [*RECIPES]
    for row in re.findall(r"^\| .* \| (.*) \|$", section, re.MULTILINE):
        found += re.findall(r"`([^`]+)`", row)
    return list(dict.fromkeys(one if re.match(r"([A-Z_]+=\S+ )*(esper|mlflow|torchrun)\b", one) else f"esper {one}" for one in found))


COMMANDS = [one for one in written() if not any(part in one for part in SWEEPS)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the recipes are run, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("recipes")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run_folder(workshop: Path) -> Path:
    """A finished run to be exported, compared and gone on with."""
    done = here(*SHORT, *KEPT, "output=before")
    assert done.returncode == 0, done.stderr
    (path,) = (workshop / "before").glob("*/*/summary.json")
    return path.parent


def ended(workshop: Path, before: set[Path]) -> list[dict[str, object]]:
    """The summaries that a command wrote."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in {*workshop.glob("outputs/*/*/summary.json")} - before]


def test_the_tables_are_found() -> None:
    assert len(written()) > 20 and "esper seed=3" in COMMANDS and "esper debug=nan" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_does_what_it_says(command: str, workshop: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as where a user starts it
    name, *words = shlex.split(command.replace("<run folder>", FOLDER).replace("<run or sweep>", FOLDER))
    while name.partition("=")[0].isupper():
        monkeypatch.setenv(*name.split("=", 1))
        name, *words = words
    if name == "mlflow":
        return stores_lie_where_it_looks(words, workshop)
    if "resume=auto" in words or "resume=<run folder>" in command:
        shutil.rmtree(workshop / "outputs" / "day", ignore_errors=True)
        killed = copied(run_folder, workshop / "outputs", until=5)
        (killed / "summary.json").unlink()
        words = [word.replace(FOLDER, str(killed)) for word in words]
        words += [*SHORT, *KEPT] if words == ["resume=auto"] else []  # it looks for a run of this configuration
    elif words[:2] == ["compare", "runs"]:
        rows = [f"{lr},{seed},{0.9 + lr + seed / 1_000}" for lr in (0.1, 0.01) for seed in range(6)]
        (workshop / "runs.csv").write_text("\n".join(["lr,seed,val_acc", *rows]))
    elif words[:1] == ["auto"]:
        words = [word if not word.startswith("budget=") else "budget=5e8macs" for word in words]
    elif "task=table" in words:
        rows = [f"{row % 7},{'ab'[row % 2]},{'xy'[row % 7 > 3]}" for row in range(80)]
        (workshop / "data.csv").write_text("\n".join(["number,letter,column", *rows]))
        words += lessened(words)
    elif words[:1] == ["diff"]:
        words[1:] = [str(run_folder), str(run_folder)]
    elif words in (["watch"], ["watch", "--web"]):
        done = here(*words)
        assert done.returncode == 2 and "Nothing is under way" in done.stderr, "of a run that goes on: tests/watch"
        return None
    elif words[:2] == ["bus", "status"]:
        done = here("bus", "status", str(run_folder))
        assert done.returncode == 2 and "bus=embedded" in done.stderr, "a run without a server has none to look into"
        return None
    else:
        words = [word.replace(FOLDER, str(run_folder)) for word in words]
        if not words or words[0] not in PROGRAMS or words[0] == "check":
            words += lessened(words)
    before = {*workshop.glob("outputs/*/*/summary.json")}
    done = here(*words)
    if "kernel=triton" in words:
        assert done.returncode == 2 and "no CUDA GPU was found" in done.stderr
        return None
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert all(summary["status"] == "FINISHED" for summary in ended(workshop, before))
    trains = (not words or words[0] not in PROGRAMS) and "--cfg" not in words
    assert bool(ended(workshop, before)) is trains
    return None


def lessened(words: list[str]) -> list[str]:
    """What makes a recipe short. Where neither host nor task is another one, MLflow would hear nothing new: plain files instead."""
    less = [word for word in SHORT if word.partition("=")[0] not in {given.partition("=")[0] for given in words}]
    if "task.path=python" in words:
        less += ["task.cache=cache", "task.held_out_bytes=5000"]
    elif "task=text" in words:
        less.append("task.held_out=0.005")
    same = words and not any(word.startswith(("task=", "model=", "tracking=")) for word in words)
    return less + (["tracking=csv"] if same else [])


def stores_lie_where_it_looks(words: list[str], workshop: Path) -> None:
    """MLflow's interface is not started; its command line and the store that it would show are there."""
    import click
    import mlflow.cli
    from mlflow.tracking import MlflowClient

    if not (workshop / "outputs" / "mlflow.db").exists():
        assert here(*SHORT, "tracking.model=false", "tracking.figures=false").returncode == 0
    program, *options = words
    known = mlflow.cli.cli.get_command(click.Context(mlflow.cli.cli), program)
    assert known is not None
    given = known.make_context(program, options).params
    client = MlflowClient(given["backend_store_uri"])
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert runs and {run.info.status for run in runs} == {"FINISHED"}
