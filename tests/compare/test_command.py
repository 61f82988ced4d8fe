"""A store with made-up sweeps: what is read back, and what is missing, deleted or named twice."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from esper.compare.command import main as compare
from esper.compare.results.analysis import analyse
from esper.compare.results.mlflow_sweep import ARM, BLOCK, KIND, PLAN, SEED, SWEEP, plan_tags
from esper.compare.results.plan import Plan
from esper.compare.sources.mlflow_reader import ClientReader, MlflowReader, reading
from esper.compare.sources.mlflow_sweeps import find_sweep, job_runs, plan_of, plan_untouched, run_of_store
from esper.errors import UserError

pytestmark = pytest.mark.usefixtures("heavy_libraries")

Fill = Callable[..., str]
ARMS = {"host": {"x": 1}, "grown": {"x": 2, "why": "long " * 2_000}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def client(folder: Path) -> Any:
    from esper.tracking.mlflow_store import experiment_id, quiet_client

    uri = f"sqlite:///{folder}/mlflow.db"
    made = quiet_client(uri)
    experiment_id(made, uri, "esper")
    return made


@pytest.fixture
def reader(client: Any, folder: Path) -> Iterator[MlflowReader]:
    with reading(f"sqlite:///{folder}/mlflow.db") as found:
        yield found


@pytest.fixture
def fill(client: Any) -> Fill:
    """Makes a sweep of two arms and ``pairs`` seeds; returns the parent's run id."""
    experiment = client.get_experiment_by_name("esper").experiment_id

    def make(sweep: str, name: str, pairs: int = 6, plan: bool = True) -> str:
        text = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "host", ARMS, tuple(range(pairs))).text() if plan else ""
        parent = client.create_run(experiment, tags={KIND: "sweep", SWEEP: sweep, **plan_tags(text)}, run_name=name)
        for arm in ARMS:
            for seed in range(pairs):
                tags = {SWEEP: sweep, ARM: arm, BLOCK: "", SEED: str(seed), "mlflow.parentRunId": parent.info.run_id}
                run = client.create_run(experiment, tags=tags, run_name=f"{arm} seed={seed}").info.run_id
                client.log_metric(run, "final/test/accuracy", 0.8 + 0.05 * (arm == "grown") + 0.001 * seed)
                client.log_metric(run, "final/cost/macs", 1000.0)
                client.log_metric(run, "final/seeds/germinated", 4.0)
                client.set_terminated(run)
        return parent.info.run_id

    return make


def test_a_sweep_comes_back_with_its_plan_however_long(client: Any, reader: MlflowReader, fill: Fill) -> None:
    fill("s1", "first")
    parent = find_sweep(reader, "s1")
    assert sum(name.startswith(PLAN) for name in parent.tags) > 1
    assert plan_of(parent).arms == ARMS
    runs = [run_of_store(run, "accuracy") for run in job_runs(reader, parent)]
    assert len(runs) == 12
    assert (runs[0].costs, runs[0].growth) == ({"macs": 1000.0}, {"germinations": 4.0})
    assert analyse(runs, plan_of(parent)).verdicts[0].verdict == "B better"


def test_a_plan_that_was_edited_in_the_store_makes_the_analysis_exploratory(
    client: Any, reader: MlflowReader, fill: Fill, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep=s8", f"uri=sqlite:///{folder}/mlflow.db", f"output={tmp_path}", "figures=false"]
    parent = fill("s8", "eighth")
    assert compare(words) == 0
    assert "exploratory" not in capsys.readouterr().out
    first = find_sweep(reader, "s8").tags[f"{PLAN}.0"]
    client.set_tag(parent, f"{PLAN}.0", first.replace('"alpha": 0.05', '"alpha": 0.4'))
    assert compare(words) == 0
    assert "exploratory: the plan in the store is not the text that was saved" in " ".join(capsys.readouterr().out.split())
    client.set_tag(parent, f"{PLAN}.0", first.replace('"alpha"', '"omega"'))
    with pytest.raises(UserError, match=r"The plan of sweep s8 in the store cannot be read"):
        compare(words)


def test_a_plan_that_an_earlier_version_wrote_is_not_taken_for_an_edited_one(client: Any, reader: MlflowReader, fill: Fill) -> None:
    parent = fill("s9", "ninth", plan=False)
    text = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "host", ARMS, (0, 1)).text().replace('"ranking": false,', "")
    for name, value in plan_tags(text).items():
        client.set_tag(parent, name, value)
    found = find_sweep(reader, "s9")
    assert plan_untouched(found) and plan_of(found).ranking is False


