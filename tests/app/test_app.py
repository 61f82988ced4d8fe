"""The command line as a user meets it: help, programs, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from esper.app import main
from esper.cli import conf, programs
from esper.cli.compose import check_jobs, compose
from tests.here import here

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_help_lists_groups_options_programs_and_recipes(esper: Run) -> None:
    result = esper("--help")
    assert result.returncode == 0 and result.stderr == ""
    for group, names in conf.groups().items():
        assert group in result.stdout
        assert all(name in result.stdout for name in names)
    assert all(name in result.stdout for name in programs.PROGRAMS)
    assert "esper --multirun" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.usefixtures("processes")
def test_help_imports_nothing_that_takes_long(checkout: Path) -> None:
    """How long it takes is for `scripts/bench calls`."""
    code = "import sys; from esper.app import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "mlflow", "pandas", "redis", "sklearn", "scipy", "matplotlib", "hydra"} & set(done.stderr.split())


def test_every_recipe_of_the_help_is_accepted() -> None:
    from esper.cli.help import RECIPES

    for command in RECIPES:
        words = [word for word in command.split()[1:] if word not in (*programs.PROGRAMS, "--multirun", "--cfg", "job")]
        check_jobs(words, "--multirun" in command)


@pytest.mark.usefixtures("processes")
def test_a_reader_that_has_seen_enough_causes_no_traceback(tmp_path: Path, checkout: Path) -> None:
    command = "python -m esper --help | head -1 >/dev/null"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PATH": path}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stderr == ""


def test_cfg_prints_what_would_run(esper: Run, tmp_path: Path) -> None:
    result = esper("--cfg", "job", "grafting=drift", "grafting.threshold=0.5", "seed=7")
    assert result.returncode == 0
    tree = yaml.safe_load(result.stdout)
    assert (tree["seed"], tree["grafting"]["name"], tree["grafting"]["threshold"]) == (7, "drift", 0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_config_composes_into_dataclasses() -> None:
    config = compose(["model.width=5", "name=mine", "hydra.run.dir=elsewhere"])
    assert (config.model.width, config.name, config.task.name) == (5, "mine", "digits")
    assert compose([]).name == "mlp-digits"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/log"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_program_raises_becomes_a_sentence_and_a_code(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(words: Sequence[str]) -> int:
        raise raised

    monkeypatch.setitem(programs.PROGRAMS, "raise", SimpleNamespace(load=lambda: program))
    assert main(["raise"]) == code
    sentence = capsys.readouterr().err
    assert sentence.startswith("esper: ") and len(sentence.splitlines()) == 1
    if code == 1:
        assert "/full/log: no space left on device; free some space, or set output=<another folder>." in sentence


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(words: Sequence[str]) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setitem(programs.PROGRAMS, "break", SimpleNamespace(load=lambda: program))
    with pytest.raises(OSError, match="broken"):
        main(["break"])


def test_sigterm_ends_with_143(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def program(words: Sequence[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    monkeypatch.setitem(programs.PROGRAMS, "wait", SimpleNamespace(load=lambda: program))
    try:
        assert main(["wait"]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "esper: ended by SIGTERM\n"


def test_an_output_folder_that_cannot_be_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    result = here("output=file/runs")
    assert result.returncode == 1
    assert "set output=<another folder>" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_an_option_named_like_a_number_is_an_option(esper: Run) -> None:
    assert compose(["debug=nan"]).debug == "nan"
    check_jobs(["debug=nan,tiny"], multirun=True)
    assert yaml.safe_load(esper("--cfg", "job", "debug=nan").stdout)["trainer"]["detect_anomaly"] is True


def test_settings_that_hold_keys_are_typed_in_braces() -> None:
    depending = ["compare.final_of={a:b}", "compare.equal_macs={a:b/c}", "compare.fresh_seeds={a:9}"]
    compare = compose(["compare.tune={optimizer.lr:[0.001,0.003]}", *depending]).compare
    assert (compare.tune, compare.final_of) == ({"optimizer.lr": [0.001, 0.003]}, {"a": "b"})
    assert (compare.equal_macs, compare.fresh_seeds) == ({"a": "b/c"}, {"a": 9})
    assert compose(["experiment=aa", "compare.fresh_seeds={again:9}"]).compare.fresh_seeds == {"again": 9}


@pytest.mark.slow  # seconds of computing
def test_a_sweep_is_checked_value_by_value_also_when_a_file_asks_for_it() -> None:
    check_jobs(["seed=range(0,3)", "grafting=linear,drift"], multirun=True)
    check_jobs(["hydra.mode=MULTIRUN", "+hydra.sweeper.params.seed='1,2'"], multirun=False)
    check_jobs(["experiment=controls", "seed=0,1"], multirun=False)
    from esper.errors import UserError

    with pytest.raises(UserError, match="add --multirun"):
        check_jobs(["seed=0,1"], multirun=False)
    with pytest.raises(UserError, match="seed=x is not accepted"):
        check_jobs(["hydra.mode=MULTIRUN", "+hydra.sweeper.params.seed='1,x'"], multirun=False)
