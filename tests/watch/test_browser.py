"""The page of ``esper watch --web`` in a real browser, beside a real run and a real sweep.

Needs Chromium; run it with ``pytest -m browser tests/watch/test_browser.py``. The screenshots are in ``outputs/screenshots``; that of the
run is shown in docs/runs.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.inventory.folder import entries
from esper.watch.feeds import FolderFeed
from esper.watch.views import RunView, SweepView, View
from esper.watch.web import Page, Server
from tests.compare.test_browser import page
from tests.watch.conftest import Told, story

pytestmark = pytest.mark.browser


@contextmanager
def serving(view: View) -> Iterator[str]:
    """The address of the view's page."""
    shared = Page(view)
    shared.look()
    server = Server(shared, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    for words in ((f"hydra.run.dir={folder}/run",), ("-m", "seed=0,1", "grafting=linear,drift", f"hydra.sweep.dir={folder}/sweep")):
        command = [sys.executable, "-m", "esper", *words, "trainer.steps=400", "tracking=csv", "trainer.control=false", f"output={folder}"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    return folder


def test_the_page_of_a_run_shows_its_curves_seeds_and_gates(outputs: Path) -> None:
    with serving(RunView("mlp-digits seed=0", FolderFeed(outputs / "run"))) as url:
        text = page(url, "watch-run", (0, 0, 1100, 1000), "1100,1250")
    assert "<title>finished · mlp-digits seed=0</title>" in text and text.count("<polyline") == 3
    for words in ("step 400 of 400", "<td>fossilized</td>", "<td>readiness</td>", "→ fossilized", "validation/accuracy: "):
        assert words in text


def test_the_page_of_a_sweep_shows_its_jobs(outputs: Path) -> None:
    assert len([entry for entry in entries(outputs) if entry.kind == "job"]) == 4
    with serving(SweepView(outputs / "sweep")) as url:
        text = page(url, "watch-sweep", (0, 0, 1100, 500), "1100,500")
    assert "4 of 4 jobs" in text and "<td>drift seed=1</td>" in text and "inconclusive" in text


def test_words_of_a_run_are_text_and_never_a_part_of_the_page() -> None:
    with serving(RunView("<img src=x onerror=alert(1)>", Told(story()))) as url:
        text = page(url, "watch-hostile", (0, 0, 1100, 900), "1100,900")
    assert "<title>running · &lt;img src=x" in text and "<img" not in text and "&lt;b&gt;slow&lt;/b&gt;" in text
