"""Every backend of esper, and that of the documentation, keeps the contract of a bus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from backends import Awaited, Embedded, InMemory, OnServer

from esper.app import main
from esper.bus.config import MemoryConfig
from esper.bus.conformance import Backend, BusConformance
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import Bus
from esper.errors import UserError
from esper.messages import Telemetry
from esper.user_code import CustomBus

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("ESPER_ALLOW", "my_pkg,esper")


class Journal(Backend):
    """The bus of the documentation."""

    def make(self, settings: dict[str, Any]) -> Bus:
        return CustomBus(target="my_pkg.buses:JournalBus", **settings).build(self.folder)


class TestMemory(BusConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        with closing(InMemory(tmp_path)) as backend:
            yield backend


class TestOwn(BusConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path, allowed: None) -> Iterator[Backend]:
        with closing(Journal(tmp_path)) as backend:
            yield backend


class TestServer(BusConformance):
    @pytest.fixture(params=[pytest.param(name, marks=pytest.mark.server) for name in ("embedded", "redis", "tls", "asyncio")])
    def backend(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
        if request.param == "embedded":
            made: Backend = Embedded(tmp_path)
        else:
            address = request.getfixturevalue("tls") if request.param == "tls" else request.getfixturevalue("server").address
            made = (Awaited if request.param == "asyncio" else OnServer)(tmp_path, address)
        with closing(made) as backend:
            yield backend

    @pytest.fixture(params=["raw", "delta"])
    def codec(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


def test_drops_happen_only_when_the_disk_space_is_used_up_and_show_as_gaps(tmp_path):
    bus = MemoryBus(MemoryConfig(memory_mb=1, spool_mb=1), tmp_path)
    consumer = bus.consumer("telemetry", "run", "group", "one")
    producer = bus.producer("telemetry", "run")
    for number in range(60):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=1, columns=["x"], data=bytes(50_000)))
    producer.publish(Telemetry(site="a", ticks=[60], seeds=1, columns=["x"], data=b""))
    got = [delivery for _ in range(10) for delivery in consumer.read(100)]
    assert bus.counts()["dropped"] == bus.counts()["gaps"] == 61 - len(got) > 0
    bus.close()


@pytest.mark.slow
def test_a_run_goes_over_an_own_bus(tmp_path: Path, allowed: None) -> None:
    words = ["bus=custom", "bus.target=my_pkg.buses:JournalBus", "bus.args.file=said.txt", "trainer.steps=20", "tracking=none"]
    assert main([*words, f"hydra.run.dir={tmp_path}"]) == 0
    said = (tmp_path / "bus" / "said.txt").read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("events/main {'kind': 'RunStarted'")
    assert "'kind': 'RunEnded'" in said[-1]


@pytest.mark.parametrize(
    ("target", "args", "sentence"),
    [
        ("my_pkg.buses:JournalBus", {"fiel": "a"}, "unexpected keyword argument 'fiel'; it takes config, folder, file, streams"),
        ("my_pkg.buses:JournalProducer", {}, "it takes producer, journal, source"),
        ("esper.user_code:CustomBus", {}, "bus.args does not fit"),
    ],
)
def test_an_own_bus_that_cannot_be_one_is_refused(tmp_path: Path, allowed: None, target: str, args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CustomBus(target=target, args=args).build(tmp_path)


@pytest.mark.parametrize("group", ["controller", "tracking"])
@pytest.mark.slow
def test_no_other_process_joins_an_own_bus(tmp_path: Path, allowed: None, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bus=custom", "bus.target=my_pkg.buses:JournalBus", f"{group}.process=external", f"hydra.run.dir={tmp_path}"]
    assert main(words) == 2
    assert (
        f"{group}.process=external needs a bus that another process can reach, and bus=custom lives in this one" in capsys.readouterr().err
    )
