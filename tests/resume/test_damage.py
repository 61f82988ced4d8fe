"""Files of a run that are damaged, a folder that goes away, a terminal without our letters: a sentence, and nothing lost."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.app import main
from esper.bus.server.producer import _epoch_in
from esper.cli.system_errors import say_anything
from esper.errors import UserError
from esper.running.checkpointing import Checkpointer
from esper.trainer.trainer import Trainer
from tests.resume.conftest import SHORT, copied

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "no UTF-8": lambda content: content[:40] + b"\xff\xfe" + content[40:],
    "a list": lambda content: b"- 1\n- 2\n",
    "numbers as keys": lambda content: b"1: 2\n" + content,
    "nested without end": lambda content: b"model: " + b"[" * 5000,
    "a tag": lambda content: b"model: !!python/object/apply:os.system [true]\n",
    "a group that is a number": lambda content: b"model: 3\n",
    "a key gone": lambda content: content.replace(b"\n  width:", b"\n  wdth:", 1),
    "a text for a number": lambda content: content.replace(b"seed: 0", b"seed: [x]", 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_config_is_refused_in_a_sentence(finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(finished, tmp_path, until=40)
    (folder / "config.yaml").write_bytes(DAMAGES[name]((folder / "config.yaml").read_bytes()))
    for words in ([f"resume={folder}"], [f"fork={folder}", "seed=1"], ["export", f"run={folder}"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("esper: ") and said.count("\n") == 1


def test_a_config_cut_anywhere_ends_in_no_traceback(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(finished, tmp_path)
    content, draws = (folder / "config.yaml").read_bytes(), random.Random(0)
    for cut in draws.sample(range(len(content) - 1), 25):
        (folder / "config.yaml").write_bytes(content[:cut])
        assert main([f"resume={folder}"]) == 2  # for the damage, or, where what was cut has its default, because it is finished
        assert capsys.readouterr().err.startswith("esper: ")


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", b"-1", "٣".encode()])
def test_a_damaged_epoch_note_is_said_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    assert _epoch_in(tmp_path / "epoch") == 0
    (tmp_path / "epoch").write_bytes(content)
    with pytest.raises(UserError, match=r"epoch is damaged: .* Write a number into it"):
        _epoch_in(tmp_path / "epoch")
    (tmp_path / "epoch").write_bytes(b"7\n")
    assert _epoch_in(tmp_path / "epoch") == 7


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_goes_away_ends_its_run_with_a_sentence(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not something of the run, a spool for example, makes a new one in its place."""
    folder, after = tmp_path / "day" / "run", Checkpointer.__call__

    def removed(self: Checkpointer, trainer: Trainer) -> None:
        after(self, trainer)
        if trainer.outcome.steps == 30:
            self.saver.wait()
            shutil.rmtree(folder)
            if again:
                folder.mkdir()

    monkeypatch.setattr(Checkpointer, "__call__", removed)
    assert main([*SHORT, f"output={tmp_path}", f"hydra.run.dir={folder}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"esper: {folder}: was removed while its run was under way; let a run keep its folder until it ends."
    assert not (folder / "summary.json").exists()


@pytest.mark.usefixtures("processes")
def test_a_deleted_current_folder_is_said(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    command = f'rmdir ../gone && exec "{sys.executable}" -m esper --help'
    environment = {"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path / "gone", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("esper: The current folder was deleted: change to one that there is")


def test_a_terminal_that_lacks_letters_and_words_that_are_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        patch.setattr(sys, "stdout", terminal)
        say_anything()
        print("gain ≥ 0.1 · 502 → 664", flush=True)
        assert terminal.buffer.getvalue().decode("latin-1") == "gain ? 0.1 · 502 ? 664\n"  # type: ignore[attr-defined]
    assert main(["name=\udcff"]) == 2
    assert r"esper: 'name=\udcff' is no UTF-8 text" in capsys.readouterr().err
