"""Runs that another program put into a real MLflow store: judged, planned, and the verdict kept there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from esper.compare.plan_command import main as plan
from esper.compare.runs_command import main as runs
from esper.compare.sources.mlflow_reader import ClientReader, reading
from esper.compare.sources.mlflow_runs import mlflow_runs
from esper.errors import UserError

pytestmark = pytest.mark.usefixtures("heavy_libraries")

Store, Said = tuple[str, Any], pytest.CaptureFixture[str]
LRS, PAIRS = (0.1, 0.01), 7


def train(client: Any, experiment: str, start: int | None = None, seeds: range = range(PAIRS)) -> None:
    """What a sweep of somebody's own logs: parameters, a metric over three steps, and one run that is under way."""
    for lr in LRS:
        for seed in seeds:
            run = client.create_run(experiment, start_time=start, run_name=f"lr{lr}-s{seed}").info.run_id
            client.log_param(run, "lr", str(lr))
            client.log_param(run, "seed", str(seed))
            for step in range(3):
                client.log_metric(run, "val_acc", 0.5 + 0.1 * step * (step < 2) + 0.05 * (lr == 0.1) + 0.003 * (seed % 3), step=step)
            client.set_terminated(run)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    from esper.tracking.mlflow_store import quiet_client

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mine.db"
    client = quiet_client(uri)
    train(client, client.create_experiment("lr", artifact_location=(folder / "artifacts").as_uri()))
    client.log_param(client.create_run(client.create_experiment("other")).info.run_id, "lr", "9")
    return uri, client


WORDS = ("experiment=lr", "arm=params.lr", "pair=params.seed", "metric=val_acc", "figures=false")


def test_the_runs_of_an_experiment_are_judged(store: Store, tmp_path: Path, capsys: Said) -> None:
    uri, _ = store
    assert runs([f"store={uri}", *WORDS, f"output={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "exploratory: no plan was registered before the runs" in said
    assert "lr=0.1 is better than lr=0.01: val_acc +0.05" in said and "7 pairs" in said
    folder = tmp_path / "compare" / "val_acc-by-params.lr"
    assert {path.name for path in folder.iterdir()} == {f"comparison.{kind}" for kind in ("json", "txt", "md", "tex", "html")}
    assert runs([f"store={uri}", *WORDS, "take=best", "reference=0.1", "cost=params.seed", f"output={tmp_path}"]) == 0
    assert "lr=0.01 is worse than lr=0.1" in " ".join(capsys.readouterr().out.split())


def test_a_server_gives_the_table_that_the_file_gives(store: Store) -> None:
    uri, client = store
    with reading(uri) as direct:
        for experiments in (("lr",), ()):
            tables = [mlflow_runs(reader, uri, experiments, {"val_acc"}) for reader in (direct, ClientReader(client))]
            frames = [table.frame.sort_index(axis=1).sort_values("run_id", ignore_index=True) for table in tables]
            assert (
                frames[0]
                .drop(columns=[c for c in frames[0] if c.startswith("tags.")])
                .equals(frames[1].drop(columns=[c for c in frames[1] if c.startswith("tags.")]))
            )
            histories = [
                table.history("metrics.val_acc").sort_values(["run", "step"], ignore_index=True) for table in tables if table.history
            ]
            assert histories[0].equals(histories[1]) and len(histories[0]) == 42
        with pytest.raises(UserError, match=r"has no experiment 'lrs'; it has .*; did you mean lr\?"):
            mlflow_runs(direct, uri, ("lrs",), ())


def test_a_plan_in_the_store_is_judged_by_and_holds_the_verdict(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, client = store
    place = ["experiment=planned", f"store={uri}"]
    columns = ["arm=params.lr", "arms=0.1,0.01", "pair=params.seed", f"pairs=range(0,{PAIRS})", "metric=val_acc", "reference=0.01"]
    assert plan(["plan=ours", *place, *columns]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "val_acc (max), 1 arm against lr=0.01, 7 pairs" in said
    digest = said.rpartition("digest ")[2].split()[0]
    with pytest.raises(UserError, match="has a plan 'ours' already"):
        plan(["plan=ours", *place, *columns])
    train(client, client.get_experiment_by_name("planned").experiment_id, int(time.time() * 1000) + 5_000)
    again = ["plan=ours", *place, f"output={tmp_path}", "figures=false"]
    assert runs([*again, f"digest={digest}", "record=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "exploratory" not in said and "lr=0.1 is better than lr=0.01" in said
    (run,) = client.search_runs([client.get_experiment_by_name("planned").experiment_id], "tags.`esper.kind` = 'plan'")
    assert (
        run.data.tags["verdict"] == "B better"
        and pytest.approx(next(v for k, v in run.data.metrics.items() if k.endswith("effect"))) == 0.05
    )
    assert "comparison.html" in {one.path for one in client.list_artifacts(run.info.run_id)}
    for words, reason in (
        (["alpha=0.01"], "alpha was 0.05 in the plan and is 0.01 now"),
        (["take=best"], "take was last in the plan and is best now"),
        (["digest=0123"], f"the plan is not the text that was registered: its digest is {digest[:12]}, not 0123"),
    ):
        assert runs([*again, *words]) == 0
        assert reason in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"The store has no plan 'ous'; it has ours; did you mean ours\?"):
        runs(["plan=ous", *again[1:]])
    client.set_tag(run.info.run_id, "esper.plan.0", run.data.tags["esper.plan.0"].replace('"alpha": 0.05', '"alpha": 0.4'))
    assert runs(again) == 0
    assert "the plan is not the text that was registered" in " ".join(capsys.readouterr().out.split())


def test_runs_that_began_before_the_plan_are_no_confirmation(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, _ = store
    words = ["arm=params.lr", "arms=0.1,0.01", "pair=params.seed", "pairs=0..6", "metric=val_acc"]
    file = f"plan={tmp_path}/late.json"
    time.sleep(1.1)  # a plan's time has whole seconds
    assert plan([file, *words]) == 0
    assert runs([file, f"store={uri}", "experiment=lr", f"output={tmp_path}", "figures=false"]) == 0
    assert "14 of 14 runs began before the plan was registered" in " ".join(capsys.readouterr().out.split())


def test_the_verdict_on_runs_without_a_plan_becomes_a_run_of_its_own(store: Store, tmp_path: Path) -> None:
    uri, client = store
    for _ in range(2):  # the second time, the run of the first is there and is no run to judge
        assert runs([f"store={uri}", *WORDS, f"output={tmp_path}", "record=true"]) == 0
    found = client.search_runs([client.get_experiment_by_name("lr").experiment_id], "tags.`esper.kind` = 'verdict'")
    assert len(found) == 2 and found[0].info.status == "FINISHED" and found[0].info.run_name == "val_acc by lr"
    with pytest.raises(UserError, match="record=true keeps the results in an MLflow store"):
        runs([f"store={tmp_path}/t.csv", "arm=a", "metric=acc", "record=true"])


def test_two_runs_for_one_place_are_refused(store: Store, tmp_path: Path) -> None:
    uri, client = store
    experiment = client.create_experiment("twice")
    train(client, experiment, seeds=range(2))
    train(client, experiment, seeds=range(1))
    with pytest.raises(UserError, match=r"Arm 'lr=0\.0?1' has two runs with seed 0 \(\w+, \w+\); delete one, or judge them apart"):
        runs([f"store={uri}", "experiment=twice", *WORDS[1:], f"output={tmp_path}"])
