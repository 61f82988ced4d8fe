"""Sweeps as a person starts them: real workers, a real store, a job that breaks, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from esper.compare.command import main as compare
from esper.compare.fingerprint import _metrics
from esper.errors import UserError
from tests.here import here

SWEEP = ("-m", "optimizer.lr=0.001,0.01", "seed=0,1", "trainer.steps=30", "compare.figures=true")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}

pytestmark = pytest.mark.e2e


def esper(*words: str, code: int = 0, apart: bool = False) -> str:
    """What a sweep says; its jobs and its store have processes of their own, and ``apart`` it has one too."""
    if apart:
        done = subprocess.run([sys.executable, "-m", "esper", *words], capture_output=True, text=True, env=ENVIRONMENT)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("COLUMNS", "120")
            done = here(*words)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def client_of(folder: Path) -> Any:
    from esper.tracking.mlflow_store import quiet_client

    return quiet_client(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep of two arms and two seeds: its outputs, and what it said."""
    folder = tmp_path_factory.mktemp("outputs")
    return folder, esper(*SWEEP, f"output={folder}", f"hydra.sweep.dir={folder}/sweep", apart=True)


def test_a_sweep_says_its_plan_first_and_its_verdict_last(done: tuple[Path, str]) -> None:
    said = done[1]
    assert said.index("Too few pairs") < said.index("1/4") < said.index("against the reference")
    assert "Cannot tell 0.01 from 0.001" in said
    note = json.loads((done[0] / "sweep" / "sweep.json").read_text())
    assert f"  esper compare sweep={note['id']} output={done[0]}\n" in said


def test_parent_and_children_are_in_the_store_with_tags_to_group_by(done: tuple[Path, str]) -> None:
    client = client_of(done[0])
    note = json.loads((done[0] / "sweep" / "sweep.json").read_text())
    parent = client.get_run(note["parent"])
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(note["parent"])} == {
        *(f"comparison.{kind}" for kind in ("html", "json", "md", "tex", "txt")),
        "figures",
    }
    assert "Curves" in (done[0] / "sweep" / "comparison.html").read_text(), "the metric on the validation set over the steps"
    tags, said = parent.data.tags, json.loads((done[0] / "sweep" / "comparison.json").read_text())["verdicts"][0]
    assert tags["verdict"] == said["verdict"] and tags["reference"] == said["reference"] and said["sentence"] in tags["mlflow.note.content"]
    numbers = {"effect": said["difference"], "p": said["p_holm"], "pairs": 2.0}
    numbers |= {name: bound for name, bound in zip(("interval_low", "interval_high"), said["interval"], strict=True) if bound is not None}
    found = {name.removeprefix("0_main/0.01 "): value for name, value in parent.data.metrics.items() if name.startswith("0_main/")}
    assert found == pytest.approx(numbers), "two pairs have no interval at this level"
    query = f"tags.`mlflow.parentRunId` = '{note['parent']}'"
    runs = client.search_runs([parent.info.experiment_id], query)
    assert sorted(run.info.run_name for run in runs) == [f"{lr} seed={s}" for lr in ("0.001", "0.01") for s in (0, 1)]
    assert {run.data.tags["esper.sweep"] for run in runs} == {note["id"]}
    assert {run.data.params["arm"] for run in runs} == {"0.001", "0.01"}
    assert all(run.data.metrics["final/cost/macs"] > 0 and "final/test/accuracy" in run.data.metrics for run in runs)


