"""``esper export`` of runs that did not finish: the model of the newest whole checkpoint, and a sentence where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from esper import load_model
from esper.checkpoint import disk
from esper.cli.export import main
from esper.cli.resume import resume
from esper.errors import UserError
from esper.running.builders import build_trainer
from tests.resume import killing
from tests.resume.conftest import Configure


@pytest.fixture(scope="module")
def killed(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed, with a seed blended by then."""
    output = tmp_path_factory.mktemp("killed")
    config, folder = configure(f"output={output}"), output / "day" / "run"
    folder.mkdir(parents=True)
    assert killing.child(lambda: killing.start(config, folder), output / "log", kill_when=killing.reached(folder, 48)).code == -9
    return folder


def as_resumed(folder: Path) -> torch.nn.Module:
    """What a run resumed from this folder would export at once."""
    start = resume(folder)
    return build_trainer(start.config, start.config.task.build(), torch.device("cpu"), state=start.state["trainer"]).grow.export().eval()


def test_a_killed_run_gives_the_model_of_its_newest_checkpoint(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = int(disk.checkpoints(killed / disk.FOLDER)[-1].name)
    assert main([f"run={killed}", "format=safetensors"]) == 0
    said = capsys.readouterr()
    assert f"this is the model of {killed} after step {step}" in said.err
    folder = killed / f"model-at-{step}"
    assert said.out.split() == [str(folder / "model.safetensors"), str(folder / "model.json")]
    expected, loaded = as_resumed(killed), load_model(folder)
    assert [*expected.state_dict()] == [*loaded.state_dict()]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.state_dict().items())
    assert not (killed / "model").exists(), "the run's own model is only written by its end"


def test_it_comes_as_a_program_in_a_folder_of_the_users(killed: Path, tmp_path: Path) -> None:
    main([f"run={killed}", "format=pt2", f"to={tmp_path / 'mine'}"])
    program = torch.export.load(tmp_path / "mine" / "model.pt2").module()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(x), as_resumed(killed)(x))


def test_one_checkpoint_can_be_named_and_a_damaged_one_is_passed_over(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    *earlier, newest = disk.checkpoints(folder / disk.FOLDER)
    main([f"run={earlier[0]}", "format=safetensors", f"to={tmp_path / 'early'}"])
    assert f"after step {int(earlier[0].name)};" in capsys.readouterr().err
    (newest / "tensors.safetensors").write_bytes(b"torn")
    main([f"run={folder}", "format=safetensors", f"to={tmp_path / 'late'}"])
    said = capsys.readouterr().err
    assert f"{newest} cannot be used" in said and f"after step {int(earlier[-1].name)};" in said
    with pytest.raises(UserError, match="cannot be used"):
        main([f"run={newest}"])


def test_a_run_without_any_checkpoint_gets_a_sentence(killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    shutil.rmtree(folder / disk.FOLDER)
    with pytest.raises(UserError, match=rf"{folder} has neither finished nor saved a checkpoint, so there is no model yet"):
        main([f"run={folder}"])
    with pytest.raises(UserError, match="holds no saved model"):
        main([f"run={tmp_path}"])


def test_a_finished_run_gives_its_own_model_and_says_nothing(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"run={finished}", "format=safetensors", f"to={tmp_path}"])
    assert capsys.readouterr().err == ""
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
