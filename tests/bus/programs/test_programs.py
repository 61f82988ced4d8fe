"""The programs beside a run, as real processes: killed and started again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from scripted_trainer import COLUMNS, ScriptedTrainer

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, MemoryConfig
from esper.bus.discovery import invite
from esper.bus.programs import controller as control_program
from esper.bus.programs import tracker as track_program
from esper.bus.trainer.bus_port import BusPort
from esper.controllers import ControllerRunner
from esper.controllers.random import RandomConfig
from esper.errors import UserError
from esper.messages import Germinate

ROOT = Path(__file__).resolve().parents[3]
RECORD = {
    "config": {
        "seed": 3,
        "grafting": {"name": "linear"},
        "controller": {
            **{"name": "random", "process": "external", "count": 12},
            **{"earliest": "5%", "latest": "70%", "embargo": "5%"},
        },
    }
}
TICKS = 60


def started(program: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    code = f"import sys; from esper.bus.programs.{program} import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *words], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def undisturbed(tmp_path):
    """What is applied, and when, with the controller in the training process."""
    bus = open_bus(MemoryConfig(), tmp_path / "inside")
    settings = dict(RECORD["config"]["controller"].items())
    runner = ControllerRunner(bus.local, "run", RandomConfig(**settings).build(3))
    trainer = ScriptedTrainer(BusPort(bus, "run", COLUMNS, runner=runner), TICKS)
    trainer.start()
    for _ in range(TICKS):
        trainer.step()
    trainer.end()
    bus.close()
    return trainer.applied


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("kills", [0, 2])
def test_an_external_controller_decides_the_same_however_often_it_is_killed(tmp_path, undisturbed, kills):
    assert len(undisturbed) > 12
    bus = open_bus(EmbeddedConfig(claim_s=1.0), tmp_path)
    invite(tmp_path, "run", bus.config, RECORD)
    trainer = ScriptedTrainer(BusPort(bus, "run", COLUMNS, external=True, deadline_s=30), TICKS, step_s=0.01 if kills else 0)
    control = started("controller", tmp_path)
    trainer.start()
    when = set(random.Random(0).sample(range(5, TICKS), kills))
    for tick in range(TICKS):
        if tick in when:
            control.kill()
            control.wait()
            control = started("controller", tmp_path)
        trainer.step()
    trainer.end()
    assert control.wait(60) == 0
    bus.close()
    assert trainer.applied == undisturbed


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("program", "part"), [(control_program, "controller"), (track_program, "tracking")])
def test_a_second_controller_or_tracker_beside_a_runs_own_is_refused_in_a_sentence(tmp_path, program, part):
    bus = open_bus(EmbeddedConfig(), tmp_path)
    inside = {"config": {"seed": 0, part: {"name": "none", "process": "internal"}}}
    invite(tmp_path, "run", bus.config, inside)
    with pytest.raises(UserError, match=f"{part}.process=internal.*start the run with {part}.process=external"):
        program.main([str(tmp_path)])
    bus.close()


def record(folder: Path, tracking: dict) -> dict:
    from esper.tracking import RunInfo

    made = RunInfo(
        run="run",
        name="run",
        folder=str(folder),
        outputs=str(folder),
        started_ms=1_700_000_000_000,
        config={"seed": 0, "tracking": tracking},
    )
    return msgspec.to_builtins(made)


def tables(folder: Path) -> dict[str, list[dict]]:
    import pyarrow.parquet as pq

    return {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("transitions", "seeds", "metrics")}


def history(folder: Path) -> dict[str, list[tuple[int, int, float]]]:
    """All metric points in the MLflow store of a folder with one run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    return {
        name: sorted((point.step, point.timestamp, point.value) for point in client.get_metric_history(run.info.run_id, name))
        for name in names
    }


def train_tracked(folder: Path, kills: int, tracking: dict) -> dict[str, list[dict]]:
    """A run whose tracker is another process, killed so often; what its Parquet files hold."""
    bus = open_bus(EmbeddedConfig(claim_s=1.0), folder)
    invite(folder, "run", bus.config, record(folder, tracking))
    port = BusPort(bus, "run", COLUMNS)
    trainer = ScriptedTrainer(port, TICKS, step_s=0.01)
    operator = bus.producer("commands", "run", "operator")
    track = started("tracker", folder)
    trainer.start()
    for tick in range(TICKS):
        operator.publish(Germinate(id=f"g{tick}", site="fc1", seed=tick % 6))
        assert operator.flush(5)
        while not port.state()["due"]:
            time.sleep(0.005)
        if kills and tick % (TICKS // kills) == TICKS // kills - 1:
            time.sleep(3)  # long enough that it has written something
            track.kill()
            track.wait()
            track = started("tracker", folder)
        trainer.step()
    trainer.end()
    assert track.wait(90) == 0, track.stderr.read()
    bus.close()
    return tables(folder)


@pytest.mark.e2e
def test_an_external_tracker_killed_and_restarted_leaves_the_history_of_an_undisturbed_one(tmp_path):
    tracking = {"name": "mlflow", "process": "external", "figures": False, "model": False, "system_s": 0.0}
    undisturbed = train_tracked(tmp_path / "calm", 0, tracking)
    assert len(undisturbed["transitions"]) > 20
    assert len(undisturbed["seeds"]) == TICKS * 6
    assert train_tracked(tmp_path / "killed", 1, tracking) == undisturbed
    calm, killed = history(tmp_path / "calm"), history(tmp_path / "killed")
    assert len(calm["train/loss"]) == TICKS
    assert killed == calm
