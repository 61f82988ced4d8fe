"""The page for a browser: served on the loopback address alone, read-only, with nothing from anywhere else in it."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from esper.errors import UserError
from esper.watch.terminal import EVERY_S
from esper.watch.views import ENDED, View

HOST = "127.0.0.1"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


class Page:
    """The newest snapshot of a view, shared by the thread that looks and those that answer."""

    def __init__(self, view: View) -> None:
        self.html = (files("esper.watch") / "page.html").read_bytes()
        self._view, self._lock = view, threading.Lock()
        self._text, self.status = b"{}", ""

    def look(self) -> None:
        """Update the view and keep what it knows."""
        self._view.update()
        shown = self._view.snapshot()
        text = json.dumps(shown, allow_nan=False).encode()
        with self._lock:
            self._text, self.status = text, shown["status"]

    @property
    def text(self) -> bytes:
        """The snapshot as JSON."""
        with self._lock:
            return self._text


class Server(ThreadingHTTPServer):
    """Answers GET of the page and of its data; everything else is refused, and so is a page of another origin."""

    daemon_threads = True

    def __init__(self, page: Page, port: int) -> None:
        self.page = page
        super().__init__((HOST, port), Answer)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_address[1]}/"


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "esper", ""

    def do_GET(self) -> None:
        """The page, or its data as JSON."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):  # a name of another's that leads here (DNS rebinding)
            self._answer(421, "text/plain", b"esper watch answers on the loopback address alone\n")
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page.html)
        elif self.path == "/state.json":
            self._answer(200, "application/json", self.server.page.text)
        else:
            self._answer(404, "text/plain", b"there is / and /state.json\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store", "Content-Security-Policy": POLICY}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is the user's."""


def serve(view: View, port: int, every_s: float = EVERY_S, stop: threading.Event | None = None) -> int:
    """Serve the view until Ctrl-C, also after its end: whoever looks at the page wants to see it; returns 0.

    Raises:
        UserError: the port is taken.
    """
    page = Page(view)
    page.look()
    try:
        server = Server(page, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port} cannot be used ({error}); leave it out for a free one.") from error
    stop = stop or threading.Event()
    thread = threading.Thread(target=server.serve_forever, name="esper-watch", daemon=True)
    thread.start()
    print(f"watching at {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        while not stop.wait(every_s):
            if page.status not in ENDED:
                page.look()
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        server.server_close()
    return 0