def test_the_store_alone_gives_the_same_comparison(done: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = done[0]
    note = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert compare([f"sweep={note['id']}", f"output={folder}", "figures=false"]) == 0
    ours = json.loads((folder / "sweep" / "comparison.json").read_text())
    theirs = json.loads((folder / "compare" / note["id"] / "comparison.json").read_text())
    assert theirs["verdicts"] == ours["verdicts"]
    assert theirs["arms"] == ours["arms"]
    assert compare([f"sweep={note['name']}", f"output={folder}", "figures=false", "alpha=0.2"]) == 0
    assert "exploratory: alpha was 0.05 in the plan and is 0.2 now" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweep=nothing"], "no sweep 'nothing'; it has"),
        (["sweep=SWEEP", "metric=loss"], ""),
        (["sweep=SWEEP", "metric=beauty", "direction=max"], "they have accuracy or loss"),
        (["sweep=SWEEP", "metric=beauty"], "say also direction"),
        (["sweep=SWEEP", "reference=nobody"], "no arm of this sweep"),
        (["sweep=SWEEP", "alpha=2"], "compare.alpha=2"),
        (["swep=1"], "did you mean sweep?"),
        (["alpha=0.1"], "needs sweep="),
    ],
)
def test_questions_that_have_no_answer_get_a_sentence(done: tuple[Path, str], words: list[str], sentence: str) -> None:
    note = json.loads((done[0] / "sweep" / "sweep.json").read_text())
    given = [word.replace("SWEEP", note["id"]) for word in words] + [f"output={done[0]}", "figures=false"]
    if not sentence:
        assert compare(given) == 0
        return
    with pytest.raises(UserError, match=sentence):
        compare(given)


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no store"):
        compare(["sweep=1", f"output={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_again_runs_nothing(done: tuple[Path, str]) -> None:
    folder = done[0]
    said = esper(*SWEEP, f"output={folder}", f"hydra.sweep.dir={folder}/sweep")
    assert " done in " not in said
    assert f"Going on with the sweep in {folder}/sweep" in said and "Cannot tell 0.01 from 0.001" in said
    refused = esper(*SWEEP, "compare.alpha=0.2", f"output={folder}", f"hydra.sweep.dir={folder}/sweep", code=2)
    assert "another plan (alpha differs)" in refused and "Going on" not in refused


def test_a_job_that_breaks_is_said_at_once_and_counted(tmp_path: Path) -> None:
    words = ("-m", "optimizer.lr=0.001,1e30", "trainer.steps=30", "tracking=none", f"hydra.sweep.dir={tmp_path}/s")
    said = " ".join(esper(*words, f"output={tmp_path}", code=1).split())
    assert "failed 1e+30 seed=0: " in said
    assert "1 of 2 runs failed (1e+30 1)" in said
    assert "hydra.launcher.retry=true" in said
    log = next((tmp_path / "s").glob("1-*/job.log"))
    assert "optimizer.lr" in log.read_text()


def test_the_documented_tuning_runs_and_stays_on_record(tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented = re.search(r"`(compare\.tune=[^`]*)`", (checkout / "docs" / "comparing.md").read_text(encoding="utf-8"))
    assert documented is not None
    typed = [word.replace("0.003", "1e30") for word in shlex.split(documented[1])]
    brief = ["compare.tune_seeds=1", "trainer.steps=20", "trainer.control=false", "compare.figures=false"]
    words = ["-m", "grafting=linear,drift", *typed, *brief, f"output={tmp_path}", f"hydra.sweep.dir={tmp_path}/s"]
    said = " ".join(esper(*words, code=1).split())
    assert "failed tuning drift optimizer.lr=1e+30 seed=1000000: " in said
    assert "tuned linear: optimizer.lr=0.001, validation accuracy " in said and "2 jobs failed" in said
    kept = json.loads((tmp_path / "s" / "comparison.json").read_text())
    assert [(one["arm"], one["values"]) for one in kept["tuned"]] == [(arm, {"optimizer.lr": 0.001}) for arm in ("linear", "drift")]
    assert [(tried["runs"], tried["failed"]) for tried in kept["tuned"][0]["tried"]] == [(1, 0), (1, 1)]
    assert sum("1 of 2 tuning runs" in line for line in kept["notes"]) == 2
    note = json.loads((tmp_path / "s" / "sweep.json").read_text())
    client = client_of(tmp_path)
    parent = client.get_run(note["parent"])
    assert (parent.data.metrics["tuning/linear/runs"], parent.data.metrics["tuning/linear/failed"]) == (2.0, 1.0)
    assert parent.data.metrics["tuning/drift/macs"] > 0 and parent.data.tags["esper.failed_jobs"] == "2"
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{note['parent']}'")
    tuning = {run.info.run_name: (run.data.tags["arm"], run.info.status) for run in runs if run.data.tags.get("esper.kind") == "tuning"}
    names = [f"tuning {arm} optimizer.lr={lr} seed=1000000" for arm in ("linear", "drift") for lr in (0.001, 1e30)]
    assert tuning == dict(zip(names, [(a, s) for a in ("linear", "drift") for s in ("FINISHED", "FAILED")], strict=True))
    assert compare([f"sweep={note['id']}", f"output={tmp_path}", "figures=false"]) == 0
    theirs = json.loads((tmp_path / "compare" / note["id"] / "comparison.json").read_text())
    assert (theirs["arms"], theirs["tuned"], theirs["notes"]) == (kept["arms"], kept["tuned"], kept["notes"])


def begun(words: list[str]) -> subprocess.Popen[str]:
    """A sweep in a process of its own, of which one job is done."""
    command = [sys.executable, "-m", "esper", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if " done in " in line:
            break
    return process


def test_ctrl_c_keeps_what_is_done_says_how_to_go_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    words = ["-m", "optimizer.lr=0.001,0.01", "seed=range(0,4)", "trainer.steps=500", f"output={tmp_path}"]
    process = begun([*words, f"hydra.sweep.dir={tmp_path}/s"])
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait() == 130
    assert f"hydra.sweep.dir={tmp_path}/s" in said
    summaries = [json.loads(path.read_text())["status"] for path in (tmp_path / "s").glob("*/summary.json")]
    assert "FINISHED" in summaries
    assert set(summaries) <= {"FINISHED", "KILLED"}
    assert len(summaries) < 8
    note = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert client_of(tmp_path).get_run(note["parent"]).info.status == "KILLED"
    command = f"hydra.sweep.dir={tmp_path}"
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if b"ESPER_TRACKER" in _read(p) and command.encode() in _read(p)]
    assert left == []


def test_eight_jobs_at_once_never_meet_a_locked_database_or_lose_a_row(tmp_path: Path) -> None:
    brief = ["trainer.steps=20", "trainer.control=false", "trainer.validate_every=1step", "telemetry.every=1", "controller=none"]
    words = ["-m", "grafting=linear,drift", "seed=range(0,4)", "hydra.launcher.workers=8", "compare.figures=false", *brief]
    said = esper(*words, f"output={tmp_path}", f"hydra.sweep.dir={tmp_path}/s")
    assert " done in " in said and "locked" not in said + (tmp_path / "s" / "tracker.log").read_text()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall() == [("FINISHED", 9)]
        rows = dict(store.execute("SELECT run_uuid, count(*) FROM metrics GROUP BY run_uuid").fetchall())
        kept = store.execute("SELECT run_uuid, step, key FROM metrics").fetchall()
    notes = [json.loads(path.read_text()) for path in (tmp_path / "s").glob("*/mlflow.json")]
    assert len(notes) == 8 and len({rows[note["run"]] for note in notes}) == 1
    for folder, note in zip((tmp_path / "s").glob("*/mlflow.json"), notes, strict=True):
        measured = pd.read_parquet(folder.with_name("metrics.parquet"))
        named = {(tick, name) for run, tick, name in kept if run == note["run"]}
        assert len(measured) > 40 and set(zip(measured.tick, measured.name, strict=True)) <= named


def test_a_store_process_that_is_killed_leaves_no_run_running(tmp_path: Path) -> None:
    words = ["-m", "optimizer.lr=0.001,0.01", "seed=range(0,6)", "trainer.steps=60", "trainer.control=false", f"output={tmp_path}"]
    process = begun([*words, f"hydra.sweep.dir={tmp_path}/s"])
    assert process.stdout is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (writer,) = [int(pid) for pid in children if b"esper.compare.sweep.mlflow_writer" in _read(Path(f"/proc/{pid}/cmdline"))]
    os.kill(writer, signal.SIGKILL)
    said = " ".join(process.stdout.read().split())
    assert process.wait() in (1, 2)  # 1: a job that was under way has failed with it
    assert "esper: The sweep's tracking process failed: it ended unexpectedly" in said and "Traceback" not in said
    note = json.loads((tmp_path / "s" / "sweep.json").read_text())
    client = client_of(tmp_path)
    parent = client.get_run(note["parent"])
    assert parent.info.status == "FAILED"
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{note['parent']}'")
    assert "FINISHED" in {run.info.status for run in runs} <= {"FINISHED", "FAILED", "KILLED"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # another user's, or gone
        return b""


def test_the_controls_end_in_a_figure_and_a_sentence(tmp_path: Path) -> None:
    words = ("-m", "experiment=controls", "seed=0", "trainer.steps=100", "tracking=none", f"output={tmp_path}")
    said = " ".join(esper(*words, f"hydra.sweep.dir={tmp_path}/s").split())
    assert "Cannot tell whether growing paid" in said
    read = json.loads((tmp_path / "s" / "comparison.json").read_text())
    macs = {arm["arm"]: arm["costs"]["macs"] for arm in read["arms"]}
    assert list(macs) == ["grown", "host", "scratch", "scratch_macs", "all_on", "random_places", "naive"]
    assert macs["scratch_macs"] == pytest.approx(macs["grown"], rel=0.03)
    assert macs["host"] < macs["grown"] < macs["all_on"]
    assert (tmp_path / "s" / "figures" / "cost.png").stat().st_size > 10_000


LEAN = {"figures": False, "model": False, "system_s": 0.0}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], LEAN),
        (["tracking.figures=true"], {**LEAN, "figures": True}),
        (["experiment=drawn"], {**LEAN, "figures": True}),
        (["experiment=drawn", "tracking.figures=false"], LEAN),
        (["arm=measured", "tracking.model=true"], {**LEAN, "system_s": 5.0, "model": True}),
        (["tracking=ours"], {**LEAN, "model": True}),
    ],
    ids=str,
)
def test_a_sweep_keeps_little_of_each_run_unless_a_file_or_a_word_asks(
    words: list[str], kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper.app import main
    from esper.cli import conf
    from esper.compare.sweep import launch

    files = {
        "experiment/drawn": "# @package _global_\n# Draws\ntracking: {figures: true}\n",
        "arm/measured": "# @package _global_\n# Measures\ntracking: {system_s: 5.0}\n",
        "tracking/ours": "# Ours\ndefaults: [mlflow]\nmodel: true\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    seen: list[Any] = []
    monkeypatch.setattr(conf, "_own", [])
    monkeypatch.setattr(launch, "run_sweep", lambda sweep, environments: seen.append(sweep))
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "seed=0,1", *words, "--config-dir", str(tmp_path)]) == 0
    assert [{key: getattr(one.config.tracking, key) for key in LEAN} for one in seen[0].jobs] == [kept, kept]


