"""``trainer.keep=better``: a host that growing made worse is not what the run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esper.cli.compose import compose
from esper.cli.resume import resume
from esper.compare.fingerprint import same_bits
from esper.errors import UserError
from esper.export.saved_model import load_model
from esper.report.summary_file import read_summary
from esper.running import builders, control_runs
from esper.running.model_selection import CODE, worse_than_alone
from esper.running.run import run
from esper.tracking.run_page import final_values
from esper.trainer.trainer import Outcome, Trainer

pytestmark = pytest.mark.usefixtures("whole_runs")

BRIEF = (
    *("trainer.steps=40", "trainer.validate_every=50%", "trainer.batch_size=16", "tracking=csv", "tracking.figures=false"),
    *("controller=scheduled", "controller.script=[{at: 2step, command: germinate, seeds: [0]}]"),
)
SENTENCE = "growing did not pay here: the never-grown host was kept"


def config(tmp_path: Path, *words: str) -> Any:
    return compose([*BRIEF, f"output={tmp_path}", *words])


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the run's own training (not its controls') end with this validation accuracy."""
    fit = Trainer.fit

    def to(accuracy: float) -> None:
        def spoilt(self: Trainer, between: Any = None, test: bool = True) -> Outcome:
            outcome = fit(self, between, test)
            if between is not None:
                outcome.final["validation/accuracy"] = accuracy
            return outcome

        monkeypatch.setattr(Trainer, "fit", spoilt)

    return to


def never_grown(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the host of a run in which nothing germinates."""
    words = [word for word in BRIEF if not word.startswith("controller")]
    folder = tmp_path / "alone" / "run"
    run(compose([*words, "controller=none", "trainer.control=false", f"output={tmp_path}"]), folder, quiet=True)
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("accuracy", [0.0, math.nan])
def test_where_growing_did_not_pay_the_never_grown_host_is_what_the_run_leaves(
    tmp_path: Path, ending: Any, accuracy: float, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = never_grown(tmp_path)
    ending(accuracy)
    folder = tmp_path / "run"
    result = run(config(tmp_path, "trainer.keep=better"), folder)
    told = json.loads((folder / "summary.json").read_text())
    assert told["kept"]["why"].startswith(SENTENCE) and SENTENCE in " ".join(capsys.readouterr().out.split())
    assert told["metrics"]["final"] == told["control"]["same_steps"] and told["branches"] == []
    assert result.primary == told["control"]["same_steps"]["validation/accuracy"] > 0.0
    assert told["metrics"]["best"]["validation/accuracy"] >= result.primary
    assert told["parameters"]["after"] == told["parameters"]["before"] and told["seeds"]["germinated"] > 0
    assert told["grown"]["branches"] and told["grown"]["fingerprint"] != told["fingerprint"]
    assert [alert["code"] for alert in told["alerts"]] == [CODE] and CODE in (folder / "events.jsonl").read_text()
    left = load_file(folder / "model" / "model.safetensors")
    assert left.keys() == alone.keys() and all(torch.equal(left[name], alone[name]) for name in alone)
    assert load_model(folder).state_dict().keys() == alone.keys()
    logged = dict(final_values(told))
    assert logged["final/validation/accuracy"] == result.primary and "final/as_grown/test/accuracy" in logged


def test_where_growing_paid_nothing_is_otherwise_than_without(tmp_path: Path, ending: Any) -> None:
    ending(1.0)
    words = {"a": ["trainer.keep=better"], "b": []}
    told = [run(config(tmp_path, *words[name]), tmp_path / name, quiet=True).summary for name in words]
    assert "kept" not in told[0] and told[0]["branches"] and not told[0]["alerts"]
    assert told[0].keys() == told[1].keys() and same_bits(tmp_path / "a", tmp_path / "b")


def test_the_grown_host_is_kept_unless_asked_however_bad(tmp_path: Path, ending: Any) -> None:
    ending(0.0)
    told = run(config(tmp_path), tmp_path / "run", quiet=True).summary
    assert "kept" not in told and told["branches"] and told["metrics"]["final"]["validation/accuracy"] == 0.0
    assert not list((tmp_path / "controls").glob("*.safetensors")), "weights are kept only where they are asked for"


@pytest.mark.parametrize(
    ("grown", "alone", "direction", "worse"),
    [
        (0.5, 0.6, "max", True), (0.6, 0.5, "max", False), (0.5, 0.5, "max", False),
        (0.5, 0.6, "min", False), (0.6, 0.5, "min", True),
        (math.nan, 0.1, "max", True), (None, 9.0, "min", True), (math.inf, 9.0, "min", True),
        (0.5, math.nan, "max", False), (0.5, None, "min", False), (math.nan, math.nan, "max", False),
    ],
)  # fmt: skip
def test_what_counts_as_worse(grown: float | None, alone: float | None, direction: str, worse: bool) -> None:
    assert worse_than_alone(grown, alone, direction) is worse


def test_without_a_control_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"^trainer.keep=better compares with the host alone.*set trainer.control=true"):
        compose(["trainer.keep=better", "trainer.control=false"])


def test_a_kept_control_without_its_weights_or_with_others_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    build = builders.build_trainer
    monkeypatch.setattr(builders, "build_trainer", lambda *words, **more: (made.append(1), build(*words, **more))[1])
    composed = config(tmp_path, "trainer.steps=10")
    task = composed.task.build()

    def control(weights: bool) -> dict[str, Any]:
        return control_runs.control_run(composed, task, torch.device("cpu"), 10, tmp_path, weights)

    assert control(False)["metrics"] == control(True)["metrics"] and len(made) == 2
    known = control(True)
    assert control(False) == known and len(made) == 2, "one with weights serves both"
    file = tmp_path / known["weights"]
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    again = control(True)
    assert len(made) == 3 and again["weights"] == known["weights"]
    file.unlink()
    host = control_runs.trained_host(composed, task, control(True), tmp_path)
    assert len(made) == 4 and all(bool(torch.isfinite(value).all()) for value in host.parameters())


def test_a_run_of_before_can_be_resumed_longer_with_it_and_goes_on_from_what_grew(tmp_path: Path, ending: Any) -> None:
    run(config(tmp_path), tmp_path / "run", quiet=True)
    ending(0.0)
    start = resume(tmp_path / "run", ["trainer.steps=60", "trainer.keep=better"])
    told = run(start.config, start.folder, quiet=True, state=start.state).summary
    assert told["kept"]["why"].startswith(SENTENCE) and told["steps"] == 60 and told["grown"]["branches"]
    start = resume(tmp_path / "run", ["trainer.steps=80", "trainer.keep=grown"])
    told = run(start.config, start.folder, quiet=True, state=start.state).summary
    assert "kept" not in told and told["branches"] == read_summary(tmp_path / "run")["branches"] != []