def test_a_deleted_run_is_missed_and_said(client: Any, reader: MlflowReader, fill: Fill) -> None:
    fill("s2", "second", pairs=7)
    parent = find_sweep(reader, "second")
    gone = next(run for run in job_runs(reader, parent) if run.tags[SEED] == "3")
    client.delete_run(gone.id)
    result = analyse([run_of_store(run, "accuracy") for run in job_runs(reader, parent)], plan_of(parent))
    assert result.exploratory == ["6 of 7 planned pairs are there"]
    assert any("[3]" in note for note in result.notes)


def test_a_second_attempt_replaces_the_first_and_a_failed_run_counts(client: Any, reader: MlflowReader, fill: Fill) -> None:
    parent_id = fill("s3", "third")
    parent = find_sweep(reader, parent_id)
    tags = {SWEEP: "s3", ARM: "grown", BLOCK: "", SEED: "0", "mlflow.parentRunId": parent_id}
    late = client.create_run(parent.experiment, tags=tags, start_time=2**42)
    client.set_terminated(late.info.run_id, "FAILED")
    runs = [run_of_store(run, "accuracy") for run in job_runs(reader, parent)]
    assert len(runs) == 12
    assert [run.id for run in runs if run.failed] == [late.info.run_id]


def test_an_interrupted_run_is_no_failed_one(
    client: Any, reader: MlflowReader, fill: Fill, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill("s10", "tenth", pairs=7)
    (stopped,) = (run for run in job_runs(reader, find_sweep(reader, "s10")) if (run.tags[ARM], run.tags[SEED]) == ("host", "6"))
    client.set_terminated(stopped.id, "KILLED")
    assert compare(["sweep=s10", f"uri=sqlite:///{folder}/mlflow.db", f"output={tmp_path}", "figures=false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "exploratory: 6 of 7 planned pairs are there" in said and "grown is better than host" in said and "failed runs" not in said


def test_a_sweep_of_which_all_runs_failed_says_that_and_not_that_they_have_no_metric(
    client: Any, fill: Fill, folder: Path, tmp_path: Path
) -> None:
    parent = fill("s11", "eleventh", pairs=0, plan=False)
    for arm in ARMS:
        tags = {SWEEP: "s11", ARM: arm, BLOCK: "", SEED: "0", "mlflow.parentRunId": parent}
        run = client.create_run(client.get_experiment_by_name("esper").experiment_id, tags=tags).info.run_id
        client.log_metric(run, "train/loss", 1.0)
        client.set_terminated(run, "FAILED")
    text = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "host", ARMS, (0,)).text()
    for name, value in plan_tags(text).items():
        client.set_tag(parent, name, value)
    with pytest.raises(UserError, match="All 2 runs of the sweep failed"):
        compare(["sweep=s11", f"uri=sqlite:///{folder}/mlflow.db", f"output={tmp_path}", "figures=false"])


def test_two_sweeps_of_one_name_are_told_apart_by_their_ids(client: Any, reader: MlflowReader, fill: Fill) -> None:
    fill("s4", "twin", pairs=1)
    fill("s5", "twin", pairs=1)
    with pytest.raises(UserError, match="2 sweeps are called 'twin'; name one by its id: s5, s4"):
        find_sweep(reader, "twin")
    assert find_sweep(reader, "s5").tags[SWEEP] == "s5"


def test_a_sweep_of_one_arm_has_nothing_to_compare(client: Any, reader: MlflowReader, fill: Fill) -> None:
    fill("s6", "alone", pairs=1, plan=False)
    with pytest.raises(UserError, match="one arm only"):
        plan_of(find_sweep(reader, "alone"))


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    from esper.tracking.mlflow_store import quiet_client

    quiet_client(f"sqlite:///{tmp_path}/mlflow.db")
    with reading(f"sqlite:///{tmp_path}/mlflow.db") as empty, pytest.raises(UserError, match="no sweep 'x'; it has: none"):
        find_sweep(empty, "x")


def test_a_file_is_read_directly_just_as_mlflows_client_reads_it(client: Any, reader: MlflowReader, fill: Fill) -> None:
    parent = fill("s12", "twelfth", pairs=2)
    run = next(run for run in reader.runs(list(reader.experiments()), (SWEEP, "s12")) if run.tags.get(ARM) == "host")
    for step, value in enumerate((0.5, float("nan"), float("inf"), 0.25)):
        client.log_metric(run.id, "loss", value, step=step)
    client.log_metric(run.id, "loss", 0.125, step=3)
    client.log_metric(run.id, "odd", float("-inf"))
    other, ids = ClientReader(client), list(reader.experiments())
    assert other.experiments() == reader.experiments()
    directly, asked = ({one.id: repr(one) for one in way.runs(ids)} for way in (reader, other))
    assert parent in directly and directly.keys() == asked.keys()
    for way in (reader, other):
        (found,) = (one for one in way.runs(ids, (SWEEP, "s12"), ["loss", "odd"]) if one.id == run.id)
        assert found.metrics == {"loss": 0.125, "odd": float("-inf")}
        assert repr(way.history("loss", [run.id])) == repr([(run.id, i, v) for i, v in enumerate((0.5, float("nan"), float("inf"), 0.125))])
        assert {"loss", "odd", "final/test/accuracy"} <= set(way.metric_names(ids))
    assert [one.id for one in reader.runs(ids, (SWEEP, "s12"))] == [one.id for one in other.runs(ids, (SWEEP, "s12"))]


@pytest.fixture
def chatter(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that is none of MLflow's."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "3")
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_store_that_cannot_be_read_is_a_sentence_and_is_left_as_it_is(tmp_path: Path, chatter: str) -> None:
    letter, other, torn = tmp_path / "letter.db", tmp_path / "other.db", tmp_path / "torn.db"
    letter.write_text("a letter to a friend, and not a database")
    torn.write_bytes(b"SQLite format 3\x00" + b"\xff" * 8_000)
    with sqlite3.connect(other) as opened:
        opened.execute("CREATE TABLE recipes (name TEXT)")
    before = other.read_bytes()
    for uri, sentence in (
        (f"sqlite:///{letter}", "letter.db is damaged or no SQLite database; move it away, give another uri"),
        (f"sqlite:///{torn}", "torn.db is damaged or no SQLite database"),
        (f"sqlite:///{other}", "There is no store at sqlite:///.*other.db"),
        ("foo://x", "uri=foo://x is of no kind that MLflow knows"),
        ("http://127.0.0.1:9", r"uri=http://127.0.0.1:9 does not answer \(connection refused\)"),
        (chatter, f"The store at {chatter} cannot be read: "),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(["sweep=x", f"uri={uri}", f"output={tmp_path}/out", "figures=false"])
    assert not (tmp_path / "out").exists() and other.read_bytes() == before
    assert (os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == ("1", "30")


def test_values_that_cannot_be_read_and_a_folder_that_cannot_be_written_are_refused_before_the_analysis(
    folder: Path, fill: Fill, capsys: pytest.CaptureFixture[str]
) -> None:
    fill("s7", "seventh", pairs=1)
    words = ["sweep=s7", f"uri=sqlite:///{folder}/mlflow.db", "figures=false"]
    with pytest.raises(UserError, match=r"'alpha=\[1' cannot be read: alpha takes one plain value"):
        compare([*words, "alpha=[1"])
    with pytest.raises(UserError, match=r"The results cannot be written to /proc/nope/compare/s7 \(.*\); give another folder: output=…"):
        compare([*words, "output=/proc/nope"])
    assert capsys.readouterr().out == ""