def test_jobs_that_differ_in_their_seed_alone_are_composed_once_and_are_what_they_would_be(tmp_path: Path, monkeypatch: Any) -> None:
    from esper.app import main
    from esper.cli.compose import compose
    from esper.compare.sweep import launch

    seen: list[Any] = []
    monkeypatch.setattr(launch, "run_sweep", lambda sweep, environments: seen.append(sweep))
    monkeypatch.chdir(tmp_path)
    words = ["optimizer.weight_decay='${seed}'", "tracking=none"]
    main(["-m", "grafting=linear,drift", "seed=range(0,3)", *words, "hydra.sweep.subdir='${seed}-${grafting.name}'"])
    (sweep,) = seen
    assert [(one.config.grafting.name, one.config.seed) for one in sweep.jobs] == [(g, s) for g in ("linear", "drift") for s in range(3)]
    for one in sweep.jobs:
        assert one.config == compose([f"grafting={one.config.grafting.name}", f"seed={one.config.seed}", *words])
        assert one.folder.name.startswith(f"{one.config.seed}-{one.config.grafting.name}-")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["grafting=linear,drift", "seed=0,0"], "Jobs 0 and 1 of the sweep are the same run (grafting=linear seed=0"),
        (["grafting=linear,drift", "hydra.sweeper.max_batch_size=1"], "hydra.sweeper.max_batch_size=1 cuts the sweep into pieces"),
    ],
)
def test_a_sweep_that_cannot_be_compared_is_refused_before_its_first_run(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from esper.app import main
    from esper.compare.sweep import launch

    monkeypatch.setattr(launch, "run_sweep", lambda sweep, environments: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *words, "tracking=none"]) == 2
    assert sentence in capsys.readouterr().err


