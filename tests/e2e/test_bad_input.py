"""What a run meets that it cannot mend: one sentence, a status that is true, and nothing lost or left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from esper import app
from esper.cli.compose import compose
from esper.errors import UserError
from esper.export.program import save_program
from esper.report.summary_file import ROOM
from esper.running.run import run
from esper.tasks import task_of
from esper.tasks.base import SETS
from esper.trainer.trainer import Trainer

pytestmark = pytest.mark.e2e
BRIEF = ["trainer.steps=60", "trainer.control=false", "trainer.save=false", "trainer.checkpoint_every=", "tracking=none"]


def start(folder: Path, *words: str) -> Any:
    """A brief run in this process; its summary."""
    given = {word.partition("=")[0] for word in words}
    brief = [word for word in BRIEF if word.partition("=")[0] not in given]
    return run(compose([*brief, f"output={folder}", *words]), folder / "run", quiet=True).summary


def script(*entries: str) -> list[str]:
    return ["controller=scheduled", f"controller.script=[{','.join('{' + entry + '}' for entry in entries)}]"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sites.match=[fc9]"], r"No module of the host matches sites\.match 'fc9'; there are: inputs, fc1, act1, fc2, act2, head\."),
        (["sites.per_site=7", "sites.match=[fc1]"], r"sites\.per_site=7 is more than the 6 features of site 'fc1'; ask for at most 6\."),
        (["blueprint=conv"], r"blueprint 'conv' fits none of the 3 sites; at 'inputs': conv needs the output of a convolution"),
        (["blueprint=block"], r"finds no residual block.*name the blocks"),
        (["model=cnn", "task=text", "task.context=16"], r"model=cnn needs inputs.*use model=transformer"),
        (["lifecycle.training_min=9%"], r"TRAINING can never be left: it needs at least 5 ticks but is ended after 4; raise"),
        (["lifecycle=reference"], r"The run has 60 ticks.*: TRAINING can never be left; train longer"),
        (["lifecycle.clock=epoch"], r"can never be left"),
        (["trainer.device=cuda"], r"no CUDA GPU|cuda"),
        (["trainer.precision=fp16"], r"fp16.*(bf16|fp32)"),
        (["trainer.batch_size=5000"], r"batches of 5000 cannot be made from 1000 samples"),
        (["controller.blueprint=conv"], r"controller\.blueprint=conv fits no site of this host; blueprints that do"),
        (["controller=random", "controller.site=zzz"], r"controller\.site=zzz matches no site; there are: inputs, fc1, fc2\."),
        (["controller=random", "controller.blueprint=nope"], r"controller\.blueprint=nope fits no site .*blueprints that do: affine"),
        (["controller=random", "controller.earliest=100%", "controller.latest=100%"], r"controller\.earliest=100% is tick 60"),
        (["controller.germinate_at=99%"], r"germinate_at=99% is tick 59, and nothing germinates after tick 30 of 60"),
        (["telemetry.every=100000"], r"comes at tick 100000 \(telemetry\.every\), and nothing germinates after tick 30"),
        (["controller.germinate_at=", "controller.plateau=5%", "controller.metric=validation/lss"], r"did you mean validation/loss"),
        (["controller.metric=validation/accuracy"], r"gets better towards its maximum; set controller\.direction=max"),
        (["controller.strategy=liner"], r"controller\.strategy=liner is not accepted.*or empty for the run's own; did you mean linear\?"),
        (script("at: 10%, command: germinat"), r"controller\.script\[0\]\.command is 'germinat'; accepted are germinate"),
        (["task=text", "task.path=/nowhere.txt"], r"/nowhere\.txt"),
        (["task=cifar10", "task.path=/nowhere"], r"finds no data_batch_1\.bin in /nowhere; download"),
        (["task=fashion_mnist", "task.path=/nowhere"], r"finds no train-images.*apt-get install dataset-fashion-mnist"),
        (["tracking=mlflow", "tracking.uri=runs"], r"tracking\.uri=runs is a folder; give sqlite"),
        (["tracking=mlflow", "tracking.uri=http://127.0.0.1:{closed}"], r"does not answer \(connection refused\); start the server"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_begin_is_refused_with_what_to_do(words: list[str], sentence: str, tmp_path: Path, closed: int):
    before = threading.active_count()
    with pytest.raises(UserError, match=sentence) as caught:
        start(tmp_path, *(word.replace("{closed}", str(closed)) for word in words))
    assert "\n" not in str(caught.value)
    assert threading.active_count() <= before, "no thread is left behind"  # an earlier test's may have ended meanwhile
    assert [path.name for path in (tmp_path / "run").rglob("*")] in ([], ["config.yaml"]), "nothing that looks like a run"


@pytest.fixture
def closed() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_host_larger_than_the_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper.hosts.mlp.MLP", lambda *sizes: torch.empty(2**60))
    with pytest.raises(UserError, match=r"^model=mlp does not fit into memory; make it smaller"):
        start(tmp_path)


def test_commands_that_cannot_be_applied_are_refused_with_the_reason(tmp_path: Path):
    words = script(
        "at: 5step, command: germinate, site: fc9, seeds: [0]",
        "at: 6step, command: germinate, site: fc1, seeds: [77]",
        "at: 7step, command: set_stage, site: fc1, seeds: [0], target: FOSSILIZED",
        "at: 8step, command: germinate, site: fc1, seeds: [0], blueprint: conv",
    )
    summary = start(tmp_path, *words)
    assert summary["status"] == "FINISHED" and set(summary["seeds"].values()) == {0}
    reasons = " | ".join(summary["refusals"])
    assert sum(summary["refusals"].values()) == 4, reasons
    for part in ("fc9", "77", "FOSSILIZED", "conv"):
        assert part in reasons


def test_a_text_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "noise.txt"
    path.write_bytes(bytes(range(256)) * 100)
    with pytest.raises(UserError, match=r"noise\.txt.*UTF-8"):
        start(tmp_path, "model=transformer", "task=text", f"task.path={path}")


def test_a_store_that_is_no_database_is_refused_before_training(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but long enough to be taken for one")
    with pytest.raises(UserError, match=r"mlflow\.db is damaged or no SQLite database; move it away"):
        start(tmp_path, "tracking=mlflow")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_store_that_is_damaged_inside_is_refused_before_training(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    with pytest.raises(UserError, match=r"mlflow\.db is damaged or no SQLite database; move it away"):
        start(tmp_path, "tracking=mlflow")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_file_in_the_way_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "taken").write_text("")
    assert app.main([*BRIEF, f"output={tmp_path}/taken"]) == 1
    assert "taken" in (said := capsys.readouterr().err) and "set output=<another folder>" in said
    assert len(said.splitlines()) == 1


def test_an_output_folder_that_cannot_be_made_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*BRIEF, "output=/proc/nowhere"]) == 2
    assert "The output folder /proc/nowhere cannot be made (no such file or directory); give another" in capsys.readouterr().err


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that may be read and not written, also where the tests run as root: they are nobody meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_an_unwritable_folder_is_said(locked: Path, capsys: pytest.CaptureFixture[str]):
    assert app.main([*BRIEF, f"output={locked}/runs"]) == 1
    said = capsys.readouterr().err
    assert "permission denied; get the right to use it, or set output=<another folder>." in said
    assert len(said.splitlines()) == 1


def test_a_disk_that_fills_up_leaves_the_summary_in_the_room_kept_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[os.stat_result] = []

    def full(self: Trainer, step: int) -> None:
        kept.append((tmp_path / "run" / "summary.tmp").stat())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_step", full)
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path)
    summary = tmp_path / "run" / "summary.json"
    assert json.loads(summary.read_text())["status"] == "FAILED"
    assert kept[0].st_size == ROOM > summary.stat().st_size, "so there was room for it"
    assert summary.stat().st_ino == kept[0].st_ino, "it was written where the room was, which nobody else could take meanwhile"
    assert not (tmp_path / "run" / "summary.tmp").exists()


def test_a_disk_that_is_full_already_is_said_before_training(tmp_path: Path):
    before = threading.active_count()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path, "tracking=csv")
    assert threading.active_count() <= before  # an earlier test's may have ended meanwhile
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "summary.tmp"}


def test_a_disk_that_fills_up_ends_the_run_as_failed_and_closes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper.running.run.reserve", lambda folder: None)  # even the room for the summary is gone
    before = threading.active_count()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        start(tmp_path, "tracking=csv")
    assert caught.value.errno == errno.ENOSPC
    assert threading.active_count() <= before  # an earlier test's may have ended meanwhile
    assert (tmp_path / "run" / "transitions.parquet").exists() and (tmp_path / "run" / "metrics.csv").exists()


LIGHT = ["tracking.figures=false", "tracking.model=false", "tracking.system_s=0"]


def test_a_refused_run_leaves_no_mlflow_run(tmp_path: Path):
    for word in ("sites.match=[fc9]", "controller.germinate_at=99%"):
        with pytest.raises(UserError):
            start(tmp_path, "tracking=mlflow", *LIGHT, word)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"config.yaml", "mlflow.db", "mlflow.db.lock"}
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select * from runs").fetchall() == []


@pytest.mark.parametrize("place", ["profiled", "control_run"])
def test_an_interrupt_leaves_an_mlflow_run_that_says_killed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"esper.running.run.{place}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "tracking=mlflow", *LIGHT, "trainer.control=true")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)]
    if place == "control_run":
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "KILLED" and summary["steps"] == 60 and "control" not in summary
        assert summary["metrics"]["final"]["test/accuracy"] > 0, "what was measured is kept"


def spoiled(which: str) -> Any:
    """A task of two classes, with a NaN in one of its four sets."""
    draws = torch.Generator().manual_seed(0)

    def made(size: int, bad: bool) -> TensorDataset:
        inputs = torch.randn(size, 1, 8, generator=draws)
        targets = (inputs.sum((1, 2)) > 0).long()
        inputs[size // 2] = inputs[size // 2] * (torch.nan if bad else 1.0)
        return TensorDataset(inputs, targets)

    sets = [made(size, name == which) for name, size in zip(SETS, (400, 100, 100, 100), strict=True)]
    return task_of("spoiled", *sets, outputs=2)


@pytest.mark.parametrize("which", SETS)
def test_nan_in_the_data_is_named_by_its_set(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper.tasks.config.DigitsConfig.build", lambda self: spoiled(which))
    if which == "train":
        with pytest.raises(UserError, match=r"rolled back.*loss is nan.*data"):
            start(tmp_path)
        status = json.loads((tmp_path / "run" / "summary.json").read_text())["status"]
        assert status == "FAILED"
        return
    summary = start(tmp_path)
    assert summary["status"] == "FINISHED"
    said = [alert["text"] for alert in summary["alerts"] if alert["code"] == f"{which}_not_finite"]
    assert len(said) == 1 and f"{which}" in said[0] and "data" in said[0]
    assert summary["seeds"]["germinated"] > 0
    if which == "judge":
        assert summary["seeds"]["fossilized"] == 0, "no gate opens on what is not finite"


def test_a_model_that_does_not_fit_the_disk_is_an_error_and_does_not_end_the_process():
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))
    with pytest.raises(OSError, match="No space left"):
        save_program(program, Path("/dev/full"))
