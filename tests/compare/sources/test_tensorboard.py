"""Event files as torch writes them, in both of its forms, read with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.compare.sources.open_store import opened
from esper.compare.sources.selection import Selection, gather

pytestmark = pytest.mark.usefixtures("heavy_libraries")


def write_events(folder: Path, values: list[float], tensors: bool = False, hparams: dict[str, float | str] | None = None) -> None:
    """The scalar ``acc`` step by step, as a simple value or, as TensorFlow 2 does, as a tensor; and the hyperparameters."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        if hparams is not None:
            writer.add_hparams(hparams, {"hparam/acc": values[-1]}, run_name=".")
        for step, value in enumerate(values):
            writer.add_scalar("acc", value, step, walltime=1_700_000_000.0 + step, new_style=tensors)


def test_a_folder_of_runs_with_hyperparameters_and_names(tmp_path: Path) -> None:
    write_events(tmp_path / "adam" / "seed0", [0.125, 0.5], hparams={"lr": 0.1, "opt": "adam"})
    write_events(tmp_path / "adam" / "seed1", [0.25, 0.75, 0.625], tensors=True)
    write_events(tmp_path / "sgd" / "seed0", [0.25])
    (tmp_path / "adam" / "seed1" / "hparams.yaml").write_text("lr: 0.2\nnet:\n  width: 8\n")
    (tmp_path / "sgd" / "seed0" / "hparams.yaml").write_text("!!python/object:os.system {}\n")
    columns = {"arm": ("name.arm",), "metric": "acc", "names": "{arm}/seed{seed}"}
    with opened(str(tmp_path), (), ["acc"]) as table:
        found, best = (gather(table, Selection(**more, **columns), "max") for more in ({"pair": "name.seed"}, {"take": "best"}))  # type: ignore[arg-type]
        rows = table.frame.set_index("run_name")
    assert {(run.arm, run.seed): run.value for run in found.runs} == {("adam", 0): 0.5, ("adam", 1): 0.625, ("sgd", 0): 0.25}
    assert [run.value for run in best.runs if run.arm == "adam"] == [0.5, 0.75]
    assert list(rows["params.lr"])[:2] == [0.1, 0.2] and rows.loc["adam/seed0", "params.opt"] == "adam"
    assert rows.loc["adam/seed1", "params.net.width"] == 8
    assert found.started["sgd/seed0"] == 1_700_000_000.0 and found.curves is not None and len(found.curves) == 6
