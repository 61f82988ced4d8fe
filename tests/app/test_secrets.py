"""A secret that is configured by mistake is in nothing that a run leaves: no file, no output, no store; it is refused unrepeated."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper import secrets
from esper.app import main
from esper.bus.metrics import OtlpExporter
from esper.config import build
from esper.errors import UserError
from esper.tracking.mlflow_store import check_uri, quiet_client
from tests.here import here

SECRET = "hunter2-tr0ub4dor"

WORDS = {
    "bus password": ["bus=redis", f"bus.url=redis://me:{SECRET}@127.0.0.1:1/0"],
    "bus password alone": ["bus=redis", f"bus.url=rediss://:{SECRET}@host"],
    "bus password with odd characters": ["bus=redis", f"'bus.url=redis://me:a/?#@{SECRET}@host/0'"],
    "bus password in the query": ["bus=redis", f"bus.url=redis://127.0.0.1:1/0?password={SECRET}"],
    "bus without its scheme": ["bus=redis", f"bus.url=me:{SECRET}@127.0.0.1:1"],
    "server of runs": [f"tracking.uri=http://me:{SECRET}@127.0.0.1:1"],
    "server of runs with a token": [f"tracking.uri=http://127.0.0.1:1/?token={SECRET}"],
    "server of runs with a token before the host": [f"tracking.uri=https://{SECRET}@127.0.0.1:1"],
    "server of runs with a nameless query": [f"'tracking.uri=http://127.0.0.1:1/?{SECRET}'"],
    "server of runs with a fragment": [f"'tracking.uri=http://127.0.0.1:1/#{SECRET}'"],
    "database": [f"tracking.uri=postgresql://me:{SECRET}@127.0.0.1:1/runs"],
    "database in the query": [f"tracking.uri=mssql+pyodbc:///?odbc_connect=Server%3Dx%3BPWD%3D{SECRET}"],
    "collector": [f"bus.otlp=http://me:{SECRET}@127.0.0.1:1/v1/metrics"],
    "collector with a key": [f"bus.otlp=http://127.0.0.1:1/v1/metrics?api-key={SECRET}"],
    "own part": ["task=custom", "task.target=my_pkg.data:mine", f"task.args.api_key={SECRET}"],
    "own part, in braces": ["task=custom", "task.target=my_pkg.data:mine", f"task.args={{hub:{{password:{SECRET}}}}}"],
    "a list": [f"tags=[a,'https://me:{SECRET}@host/x']"],
    "Hydra's": [f"hydra.run.dir=s3://me:{SECRET}@host/x"],
    "a sweep": ["-m", "seed=0,1", f"tracking.uri=http://127.0.0.1:1,http://me:{SECRET}@127.0.0.1:1"],
    "a sweeper's": ["hydra.mode=MULTIRUN", f"hydra.sweeper.params={{seed:'0,1',bus.otlp:'http://a:{SECRET}@x/'}}"],
    "a mistake beside it": ["modell=mlp", f"bus.url=redis://me:{SECRET}@127.0.0.1:1/0"],
    "a word that is none": [f"redis://me:{SECRET}@127.0.0.1:1/0"],
    "an option that is none": [f"--uri=redis://me:{SECRET}@127.0.0.1:1/0"],
    "check": ["check", f"tracking.uri=http://me:{SECRET}@127.0.0.1:1"],
    "compare": ["compare", "sweep=x", f"uri=http://me:{SECRET}@127.0.0.1:1"],
    "resume": ["resume=outputs/x", f"tracking.uri=http://me:{SECRET}@127.0.0.1:1"],
}


def nowhere(folder: Path, said: str) -> None:
    """Neither in any file under ``folder`` nor in ``said``, in any of the ways in which it could be written."""
    written = (SECRET, base64.b64encode(SECRET.encode()).decode().rstrip("="))
    for form in written:
        assert form not in said
        for path in folder.rglob("*"):
            assert form not in path.name
            if path.is_file():
                assert form.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_secret_on_the_command_line_is_refused_and_left_nowhere(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here(*words)
    assert ended.returncode == 2
    assert ended.stdout == "" and len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("esper: ")
    nowhere(tmp_path, ended.stderr + caplog.text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        f"tracking: {{uri: 'http://me:{SECRET}@127.0.0.1:1'}}",
        f"bus: {{otlp: 'http://127.0.0.1:1/?token={SECRET}'}}",
        "tracking: {uri: '${oc.env:STORE}'}",
        "tracking: {uri: 'http://me:${oc.env:WORD}@127.0.0.1:1'}",
    ],
    ids=["tracking", "bus", "environment", "part of it from the environment"],
)
def test_a_secret_in_a_file_or_read_from_the_environment_is_refused_and_left_nowhere(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE", f"http://me:{SECRET}@127.0.0.1:1")
    monkeypatch.setenv("WORD", SECRET)
    folder, work = tmp_path / "conf" / "experiment", tmp_path / "work"
    folder.mkdir(parents=True)
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "esper.yaml").write_text("env: [STORE, WORD]", encoding="utf-8")
    (folder / "mine.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    ended = here("--config-dir", str(tmp_path / "conf"), "experiment=mine", "debug=tiny")
    assert ended.returncode == 2 and "which would be written into every saved config" in ended.stderr
    nowhere(work, ended.stdout + ended.stderr)
    assert [path.name for path in work.iterdir()] == ["esper.yaml"]


def test_a_secret_in_a_run_that_goes_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"bus": {"name": "redis", "url": f"redis://:{SECRET}@127.0.0.1"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    ended = here(f"resume={tmp_path}")
    assert ended.returncode == 2 and SECRET not in ended.stdout + ended.stderr


def test_programs_that_are_given_addresses_without_a_configuration_refuse_secrets_too() -> None:
    for call in (
        lambda: check_uri(f"http://me:{SECRET}@127.0.0.1:1", "tracking.uri", "or"),
        lambda: OtlpExporter(f"http://127.0.0.1:1/?key={SECRET}", "run", "redis", list, None),  # type: ignore[arg-type]
        lambda: build({"tags": [f"https://me:{SECRET}@host"]}),
    ):
        with pytest.raises(UserError, match="which would be written into every saved config") as refused:
            call()
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(
            ("tracking.uri", uri)
            for uri in ("sqlite:////home/me@work/a:b/mlflow.db", "postgresql://me@host/runs?sslmode=require", "http://host:5000")
        ),
        *(("bus.url", url) for url in ("redis://127.0.0.1:6379/0", "rediss://[::1]:6379/0")),
        *(("task.args.source", url) for url in ("https://host/package@2/x?download=1", "me@example.org", "a:b")),
        *((key, "x") for key in ("task.args.pad_token", "task.args.tokens", "bus.tls_key", "task.args.key", "model.args.passes")),
        ("model.target", "my_pkg.nets:MyNet"),
        ("output", "/home/me@work/runs"),
    ],
)
def test_what_is_no_secret_is_taken(key: str, text: str) -> None:
    secrets.check(key, text)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a server of MLflow's protocol, and the logins that it was given."""
    logins: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.append(self.headers.get("Authorization", ""))
            body = json.dumps({"experiment": {"experiment_id": "1", "name": "esper", "lifecycle_stage": "active"}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", logins
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("heavy_libraries")
@pytest.mark.parametrize("way", ["variables", "netrc"])
def test_a_login_from_the_environment_or_netrc_reaches_the_store(
    way: str, asked: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, logins = asked
    if way == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n", encoding="utf-8")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert quiet_client(uri).get_experiment_by_name("esper") is not None
    assert logins[0] == "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()


@pytest.mark.usefixtures("whole_runs")
def test_nothing_of_a_finished_run_holds_what_the_environment_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ESPER_BUS_PASSWORD", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "OTEL_EXPORTER_OTLP_HEADERS"):
        monkeypatch.setenv(name, SECRET)
    quick = ["trainer.steps=100", "trainer.control=false", "tracking.system_s=0", "tracking.figures=false", "tracking.model=false"]
    assert main(quick) == 0
    out, err = capfd.readouterr()
    assert list(tmp_path.rglob("mlflow.db")) and list(tmp_path.rglob(".hydra/config.yaml"))
    nowhere(tmp_path, out + err)


def test_a_sentence_that_repeats_an_address_shows_no_secret() -> None:
    for told in (f"no bus at redis://me:{SECRET}@host", f"http://host/?token={SECRET} does not answer", f"'me:{SECRET}@host' is none"):
        shown = secrets.redacted(told)
        assert SECRET not in shown and "host" in shown
    plain = "name=[a cannot be read as key=value; see docs/own-parts.md"
    assert secrets.redacted(plain) == plain
