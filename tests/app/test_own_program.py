"""A program of the user's own: named in ``esper.yaml``, from a package that was allowed, and from nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from esper.app import main

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMED = "programs: {census: 'my_pkg.programs:census'}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that esper is started in, with the documentation's package in it."""
    shutil.copytree(EXAMPLES / "my_pkg", tmp_path / "my_pkg", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ESPER_ALLOW", raising=False)
    return tmp_path


def test_a_program_of_esper_yaml_is_called_with_its_words_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "esper.yaml").write_text(f"allow: [my_pkg]\n{NAMED}")
    (home / "out" / "run").mkdir(parents=True)
    summary = {"run": "run", "seeds": {"germinated": 3, "fossilized": 2}}
    (home / "out" / "run" / "summary.json").write_text(json.dumps(summary))
    assert main(["census", "out"]) == 0
    assert capsys.readouterr().out == "run: 3 germinated, 2 kept\n"
    assert main(["census"]) == 2
    assert capsys.readouterr().err == "esper: esper census takes one folder, as in: esper census outputs.\n"
    assert main(["--help"]) == 0
    assert "census       my_pkg.programs:census, of esper.yaml" in capsys.readouterr().out
    assert main(["sensus"]) == 2
    assert "did you mean census?" in capsys.readouterr().err


def test_the_package_may_be_allowed_in_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "esper.yaml").write_text(NAMED)
    monkeypatch.setenv("ESPER_ALLOW", "my_pkg")
    assert main(["census", "."]) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (NAMED, "programs.census=my_pkg.programs:census would import 'my_pkg', which nobody allowed"),
        ("allow: [my_pkg]\nprograms: {census: 'my_pkg.programs:read_summary'}", "is defined in 'esper.report.summary_file', which nobody"),
        ("allow: [my_pkg]\nprograms: {census: 'my_pkg.trackers:Diary'}", "is a class; it must be a function"),
        ("allow: [my_pkg]\nprograms: {census: 'my_pkg.programs'}", "takes package.module:Name"),
        ("allow: [my_pkg]\nprograms: {export: 'my_pkg.programs:census'}", "calls a program export, and esper has one of that name"),
        ("allow: [my_pkg]\nprograms: [census]", "esper.yaml must hold programs by name"),
        ("allow: [my_pkg]\nprograms: {'a b': 'my_pkg.programs:census'}", "esper.yaml must hold programs by name"),
        ("allow: [my_pkg]\nprograms: {census: 3}", "esper.yaml must hold programs by name"),
    ],
)
def test_what_is_not_allowed_or_no_program_is_refused(text: str, sentence: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "esper.yaml").write_text(text)
    assert main(["census", "."]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("esper: ") and sentence in said and len(said.splitlines()) == 1
