"""``esper.load_run``: frames, figures and the model of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import esper
from esper.errors import UserError
from esper.tracking.arrow_tables import TABLES


def test_frames_have_what_the_files_have(made: Path) -> None:
    run = esper.load_run(made / "day/run")
    assert (run.name, run.status, run.config["seed"]) == ("mlp-digits", "FINISHED", 7)
    long = pd.read_parquet(made / "day/run/metrics.parquet")
    for name in ("train/loss", "validation/accuracy"):
        recorded = long[long.name == name].set_index("tick").value
        assert run.metrics[name].dropna().to_dict() == recorded.to_dict()
    for name in ("transitions", "gates", "seeds"):
        pd.testing.assert_frame_equal(getattr(run, name), pd.read_parquet(made / f"day/run/{name}.parquet"))
    assert len(run.branches) == len(run.summary["branches"]) > 0


def test_figures_are_drawn_anew_and_shown_as_pictures(made: Path) -> None:
    run = esper.load_run(made / "day/run")
    assert set(run.figures) == {"stages", "learning", "gates"}
    assert run.figures["stages"]._repr_png_().startswith(b"\x89PNG") and run.figures["stages"].figure.axes


def test_the_model_gives_what_the_run_measured(made: Path) -> None:
    run = esper.load_run(made / "day/run")
    model = run.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == run.summary["parameters"]["after"]
    assert model(torch.zeros(2, 64)).shape == (2, 10)


def test_the_report_is_html_in_which_nothing_of_the_run_is_markup(outputs: Path) -> None:
    run = esper.load_run(outputs / "day/run")
    text = run._repr_html_()
    assert ("<table>" in text and "fossilized" in text) or "culled" in text
    run.summary["name"] = "<script>alert(1)</script>"
    run.summary["branches"][0]["site"] = "<b>"
    assert "<script>" not in run._repr_html_() and "&lt;b&gt;" in run._repr_html_()
    assert repr(run).startswith("SavedRun(")


def test_a_run_that_has_not_ended_is_read_as_far_as_it_came(outputs: Path) -> None:
    folder = outputs / "day/run"
    (folder / "summary.json").unlink()
    (folder / "run.lock").write_text('{"config_hash": "x"}\n')
    (folder / ".parts").mkdir()
    for name in TABLES:
        table = pq.read_table(folder / f"{name}.parquet")
        (folder / f"{name}.parquet").unlink()
        for part, keep in enumerate((lambda tick: tick <= 20, lambda tick: 20 < tick <= 30)):
            kept = table.filter([keep(tick) for tick in table["tick"].to_pylist()])
            pq.write_table(kept, folder / ".parts" / f"{name}.0000.{part:06d}.parquet")
    run = esper.load_run(folder)
    assert run.status == "DIED" and run.metrics.index.max() == 30 and run.seeds.tick.max() == 30
    assert run.summary == {} and "DIED" in run._repr_html_() and "learning" in run.figures and run.branches.empty


def test_what_is_no_run_is_refused(tmp_path: Path, outputs: Path) -> None:
    with pytest.raises(UserError, match="is no run's folder"):
        esper.load_run(tmp_path)
    shutil.rmtree(outputs / "day/run/model")
    with pytest.raises(UserError):
        esper.load_run(outputs / "day/run").model()


def test_torch_is_imported_for_the_model_alone(made: Path, checkout: Path) -> None:
    code = (
        "import sys, esper; run = esper.load_run(sys.argv[1]); run.metrics, run.seeds, run.gates, run.figures, run._repr_html_(); "
        "print('torch' in sys.modules); run.model(); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(made / "day/run")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
