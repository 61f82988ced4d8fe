"""A finished sweep in MLflow's own pages, and the page of a comparison by itself, in a real browser.

Needs Chromium and a minute; run it with ``pytest -m browser tests/compare/test_browser.py``. The screenshots are in
``outputs/screenshots``; two of them are shown in docs/comparing.md, one in docs/verdicts.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from esper.compare import judge
from esper.compare.sources.mlflow_reader import reading
from esper.compare.sources.mlflow_sweeps import find_sweep, job_runs
from esper.compare.statistics.random_draws import generator

pytestmark = pytest.mark.browser
SCREENSHOTS = Path("outputs/screenshots").resolve()
ARMS = ("0.001 grafting=linear", "0.001 grafting=drift", "0.003 grafting=linear", "0.003 grafting=drift")
SHOWN = (0, 0, 1110, 1000)  # a screenshot's part without MLflow's assistant
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    words = ["-m", "optimizer.lr=0.001,0.003", "grafting=linear,drift", "seed=0,1,2", "trainer.steps=150", f"output={folder}"]
    subprocess.run([sys.executable, "-m", "esper", *words, f"hydra.sweep.dir={folder}/s"], check=True, env=ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """The folder of a store with a made-up sweep of 1,000 runs, that of experiments/compare_speed."""
    spec = importlib.util.spec_from_file_location("compare_speed", checkout / "experiments" / "compare_speed" / "run.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    folder = tmp_path_factory.mktemp("large")
    study.fill(folder, 1_000)
    return folder


@pytest.fixture(scope="module")
def server(sweep: Path) -> Iterator[str]:
    with serving(sweep) as url:
        yield url


@contextmanager
def serving(sweep: Path) -> Iterator[str]:
    """MLflow's own server over the store in this folder; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{sweep}/mlflow.db", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)], cwd=sweep, env=ENVIRONMENT)
    url = f"http://127.0.0.1:{port}"
    _wait_for(url, process)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the MLflow server ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError("the MLflow server did not answer within two minutes")


def page(url: str, name: str, shown: tuple[int, int, int, int] = SHOWN, window: str = "1500,1400") -> str:
    """What the page says once its scripts have run; keeps a screenshot beside it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium on PATH; install one, e.g. apt-get install chromium"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    base = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={window}", "--timeout=60000"]
    base += ["--virtual-time-budget=60000"]
    subprocess.run([*base, f"--screenshot={SCREENSHOTS / name}.png", url], check=True, stderr=subprocess.DEVNULL)
    with Image.open(SCREENSHOTS / f"{name}.png") as whole:
        whole.crop(shown).quantize(64).save(SCREENSHOTS / f"{name}.png", optimize=True)
    done = subprocess.run([*base, "--dump-dom", url], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode()


#: Says in the page's title whether Bokeh has drawn everything.
PROBE = """<script>(function wait() {
  const drawn = window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle);
  if (drawn) document.title = "drawn: " + document.querySelectorAll(".bk-Figure").length + " figures"; else setTimeout(wait, 20);
})();</script></body>"""


def two_hundred_runs() -> pd.DataFrame:
    """Two tasks, two arms, 50 seeds, 100 steps."""
    rng, steps, frames = generator("page"), np.arange(100), []
    for task, level in (("digits", 0.9), ("mnist1d", 0.6)):
        for seed, shared in enumerate(rng.normal(0, 0.02, 50)):
            for lr in (0.1, 0.01):
                values = level + shared + 0.015 * (lr == 0.1) - 0.3 * np.exp(-steps / 15) + rng.normal(0, 0.004, 100)
                frames.append(pd.DataFrame({"task": task, "lr": lr, "seed": seed, "step": steps, "val_acc": values}))
    return pd.concat(frames).assign(seconds=lambda frame: 60 + 0.1 * frame["step"] + 20 * (frame["lr"] == 0.1))


def test_the_page_of_two_hundred_runs_stands_alone_and_draws_itself(tmp_path: Path) -> None:
    frame = two_hundred_runs()
    judged = judge(frame, arm="lr", pair="seed", metric="val_acc", block="task", step="step", cost="seconds")
    text = judged.html()
    assert len(text.encode()) <= 3_000_000
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE))
    shown = page((tmp_path / "page.html").as_uri(), "verdicts", (0, 0, 1100, 1500), "1100,1500")
    assert "<title>drawn: 8 figures</title>" in shown  # differences; runs, cost and curves of two tasks; profiles
    for words in ("lr=0.1 is better than lr=0.01 over all 2 blocks", "Exploratory: no plan was registered", "Curves, mnist1d"):
        assert words in shown


def test_the_compare_page_and_its_parallel_coordinates_show_the_arms_by_name(sweep: Path, server: str) -> None:
    folders = sorted(sweep.glob("s/*/mlflow.json"))
    notes = [json.loads(path.read_text()) for path in folders]
    runs, experiments = json.dumps([note["run"] for note in notes]), json.dumps([notes[0]["experiment"]])
    query = urllib.parse.urlencode({"runs": runs, "experiments": experiments})
    text = page(f"{server}/#/compare-runs?{query}", "compare")
    for name in (*(f"optimizer.lr={arm} seed={seed}" for arm in ARMS for seed in (0, 1, 2)), "Parallel Coordinates Plot"):
        assert name in text
    plot = text[text.index("Parallel Coordinates Plot") : text.index("Run details")]
    for label in (">arm<", ">0.001 line<", ">0.001 drif<", ">0.003 line<", ">0.003 drif<", ">grafting.name<"):
        assert label in plot.replace("<!-- -->", "")


def test_the_sweep_is_one_run_that_names_its_arms(sweep: Path, server: str) -> None:
    parent = json.loads((sweep / "s" / "sweep.json").read_text())["parent"]
    note = json.loads(next(sweep.glob("s/*/mlflow.json")).read_text())
    text = page(f"{server}/#/experiments/{note['experiment']}/runs/{parent}/artifacts/comparison.txt", "sweep")
    for name in ("mlp-digits sweep: optimizer.lr=0.001 grafting=linear, ", "comparison.json", "comparison.txt", "figures", "reference"):
        assert name in text


def test_mlflow_shows_the_page_of_the_comparison_among_the_sweeps_files(sweep: Path, server: str) -> None:
    parent = json.loads((sweep / "s" / "sweep.json").read_text())["parent"]
    note = json.loads(next(sweep.glob("s/*/mlflow.json")).read_text())
    text = page(f"{server}/#/experiments/{note['experiment']}/runs/{parent}/artifacts/comparison.html", "sweep-comparison")
    assert "comparison.html" in text and "<iframe" in text


def test_the_page_of_a_sweep_of_a_thousand_runs_opens_and_so_does_the_list_of_runs(large: Path) -> None:
    with reading(f"sqlite:///{large}/mlflow.db") as reader:
        parent = find_sweep(reader, "speed")
        assert len(job_runs(reader, parent)) == 1_000
    place = f"#/experiments/{parent.experiment}/runs"
    with serving(large) as url:
        text = page(f"{url}/{place}/{parent.id}", "large-sweep")
        listed = page(f"{url}/{place}", "large-list")
    for shown in (parent.name, "esper.plan.0", "Child runs", "arm3 seed=249", "Load more"):
        assert shown in text
    assert f"runs/{parent.id}" in listed and "matching runs" in listed
