"""A user with the wheel and a package of their own in an otherwise empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

User = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def installed(processes: None, tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """The folder that the wheel, built from this checkout, was installed into; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=checkout, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """The user's folder: the package of the documentation's examples, and nothing else."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(checkout / "docs" / "examples" / "my_pkg", folder / "my_pkg", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def user(installed: Path, home: Path) -> User:
    """Runs ``esper`` from the wheel in the user's folder; ``allow`` is ``ESPER_ALLOW``."""

    def run(*words: str, allow: str = "my_pkg", timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(installed), "ESPER_ALLOW": allow}
        # as the console script starts it: the user's folder is not on the path
        start = "import sys; sys.path.remove('') if '' in sys.path else None; from esper.app import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", start, *words], cwd=home, env=environment, capture_output=True, text=True, timeout=timeout
        )

    return run
