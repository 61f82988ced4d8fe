"""Every command of docs/verdicts.md is run as it is written, on files of the kinds that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esper.compare.statistics.random_draws import generator
from tests.here import here

pytestmark = pytest.mark.usefixtures("heavy_libraries")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
(PYTHON,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LRS = (0.1, 0.01)


def made_up() -> pd.DataFrame:
    """Two learning rates, two tasks, eight seeds, three epochs."""
    rng, rows = generator("docs"), []
    for task, level in (("digits", 0.9), ("mnist1d", 0.6)):
        for seed in range(8):
            shared = rng.normal(0, 0.03)
            for lr in LRS:
                for epoch in range(3):
                    value = level + shared + 0.03 * (lr == 0.1) - 0.1 * np.exp(-epoch) + rng.normal(0, 0.004)
                    rows.append({"task": task, "lr": lr, "seed": seed, "epoch": epoch, "val_acc": value, "seconds": 60 + 5 * rng.random()})
    return pd.DataFrame(rows)


def fill_mlflow(path: Path, frame: pd.DataFrame) -> None:
    from esper.tracking.mlflow_store import quiet_client

    client = quiet_client(f"sqlite:///{path}")
    experiment = client.create_experiment("lr")
    for row in frame.itertuples():
        run = client.create_run(experiment).info.run_id
        client.log_param(run, "lr", row.lr)
        client.log_param(run, "seed", row.seed)
        client.log_metric(run, "val_acc", row.val_acc)
        client.set_terminated(run)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a source of every kind that the page names."""
    from torch.utils.tensorboard import SummaryWriter

    folder, steps = tmp_path_factory.mktemp("verdicts"), made_up()
    last = steps[steps["epoch"] == 2]
    last.drop(columns="epoch").query("task == 'digits'").to_csv(folder / "once.csv", index=False)
    last.drop(columns="epoch").to_csv(folder / "tasks.csv", index=False)
    steps[steps["task"] == "digits"].to_csv(folder / "steps.csv", index=False)
    digits = last[last["task"] == "digits"]
    wandb = {"Name": [f"fresh-{i}" for i in range(len(digits))], "State": "finished", "Created": "2026-03-01T10:00:00.000Z", "Runtime": 61}
    pd.DataFrame(wandb).join(digits[["lr", "seed", "val_acc"]].reset_index(drop=True)).to_csv(folder / "wandb.csv", index=False)
    for name in ("demo.parquet", "demo_configs.parquet"):
        shutil.copy(ROOT / "tests" / "compare" / "sources" / "samples" / name, folder)
    fill_mlflow(folder / "mlflow.db", digits)
    for row in digits.itertuples():
        with SummaryWriter(str(folder / "logs" / ("adam" if row.lr == 0.1 else "sgd") / f"seed{row.seed}")) as writer:
            writer.add_scalar("acc", row.val_acc, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_what_the_page_says(command: str, workshop: Path) -> None:
    shutil.copy(workshop / ("tasks.csv" if "block=task" in command else "once.csv"), workshop / "runs.csv")
    program, *words = shlex.split(command)
    done = here(*words)
    assert program == "esper" and done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    if words[1] == "plan":
        assert "8 pairs find a difference of" in said and re.search(r"registered: \S+, digest [0-9a-f]{64}", said)
        return
    alone = not any(word.startswith(("pair=", "plan=")) for word in words)
    assert ("Cannot tell" if alone else " than ") in said and ("not paired" in said) is alone and "written: outputs/compare/" in said
    if "plan=lr.json" in words:
        assert "nothing shows that the plan came first" in said and "exploratory" not in said


def test_the_python_of_the_page_runs(workshop: Path) -> None:
    shutil.copy(workshop / "tasks.csv", workshop / "runs.csv")
    names: dict[str, object] = {}
    exec(compile(PYTHON, "docs/verdicts.md", "exec"), names)
    assert names["best"] == ["lr=0.1"] * 3 and (workshop / "verdict" / "comparison.html").exists()
