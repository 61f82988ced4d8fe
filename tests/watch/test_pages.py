"""The page in the terminal, its lines in a pipe, and the page for a browser."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from rich.console import Console

from esper.messages import Message
from esper.watch.terminal import sparkline, watch
from esper.watch.views import RunView
from esper.watch.web import Page, Server
from tests.watch.conftest import Told, story


def drawn(view: RunView, once: bool, terminal: bool) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return watch(view, once, console=console, sleep=lambda _: None), out.getvalue()


def test_the_page_shows_seeds_gates_losses_alerts_and_the_time_left() -> None:
    code, text = drawn(RunView("mine", Told(story())), once=True, terminal=False)
    assert code == 0
    for words in (
        "RUNNING 10/20",
        "0:01 left",
        "train/loss",
        "1 → 0.1",
        "fc1",
        "grafting",
        "readiness",
        "1 of 2",
        "the disk is <b>slow</b>",
    ):
        assert words in text
    assert "tick 6: fc1 seed 1 training → grafting (gate passed)" in text and "\x1b" not in text


def test_a_terminal_is_drawn_again_until_the_run_has_ended(ended: list[Message]) -> None:
    code, text = drawn(RunView("mine", Told(ended[:5], ended[5:-1], ended[-1:])), once=False, terminal=True)
    assert code == 0 and "RUNNING 2/20" in text and "RUNNING 10/20" in text and "FINISHED 20/20" in text


def test_a_pipe_gets_lines_and_every_piece_of_news_once(ended: list[Message], capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = drawn(RunView("mine", Told(ended[:5], ended[5:-1], ended[-1:])), once=False, terminal=False)
    said = capsys.readouterr().out.splitlines()
    assert code == 0 and said[-1].startswith("FINISHED 20/20 · train loss 0.1 · validation accuracy 0.75")
    assert sum("→ grafting" in line for line in said) == 1 and sum("the disk" in line for line in said) == 1


def test_a_run_that_did_not_finish_has_exit_code_one(ended: list[Message]) -> None:
    from esper.messages import RunEnded

    view = RunView("mine", Told([*ended[:-1], RunEnded(tick=11, status="FAILED", summary={})]))
    assert drawn(view, once=False, terminal=True)[0] == 1


def test_sparklines_have_the_width_that_there_is() -> None:
    assert sparkline([0.0, 1.0], 8) == "▁█" and len(sparkline([float(i) for i in range(999)], 30)) == 30
    assert sparkline([2.0, 2.0], 8) == "▁▁"


@pytest.fixture
def served() -> Iterator[Server]:
    page = Page(RunView("mine", Told(story())))
    page.look()
    server = Server(page, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_is_served_on_loopback_with_nothing_from_elsewhere(served: Server) -> None:
    assert served.server_address[0] == "127.0.0.1"
    with urllib.request.urlopen(served.url) as answer:
        text, headers = answer.read().decode(), answer.headers
    assert "<title>esper watch</title>" in text and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    with urllib.request.urlopen(f"{served.url}state.json") as answer:
        assert json.load(answer)["tick"] == 10


@pytest.mark.parametrize(
    ("path", "method", "host", "code"),
    [
        ("etc/passwd", "GET", None, 404),
        ("../state.json", "GET", None, 404),
        ("state.json", "POST", None, 501),
        ("state.json", "DELETE", None, 501),
        ("state.json", "GET", "evil.example", 421),
    ],
)
def test_everything_else_is_refused(served: Server, path: str, method: str, host: str | None, code: int) -> None:
    request = urllib.request.Request(served.url + path, method=method, headers={"Host": host} if host else {})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == code
