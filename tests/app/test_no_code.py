"""No configuration leads to code that the user did not allow: each way that was found is tried as an attacker would."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from esper.app import main
from esper.cli.compose import compose
from esper.config import plain
from esper.errors import UserError
from esper.user_code import decided, locate

EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Part:\n    def __init__(self, **given): pass\nCallback = Launcher = Part\n"
QUICK = ["debug=tiny", "tracking=none", "trainer.control=false"]


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the module ``evil_part``, which anyone could import, has run."""
    path = tmp_path / "it-ran"
    (tmp_path / "evil_part.py").write_text(EVIL.format(marker=str(path)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ESPER_ALLOW", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return path


WORDS = {
    "env_set": ["++hydra.job.env_set.ESPER_ALLOW=evil_part", "model=custom", "model.target=evil_part:Part"],
    "env_copy": ["hydra.job.env_copy=[ESPER_ALLOW]"],
    "chdir": ["hydra.job.chdir=true", "hydra.run.dir=.."],
    "callbacks": ["++hydra.callbacks.one={_target_: evil_part.Callback}"],
    "callbacks group": ["+hydra/callbacks=evil"],
    "launcher": ["hydra.launcher._target_=evil_part.Launcher"],
    "sweeper": ["-m", "seed=0,1", "hydra.sweeper._target_=evil_part.Part"],
    "part of a sweeper": ["-m", "seed=0,1", "++hydra.sweeper.sampler={_target_: evil_part.Part}"],
    "by interpolation": ["model=custom", "++model.args.part={_target_: evil_part.Part}", "hydra.launcher=${model.args.part}"],
    "job logging": ["++hydra.job_logging.handlers.terminal={'()': evil_part.Part}"],
    "log as esper.yaml": ["hydra.job_logging.handlers.file.filename=esper.yaml", "hydra.job_logging.formatters.file.format='allow: [os]'"],
    "hydra logging": ["++hydra.hydra_logging.handlers.x.class=evil_part.Part"],
    "search path": ["hydra.searchpath=[pkg://evil_part]"],
    "searched by a sweep": ["-m", "hydra.sweeper.params={hydra.searchpath: '[pkg://evil_part]'}"],
    "package": ["trainer@hydra.job=default"],
    "folder of the notes": ["hydra.output_subdir=../.."],
    "pickle": ["--experimental-rerun", "job.pickle"],
    "other files": ["--config-path", "elsewhere"],
    "not allowed": ["model=custom", "model.target=evil_part:Part"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_no_word_runs_code(words: list[str], marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith("esper: ") and len(said.splitlines()) <= 2 and "Traceback" not in said
    assert not marker.exists()


FILES = {
    "env_set": "hydra:\n  job:\n    env_set: {ESPER_ALLOW: evil_part}\nmodel: {target: 'evil_part:Part'}",
    "chdir": "hydra:\n  job:\n    chdir: true",
    "callbacks": "hydra:\n  callbacks:\n    one: {_target_: evil_part.Callback}",
    "launcher": "hydra:\n  launcher: {_target_: evil_part.Launcher}",
    "sweeper": "hydra:\n  sweeper: {params: {seed: '0,1'}, sampler: [{_target_: evil_part.Part}]}",
    "interpolation": "trainer: {steps: 3}\nhydra:\n  launcher: ${oc.create:'{_target_:evil_part.Launcher}'}",
    "job logging": "hydra:\n  job_logging:\n    handlers:\n      terminal: {(): evil_part.Part}",
    "hydra logging": "hydra:\n  hydra_logging:\n    handlers:\n      x: {class: evil_part.Part}",
    "search path": "hydra:\n  searchpath: ['pkg://evil_part']",
    "defaults": "defaults:\n  - override /hydra/hydra_logging: disabled",
    "subdir": "hydra:\n  output_subdir: ../..",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_no_file_of_a_config_dir_runs_code(text: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "model=custom" if "model:" in text else "model=mlp"
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    assert main(["--config-dir", str(tmp_path / "conf"), model, "experiment=evil", *QUICK]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("esper: ") and len(said.splitlines()) == 1
    assert not marker.exists()
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["hydra/launcher/evil.yaml", "hydra/job_logging/esper.yaml", "model/deep/evil.yaml"])
def test_a_config_dir_holds_groups_and_nothing_of_hydras(
    name: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text("_target_: evil_part.Launcher\n", encoding="utf-8")
    assert main(["--config-dir", str(tmp_path / "conf"), *QUICK]) == 2
    assert "belongs to no group" in capsys.readouterr().err
    assert not marker.exists()


def test_what_was_allowed_when_esper_started_is_what_counts(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with decided():
        monkeypatch.setenv("ESPER_ALLOW", "evil_part")
        Path("esper.yaml").write_text("allow: [evil_part]", encoding="utf-8")
        with pytest.raises(UserError, match="nobody allowed"):
            locate("evil_part:Part", "model.target")
    assert not marker.exists()
    assert locate("evil_part:Part", "model.target").__name__ == "Part"


@pytest.mark.parametrize("name", ["os.system", "system", "Path.unlink", "Mine.__init__.__globals__", "__loader__.set_data", "helper"])
def test_what_an_allowed_module_has_imported_is_not_allowed_with_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os\nfrom os import system\nfrom pathlib import Path\nfrom functools import partial\nhelper = partial(system)\n"
    (tmp_path / "mine_only.py").write_text(f"{text}class Mine:\n    def __init__(self): pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ESPER_ALLOW", "mine_only")
    assert locate("mine_only:Mine", "model.target").__name__ == "Mine"
    with pytest.raises(UserError, match=r"is defined in .*, which nobody allowed"):
        locate(f"mine_only:{name}", "model.target")


def test_a_configuration_reads_no_variable_of_the_environment_but_those_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    for word in ("output=${oc.env:SCRATCH}", "output=${oc.env:SCRATCH,runs}"):
        assert main(["check", word]) == 2
        said = capsys.readouterr().err
        assert "nobody allowed" in said and "env: [SCRATCH]" in said
    (tmp_path / "esper.yaml").write_text("env: [SCRATCH]", encoding="utf-8")
    assert compose(["output=${oc.env:SCRATCH}"]).output == str(tmp_path / "scratch")


@pytest.mark.parametrize("key", ["resume", "fork"])
def test_the_configuration_of_a_run_from_elsewhere_runs_no_code(key: str, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = plain(compose([*QUICK, "model=custom", "model.target=evil_part:Part", "model.args.hydra=1"]))
    tree["model"]["args"] = {"_target_": "evil_part.Part"}
    Path("config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main([f"{key}=."]) == 2
    assert not marker.exists()
    Path("config.yaml").write_text("!!python/object/apply:importlib.import_module [evil_part]\n", encoding="utf-8")
    assert main([f"{key}=."]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()


def test_what_hydra_may_be_told_is_still_taken() -> None:
    words = ["hydra.run.dir=here", "hydra.verbose=true", "hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweep.subdir=x"]
    assert compose([*words, "seed=3"]).seed == 3