def test_the_way_to_try_again_is_said_also_when_every_job_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from esper.app import main
    from esper.compare.sweep import launch

    def run(sweep: Any, environments: Any) -> None:
        sweep.failures += sweep.jobs
        raise UserError("All 2 runs of the sweep failed.")

    monkeypatch.setattr(launch, "run_sweep", run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["-m", "optimizer.lr=1e30,1e31", "tracking=none"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "esper: All 2 runs of the sweep failed." in said.err
    assert "2 jobs failed; to try again:" in said.out and said.out.strip().endswith("hydra.launcher.retry=true")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two arms in two blocks with two seeds, whose branches germinate late: the folder of the sweep, and what it said."""
    folder = tmp_path_factory.mktemp("blocks")
    late = ("controller=random", "controller.count=2", "controller.earliest=70%", "controller.latest=75%")
    words = ("-m", "blueprint=mlp,low_rank", "optimizer.lr=0.001,0.01", "seed=0,1", "compare.block=[optimizer.lr]", "compare.ranking=true")
    brief = ("trainer.steps=60", "trainer.control=false", "trainer.checkpoint_every=", "compare.figures=false", "tracking=none")
    return folder / "s", esper(*words, *late, *brief, f"output={folder}", f"hydra.sweep.dir={folder}/s")


def test_what_compare_block_names_is_judged_apart_and_pooled_and_ranking_compares_all_arms(blocks: tuple[Path, str]) -> None:
    folder, said = blocks
    read = json.loads((folder / "comparison.json").read_text())
    assert read["plan"]["blocks"] == ["0.001", "0.01"] and list(read["plan"]["arms"]) == ["mlp", "low_rank"]
    assert [(row["arm"], row["block"]) for row in read["verdicts"]] == [("low_rank", name) for name in ("0.001", "0.01", "pooled")]
    assert [(row["arm"], row["reference"], row["block"]) for row in read["ranking"]] == [("low_rank", "mlp", "pooled")]
    assert "3 comparisons at" in said and "all against all, after Holm" in said
    means = {arm: sum(one["mean"] for one in read["arms"] if one["arm"] == arm) / 2 for arm in ("mlp", "low_rank")}
    table = [line for line in said.partition("all against all")[2].splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == sorted(means, key=lambda arm: -means[arm])


def test_every_arm_starts_from_the_same_weights_sees_the_same_data_and_germinates_at_the_same_sites(blocks: tuple[Path, str]) -> None:
    seen: dict[tuple[float, int], list[Any]] = {}
    for folder in blocks[0].glob("[0-7]-*"):
        told, config = json.loads((folder / "summary.json").read_text()), yaml.safe_load((folder / "config.yaml").read_text())
        places = [(one["site"], one["seed"], one["path"][0]) for one in told["branches"]]
        first = min(tick for _, _, (_, tick) in places)
        before = {place: value for place, value in _metrics(folder).items() if place[0] < first}
        seen.setdefault((config["optimizer"]["lr"], config["seed"]), []).append((places, before, told["fingerprint"]))
    assert {len(arms) for arms in seen.values()} == {2} and len(seen) == 4
    for (places, before, fingerprint), (others, earlier, different) in seen.values():
        assert places == others and len(places) == 2
        assert before == earlier and max(tick for tick, _ in before) > 30  # batches of 64: more than all samples there are
        assert fingerprint != different  # the arms do differ
    first, second = seen[(0.01, 0)][0], seen[(0.01, 1)][0]
    assert first[0] != second[0] and first[1] != second[1]


def test_a_block_that_is_no_key_is_refused_before_the_first_run(tmp_path: Path) -> None:
    said = esper("-m", "model=mlp,cnn", "seed=0,1", "compare.block=[modle]", f"output={tmp_path}", code=2)
    assert "did you mean model?" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("plan.json"))
