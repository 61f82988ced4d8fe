"""A tracker of the user's own: allowed by name, told everything, and in step with the other trackers after a resume."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from esper.app import main
from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig
from esper.bus.discovery import invite
from esper.bus.programs import tracker as track
from esper.bus.trainer.bus_port import BusPort
from esper.cli.compose import compose
from esper.cli.resume import resume
from esper.errors import TrackerError, UserError
from esper.messages import Transition
from esper.report.summary_file import read_summary
from esper.running.run import run
from esper.tracking import RunInfo, build_trackers
from esper.user_code import CustomTracker

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DIARY = ["tracking=custom", "tracking.target=my_pkg.trackers:Diary"]
QUICK = ["debug=tiny", "trainer.control=false"]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("ESPER_ALLOW", "my_pkg, my_broken")


def test_an_own_tracker_says_after_a_resume_what_the_parquet_files_say(tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    words = [*QUICK, *DIARY, "trainer.checkpoint_every=20step", f"output={tmp_path}"]
    run(compose([*words, "trainer.steps=60"]), folder, quiet=True)
    first = (folder / "diary.txt").read_text().splitlines()
    start = resume(folder, ["trainer.steps=90"])
    run(start.config, folder, quiet=True, state=start.state)
    rows = pq.read_table(folder / "transitions.parquet").to_pylist()
    diary = (folder / "diary.txt").read_text().splitlines()
    assert diary == [f"{row['tick']} {row['site']} {row['seed']} {row['target']}" for row in rows]
    assert first and diary[: len(first)] == first


@pytest.mark.usefixtures("processes")
def test_an_own_tracker_writes_in_a_process_of_its_own_too(tmp_path: Path) -> None:
    bus = open_bus(EmbeddedConfig(), tmp_path)
    try:
        config = {"seed": 0, "tracking": {"name": "custom", "process": "external", "target": "my_pkg.trackers:Diary", "args": {}}}
        info = RunInfo(run="run", name="run", folder=str(tmp_path), outputs=str(tmp_path), started_ms=1, config=config)
        invite(tmp_path, "run", bus.config, msgspec.to_builtins(info))
        port = BusPort(bus, "run", ("a",))
        port.started(0, 3, [])
        port.emit(Transition(tick=2, site="fc1", seed=3, branch=1, source=0, target=1, cause="command", blueprint="mlp", strategy="linear"))
        port.end_tick(3)
        port.ended(3, "FINISHED", {})
        port.close()
        assert track.main([str(tmp_path)]) == 0
    finally:
        bus.close()
    assert (tmp_path / "diary.txt").read_text() == "2 fc1 3 GERMINATED\n"


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("os:system", "would import 'os', which nobody allowed"),
        ("my_pkg.trackers:Stage", "is defined in 'esper.lifecycle"),
        ("my_pkg.gardener:Gardener", "has no method open"),
        ("my_broken:Deaf", "has no wants_model"),
    ],
)
@pytest.mark.parametrize("process", ["internal", "external"])
def test_what_is_no_tracker_is_refused_before_training(
    target: str, sentence: str, process: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "class Deaf:\n    def open(self, info): pass\n    record = flush = close = open\n"
    (tmp_path / "my_broken.py").write_text(deaf, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["bus=embedded"] if process == "external" else []
    config = compose([*QUICK, "tracking=custom", f"tracking.target={target}", f"tracking.process={process}", *words])
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(("method", "refused"), [("open", True), ("flush", False)])
@pytest.mark.slow
def test_an_own_tracker_that_raises_refuses_the_run_or_lets_it_be_trained(
    method: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from my_pkg.trackers import Diary\nclass Torn(Diary):\n    def {method}(self, *given): raise OSError('the page is torn')\n"
    (tmp_path / f"torn_{method}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ESPER_ALLOW", f"my_pkg,torn_{method}")
    config = compose([*QUICK, "tracking=custom", f"tracking.target=torn_{method}:Torn", f"output={tmp_path}"])
    with pytest.raises(UserError if refused else TrackerError, match="the page is torn"):
        run(config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "metrics.parquet").exists()
    if not refused:
        assert read_summary(tmp_path / "run")["status"] == "FAILED" and read_summary(tmp_path / "run")["metrics"]["final"]


def test_a_secret_among_its_arguments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *DIARY, "tracking.args.api_key=hunter2", f"output={tmp_path}"]) == 2
    assert "tracking.args.api_key" in (said := capsys.readouterr().err) and "hunter2" not in said
    assert not list(tmp_path.iterdir())


def test_the_parquet_files_are_written_beside_it() -> None:
    built = build_trackers(CustomTracker(target="my_pkg.trackers:Diary"))
    assert [type(tracker).__name__ for tracker in built] == ["ParquetFiles", "Diary"]
