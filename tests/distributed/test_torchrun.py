"""``torchrun … -m esper trainer=ddp``: real processes, one of which is really killed, and runs that go on from what was saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.app import main
from esper.checkpoint import disk
from esper.cli.compose import compose
from esper.running.run import run
from tests.distributed.test_same_bits import QUICK

pytestmark = pytest.mark.usefixtures("processes")

WORDS = [
    *("trainer=ddp", "trainer.batch_size=4", "trainer.steps=240", "trainer.checkpoint_every=10step", "trainer.validate_every=50%"),
    *("tracking=csv", "trainer.control=false", "telemetry.every=5", "grafting.ramp=5step", "lifecycle.grafting_max=50%", *QUICK, "seed=3"),
    *("controller=scheduled", "controller.script=[{at: 2step, command: germinate, seeds: [0]}]"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the same run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return dict(run(compose([*WORDS, f"output={folder}"]), folder / "run", quiet=True).summary)


class Started:
    """esper under torchrun, in a folder of its own."""

    def __init__(self, count: int, words: list[str], folder: Path, checkout: Path, *options: str) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *options]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.said = (folder / "said").open("w+")
        self.folder = folder
        self.process = subprocess.Popen([*launch, "-m", "esper", *words], cwd=folder, env=environment, stdout=self.said, stderr=self.said)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                try:
                    values = (place / "environ").read_bytes().split(b"\0")
                    parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                if parent == self.process.pid and f"RANK={number}".encode() in values:
                    return int(place.name)
        raise LookupError(number)

    def await_checkpoint(self, beyond: int = 0) -> None:
        """Wait until a checkpoint of a later step than ``beyond`` is there."""
        while not any(int(path.name) > beyond for path in self.folder.glob(f"outputs/*/*/{disk.FOLDER}/[0-9]*")):
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        self.said.flush()
        return Path(self.said.name).read_text()

    def end(self) -> int:
        return self.process.wait(timeout=200)

    def summary(self) -> dict[str, Any]:
        (path,) = self.folder.glob("outputs/*/*/summary.json")  # only rank 0 has a folder
        return dict(json.loads(path.read_text()))


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Callable[..., Started]]:
    """Starts esper under torchrun, and ends what is left of it."""
    started: list[Started] = []

    def begin(count: int, *words: str, options: tuple[str, ...] = ()) -> Started:
        started.append(Started(count, [*WORDS, *words], tmp_path, checkout, *options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.wait()
        one.said.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trainer=default"], "2 processes, and trainer=default trains in one: add trainer=ddp (or fsdp), or leave torchrun out."),
        (["trainer.accumulate=3"], "A global batch of trainer.accumulate=3 micro-batches can be shared out among 1 or 3 processes"),
        (["-m", "seed=1,2"], "The processes that torchrun starts train one run together, and this is a sweep"),
    ],
)
def test_what_several_processes_cannot_train_is_refused_by_rank_0_alone(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    given = [word for word in WORDS if word != "trainer=ddp" or words[0] != "trainer=default"]
    given = [word for word in given if not word.startswith("trainer.") or words[0] != "trainer=default"]
    assert main([*given, *words, f"output={tmp_path}"]) == 2
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_is_named_and_another_number_of_processes_goes_on_to_the_same_bits(
    dies: int, start: Callable[..., Started], undisturbed: dict[str, Any]
) -> None:
    first = start(2)
    first.await_checkpoint()
    victim = first.rank(dies)
    os.kill(victim, signal.SIGKILL)
    assert first.end() == 1
    sentences = [line for line in first.text().splitlines() if line.startswith("esper: ")]
    assert len(sentences) == 1 and sentences[0].startswith(f"esper: Rank {dies} (process {victim} on "), first.text()
    second = start(4 if dies else 1, "resume=auto")
    assert second.end() == 0, second.text()
    found = second.summary()
    assert "going on in" in second.text() and found["status"] == "FINISHED" and found["seeds"]["germinated"] > 0
    assert found["fingerprint"] == undisturbed["fingerprint"] and found["macs"] == undisturbed["macs"]


def test_sigterm_to_one_rank_stops_all_after_the_same_step_with_everything_saved(start: Callable[..., Started]) -> None:
    first = start(2)
    first.await_checkpoint()
    os.kill(first.rank(1), signal.SIGTERM)
    first.end()
    said = [line for line in first.text().splitlines() if line.startswith("esper: ")]
    assert len(said) == 1 and said[0].startswith("esper: ended by SIGTERM, everything is saved: esper resume="), first.text()
    assert first.summary()["status"] == "KILLED"
    last = max(int(path.name) for path in first.folder.glob(f"outputs/*/*/{disk.FOLDER}/[0-9]*"))
    assert last == first.summary()["steps"] and last % 10, "a step at which no checkpoint was due"


def test_torchrun_restarts_a_killed_rank_without_a_person(start: Callable[..., Started], undisturbed: dict[str, Any]) -> None:
    one = start(2, "resume=auto", options=("--max-restarts", "2"))
    one.await_checkpoint()
    os.kill(one.rank(1), signal.SIGKILL)
    one.await_checkpoint(30)
    os.kill(one.rank(0), signal.SIGKILL)
    assert one.end() == 0, one.text()
    assert one.text().count("going on in") == 2
    assert one.summary()["fingerprint"] == undisturbed["fingerprint"]


def test_a_sharded_training_names_a_killed_rank_and_goes_on_in_another_number_of_processes(
    start: Callable[..., Started], undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sharded = ["trainer=fsdp", "trainer.checkpoint_every=20step"]
    first = start(2, *sharded)
    first.await_checkpoint()
    victim = first.rank(1)
    os.kill(victim, signal.SIGKILL)
    assert first.end() == 1
    sentences = [line for line in first.text().splitlines() if line.startswith("esper: ")]
    assert len(sentences) == 1 and sentences[0].startswith(f"esper: Rank 1 (process {victim} on "), first.text()
    assert list(first.folder.glob(f"outputs/*/*/{disk.FOLDER}/*/shards/*.distcp")), "each process has written its part"
    monkeypatch.chdir(first.folder)
    assert main([*WORDS, *sharded, "resume=auto"]) == 0
    found = first.summary()
    assert "going on in" in capfd.readouterr().err and found["status"] == "FINISHED"
    assert found["seeds"] == undisturbed["seeds"] and found["macs"] == undisturbed["macs"]
    assert [branch["path"] for branch in found["branches"]] == [branch["path"] for branch in undisturbed["branches"]]
    for name, value in undisturbed["metrics"]["final"].items():
        assert found["metrics"]["final"][name] == pytest.approx(value, abs=1e-3), name
