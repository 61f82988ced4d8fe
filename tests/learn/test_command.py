"""``esper learn`` as a user calls it: from real runs to a policy that decides in another one, and clear sentences for odd input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from growing import SHORT_LIVES

from esper.cli.compose import compose
from esper.cli.resume import resume
from esper.compare.fingerprint import same_bits
from esper.controllers.policy.network import GERMINATE
from esper.controllers.policy.situation import RUN, SEED, SITE
from esper.errors import UserError
from esper.learn.command import main
from esper.learn.examples import Replay
from esper.learn.recorded import started, ticks
from esper.running.run import run
from tests.controllers.policies import saved
from tests.resume.conftest import copied

SHORT = [*SHORT_LIVES, "tracking=none"]
LOT = ("controller=random", "controller.count=6", "controller.earliest=10%", "controller.latest=40%")
AT = ("controller.germinate_at=10%", "controller.every=5%", "controller.until=90%", "controller.embargo=2%")


def trained(folder: Path, *words: str) -> Path:
    run(compose([*SHORT, f"output={folder.parent}", *words]), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, whole_runs: None) -> Path:
    """The outputs of three runs that germinated by lot."""
    place = tmp_path_factory.mktemp("outputs")
    for seed in range(3):  # all of the same name
        trained(place / "day" / f"run{seed}", *LOT, f"seed={seed}", "name=same")
    return place


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learnt is the business of test_training."""
    for passes in ("IMITATION", "IMPROVEMENT"):
        monkeypatch.setattr(f"esper.learn.training.{passes}", 5)


def test_what_runs_did_becomes_a_policy_that_decides_in_another_run(recorded: Path, tmp_path: Path, capsys: Any):
    """A replay of its record sees what the policy told of its decisions, so it learns from what it will see; and it resumes to the bit."""
    file = tmp_path / "policy.safetensors"
    assert main([f"output={recorded}", f"to={file}"]) == 0
    said = capsys.readouterr().out
    assert "runs          3, 1 of them held out" in said and "18 germinate" in said and "by lot" in said and "predictions   off by" in said
    words = ("controller=policy", f"controller.weights={file}", *AT, "controller.max_active=6", "controller.tolerance=100", "seed=7")
    whole = trained(tmp_path / "whole" / "day" / "run", *words)
    rows = [row for row in pq.read_table(whole / "transitions.parquet").to_pylist() if row["why"] and row["target"] == "GERMINATED"]
    seen = [one for one in Replay(started(whole)).of(ticks(whole)) if one.kind == GERMINATE]
    assert len(seen) == len(rows) > 1
    for row, one in zip(rows, seen, strict=True):
        told = dict.fromkeys((*RUN, *SITE, *SEED), 0.0) | json.loads(row["why"])["features"]
        values = [*one.situation.run, *one.situation.site[one.site], *one.seeds[one.seed]]
        assert [told[name] for name in (*RUN, *SITE, *SEED)] == pytest.approx(values, abs=1e-5), row
    folder = copied(whole, tmp_path / "again", until=40)
    file.unlink()
    saved(tmp_path)  # the file is another one by now
    start = resume(folder)
    run(start.config, start.folder, quiet=True, state=start.state)
    assert same_bits(folder, whole)
    assert pq.read_table(folder / "transitions.parquet").equals(pq.read_table(whole / "transitions.parquet"))


def test_the_same_runs_give_the_same_file_named_one_by_one_or_not(recorded: Path, tmp_path: Path):
    named = [str(recorded / "day" / f"run{seed}") for seed in range(3)]
    for target, words in (("all", [f"output={recorded}"]), ("named", named)):
        main([*words, f"to={tmp_path / target}.safetensors"])
    assert (tmp_path / "all.safetensors").read_bytes() == (tmp_path / "named.safetensors").read_bytes()


@pytest.mark.usefixtures("whole_runs")
def test_runs_without_what_is_needed_are_left_out_with_the_reason_or_refused(recorded: Path, tmp_path: Path, capsys: Any):
    place = tmp_path / "outputs"
    shutil.copytree(recorded, place)
    (place / "day" / "run0" / "started.json").unlink()
    main([f"output={place}", f"to={tmp_path / 'policy.safetensors'}"])
    assert "1 left out: " in (said := capsys.readouterr().out) and "run0: it has no started.json, which names its sites" in said
    (place / "day" / "run1" / "started.json").write_text("{")
    with pytest.raises(UserError, match=r"6 germinations by a controller in 1 run, .* needs 8 in 2 runs .*2 left out: .*is damaged"):
        main([f"output={place}", f"to={tmp_path / 'none.safetensors'}"])
    assert not (tmp_path / "none.safetensors").exists()


def test_one_decision_is_too_little_to_learn_from(tmp_path: Path, whole_runs: None):
    folder = trained(tmp_path / "day" / "run", *LOT[:1], "controller.count=1")
    with pytest.raises(UserError, match="1 germination by a controller in 1 run, and a policy needs 8 in 2 runs at least"):
        main([str(folder), f"to={tmp_path / 'policy.safetensors'}"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "There is no finished run in .*; train some first"),
        (["to=policy.pt"], r"to=policy\.pt is not accepted: name a file that ends in \.safetensors"),
        (["to=nowhere/at/all/policy.safetensors"], "there is no folder"),
        (["output=policy.safetensors"], r"output is the folder of all outputs; name the policy's file by to=policy\.safetensors"),
        (["seed=x"], "seed=x is not accepted"),
        (["sede=1"], "did you mean"),
        (["a run that is not there"], "There is no run or sweep"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, text: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(UserError, match=text):
        main(words)
