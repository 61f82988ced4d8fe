"""One configuration, one fingerprint, whatever does not belong to the computation."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from esper.bus.server.embedded import EmbeddedServer
from esper.checkpoint import disk
from esper.compare.fingerprint import explain, same_bits
from esper.inventory.diff_command import main as compare
from esper.report.summary_file import read_summary
from esper.running.run import run
from tests.resume.conftest import Configure, copied

AXES = {
    "again": (),
    "loader processes": ("trainer.num_workers=4",),
    "tracking off": ("tracking=none",),
    "a server as bus": ("bus=embedded",),
    "no checkpoints": ("trainer.checkpoint_every=''",),
    "no governor": ("trainer.governor=false",),
    "an MLflow store": ("tracking=mlflow", "tracking.figures=false", "tracking.model=false", "tracking.system_s=0"),
}


@pytest.mark.parametrize("words", AXES.values(), ids=AXES.keys())
def test_the_bits_do_not_depend_on(words: tuple[str, ...], configure: Configure, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    run(configure(*words, f"output={tmp_path}"), folder, quiet=True)
    assert read_summary(folder)["seeds"]["germinated"] > 0
    assert same_bits(folder, finished)


@pytest.mark.server
def test_the_bits_do_not_depend_on_a_server_elsewhere_that_holds_the_bus(
    configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = EmbeddedServer(tmp_path / "server"), tmp_path / "day" / "run"
    monkeypatch.setenv("ESPER_BUS_PASSWORD", server.note.password)
    try:
        words = ("bus=redis", f"bus.url=redis://127.0.0.1:{server.note.tcp_port}/0", "controller.timing=lockstep")
        run(configure(*words, f"output={tmp_path}"), folder, quiet=True)
    finally:
        server.stop()
    assert read_summary(folder)["bus"]["sent"] > 0
    assert same_bits(folder, finished)


class Collector(BaseHTTPRequestHandler):
    """Counts what an OpenTelemetry collector would take."""

    taken: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        """One export."""
        self.taken.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_the_bits_do_not_depend_on_exporting_telemetry(configure: Configure, finished: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scraped: list[bytes] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.01):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                scraped.append(answer.read())

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threads = [threading.Thread(target=work, daemon=True) for work in (scrape, collector.serve_forever)]
    for thread in threads:
        thread.start()
    words = (f"bus.metrics_port={port}", f"bus.otlp=http://127.0.0.1:{collector.server_port}/v1/metrics")
    run(configure(*words, f"output={tmp_path}"), tmp_path / "day" / "run", quiet=True)
    ended.set()
    collector.shutdown()
    for thread in threads:
        thread.join()
    collector.server_close()
    assert any(b"esper_seeds" in page for page in scraped) and Collector.taken
    assert same_bits(tmp_path / "day" / "run", finished)


def processor(folder: Path) -> str:
    """What a run was computed by."""
    return str(read_summary(folder)["environment"]["cpu"]["model"])


def test_the_first_difference_is_named(configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "day" / "run"
    run(configure("optimizer.lr=0.0031", f"output={tmp_path}"), folder, quiet=True)
    kinds = {difference.kind: difference.text for difference in explain(finished, folder)}
    assert "optimizer.lr is 0.003 and 0.0031" in kinds["config"]
    assert "at tick 5" in kinds["step"]
    assert kinds["weights"] == "at step 4 the host differs (fc1.weight); there is no earlier checkpoint that both have"
    (folder / "summary.json").write_text((folder / "summary.json").read_text().replace(processor(folder), "another one"))
    kinds = {difference.text for difference in explain(finished, folder) if difference.kind == "environment"}
    assert f"cpu.model is {processor(finished)} and another one" in kinds
    assert compare([str(finished), str(folder)]) == 1
    assert "not the same bits" in capsys.readouterr().out
    assert compare([str(finished), str(finished)]) == 0
    assert "same bits: " in capsys.readouterr().out


def test_what_is_missing_for_a_comparison_is_said(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "day" / "run"
    run(configure("optimizer.lr=0.0031", "trainer.checkpoint_every=7%", f"output={tmp_path}"), folder, quiet=True)
    shutil.rmtree(folder / disk.FOLDER)
    (folder / "metrics.parquet").write_bytes(b"PAR1 no more")
    kinds = {difference.kind: difference.text for difference in explain(finished, folder)}
    assert f"{folder / 'metrics.parquet'} cannot be read" in kinds["step"]
    assert "no step is left of which both have a checkpoint" in kinds["weights"]
    (folder / "metrics.parquet").unlink()
    assert compare([str(finished), str(folder)]) == 1
    assert f"cannot be told: {folder} has no metrics.parquet" in capsys.readouterr().out


def test_weights_are_called_equal_only_where_both_were_looked_at(configure: Configure, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "fingerprint": "another"}))
    assert not [difference for difference in explain(finished, folder) if difference.kind == "weights"]
    other = tmp_path / "other" / "run"
    run(configure("optimizer.lr=0.0031", f"output={tmp_path / 'other'}"), other, quiet=True)
    *_, before, latest = (path.name for path in disk.checkpoints(folder / disk.FOLDER))
    shutil.rmtree(folder / disk.FOLDER / latest)
    shutil.copytree(other / disk.FOLDER / latest, folder / disk.FOLDER / latest)
    (text,) = (difference.text for difference in explain(finished, folder) if difference.kind == "weights")
    assert text == f"at step 80 the host differs (fc1.weight); at step {int(before)} all were equal"
