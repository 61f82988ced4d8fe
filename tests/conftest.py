"""Fixtures that several folders share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.here import restored

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run in its interpreter

Run = Callable[..., "subprocess.CompletedProcess[str]"]

#: The files that take longest, the longest first: begun last, they would leave the other processes of ``scripts/test`` without work.
LONGEST = (
    "compare/test_sweep.py",
    "compare/sweep/test_resume.py",
    "e2e/test_sweep_recipes.py",
    "e2e/test_external.py",
    "e2e/test_recipes.py",
    "repro/test_fingerprints.py",
    "bus/programs/test_programs.py",
    "custom/test_user.py",
    "bus/test_chaos.py",
    "resume/test_chaos.py",
    "app/test_interrupt.py",
    "e2e/test_growth.py",
    "tracking/in_mlflow/test_remote.py",
    "tracking/in_mlflow/test_run.py",
    "tracking/in_mlflow/test_store.py",
    "custom/test_controls.py",
    "kernels/test_branches.py",
    "library/test_compiled.py",
    "compare/test_studies.py",
    "resume/test_same_bits.py",
    "e2e/test_bad_input.py",
    "scripts/test_bench.py",
)


#: Marks and fixtures whose tests ``scripts/test quick`` leaves out. A fixture counts wherever it stands in a test's chain of fixtures.
SLOW = {"e2e", "server", "processes", "heavy_libraries", "whole_runs"}

#: Libraries that take seconds to import. A file that imports one at its top is not read in a quick run.
HEAVY = ("accelerate", "lightning", "mlflow", "onnx", "onnxruntime", "peft", "transformers", "torch._inductor.compile_fx")
_IMPORTS_HEAVY = re.compile(rf"^(?:import|from) (?:{'|'.join(map(re.escape, HEAVY))})\b", re.MULTILINE)


def _quick(config: pytest.Config) -> bool:
    """Whether the slow tests are left out."""
    return "not slow" in config.option.markexpr


def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw fewer examples in a quick run."""
    from hypothesis import settings

    import tests.examples  # noqa: F401  the two profiles

    settings.load_profile("quick" if _quick(config) else "whole")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file is passed over: it is not even imported."""
    if collection_path.suffix == ".py" and _quick(config) and _IMPORTS_HEAVY.search(collection_path.read_text(encoding="utf-8")):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow tests, and puts the longest files first; the tests of a file stay in their order."""
    for item in items:
        if SLOW & {*getattr(item, "fixturenames", ()), *(mark.name for mark in item.iter_markers())}:
            item.add_marker("slow")
    here = Path(__file__).resolve().parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def processes() -> None:
    """For tests and fixtures that start other processes, servers included: ``scripts/test quick`` leaves them out."""


@pytest.fixture(scope="session")
def heavy_libraries() -> None:
    """For tests and fixtures that use a library of ``HEAVY`` or torch's compiler: ``scripts/test quick`` leaves them out."""


@pytest.fixture(scope="session")
def whole_runs() -> None:
    """For tests and fixtures that train configured runs from their first line to their summary: ``scripts/test quick`` leaves them out."""


HARMLESS = {"git", "ldconfig", "uname"}
"""Programs that end at once; a quick test may ask them."""


@pytest.fixture(scope="session", autouse=True)
def quick_tests_are_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a quick run a test that starts a process or imports a heavy library fails, and so cannot forget to say that it does."""
    watching = _quick(request.config)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event == "subprocess.Popen" and Path(os.fspath(arguments[0])).name not in HARMLESS:
            pytest.fail(f"a quick test starts {arguments[1]}: let it use the fixture 'processes'")
        if event == "os.fork":
            pytest.fail("a quick test forks: let it use the fixture 'processes'")
        if event == "import" and arguments[0] in HEAVY:
            pytest.fail(f"a quick test imports {arguments[0]}: let it use the fixture 'heavy_libraries'")

    if watching:
        sys.addaudithook(audit)
    yield
    watching = False  # an audit hook cannot be taken away


WATCHED = 1
"""Cases of one test that coverage watches: further ones go through much the same lines, and watching takes half as long again."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Further cases of a parametrized test run unwatched; debuggers are left alone."""
    case, watching = getattr(item, "callspec", None), sys.gettrace()
    if case is None or max(case.indices.values(), default=0) < WATCHED or type(watching).__name__ != "CTracer":
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(watching)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top folder of the checkout under test."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def esper(processes: None, tmp_path: Path) -> Run:
    """Runs ``esper`` as a user would, in an empty folder, and returns exit code, stdout and stderr."""

    def run(*words: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "esper", *words]
        root = Path(__file__).resolve().parent.parent
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(root)
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def interrupted(processes: None, tmp_path: Path, checkout: Path) -> Callable[..., tuple[int, str]]:
    """Runs ``esper``, sends it a signal once it has shown something, and returns its exit code and what it said on stderr after that."""

    def run(words: list[str], shows: bytes, number: int) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "esper", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        assert process.stderr is not None
        shown = b""
        try:
            while shows not in shown:
                chunk = os.read(process.stderr.fileno(), 4096)
                assert chunk, shown.decode()
                shown += chunk
            process.send_signal(number)
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, rest.decode()

    return run


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """What the program does to its process, it does to a test's process until the test's end only."""
    with restored():
        yield


@pytest.fixture(scope="session", autouse=True)
def server_binary() -> Iterator[None]:
    """ESPER_TEST_SERVER=/usr/bin/redis-server: the tests start that server where they would start the packaged Valkey."""
    named = os.environ.get("ESPER_TEST_SERVER")
    with pytest.MonkeyPatch.context() as patch:
        if named:
            patch.setattr("esper.bus.server.embedded._binary", lambda: Path(named))
        yield
