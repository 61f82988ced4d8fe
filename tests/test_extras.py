"""A library that is missing and one that is broken are two things, and each is told by its own sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.cli.system_errors import missing_package
from esper.errors import UserError
from esper.extras import import_extra


def test_a_library_that_is_absent_is_named_with_what_installs_it() -> None:
    with pytest.raises(
        UserError, match=r"^x=y needs the package no_such_lib, which is not installed: pip install 'some\[lib\]', or use x=z\.$"
    ):
        import_extra("no_such_lib.part", "x=y", "some[lib]", otherwise="use x=z")


@pytest.mark.parametrize("broken", ["import no_such_dependency", "raise ImportError('libfoo.so.1: cannot open shared object file')"])
def test_a_library_that_is_broken_is_not_called_absent(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_lib.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"is installed but cannot be imported .*(no_such_dependency|libfoo).*--force-reinstall lib"):
        import_extra("broken_lib", "x=y", "lib")


def test_a_part_that_is_missing_inside_of_a_library_is_no_missing_library() -> None:
    assert "esper-grow[search]" in missing_package(ModuleNotFoundError(name="optuna"))
    assert not missing_package(ModuleNotFoundError(name="optuna.no_such_part"))
    assert not missing_package(ModuleNotFoundError(name="the_users_own"))
