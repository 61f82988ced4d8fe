"""``esper watch [run or sweep]``: seeds, gates, losses, alerts and the time left, while it is under way."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from esper.errors import UserError
from esper.inventory.entries import SWEEP, Entry
from esper.inventory.filters import PLACES
from esper.inventory.find import find, read_targets
from esper.inventory.list_command import known
from esper.watch.feeds import FolderFeed, feed_elsewhere
from esper.watch.views import RunView, SweepView, View

SERVER = ("url", "tls_ca", "tls_cert", "tls_key")
OPTIONS = ("--once", "--web")
USAGE = """\
usage: esper watch [run or sweep] [--once] [--web] [key=value …]

  Follows a run or a sweep until it ends; Ctrl-C stops watching and leaves the run alone. Without a name it is the newest that is under
  way. A run or sweep is named by its folder, its name or its id, as esper list shows them. What a run tells comes from its bus where that
  is on a server (bus=embedded, bus=redis), else from the files that its tracker writes every few seconds.

  --once   draw the page once and end
  --web    a page for a browser instead, on this machine's loopback address alone and read-only
  port     of that page (default: a free one)
  output   folder of all outputs (default: outputs)

  A run elsewhere, on a bus that this machine reaches; user and password come from ESPER_BUS_USER and ESPER_BUS_PASSWORD:
  url      redis://… or rediss://…; the run is named as in its output folder, and may be left out where it is the only one
  tls_ca, tls_cert, tls_key   as of bus=redis

Exit code 0 if it finished, 1 if it failed, was stopped or died."""


def main(words: Sequence[str]) -> int:
    """Watch until the end."""
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    options = [word for word in words if word in OPTIONS]
    names, given = read_targets([word for word in words if word not in OPTIONS], "esper watch", 1, ("port", *SERVER, *PLACES))
    port = _port(given.pop("port", "0"), "--web" in options)
    with _view(names[0] if names else "", given) as view:
        if "--web" in options:
            from esper.watch.web import serve

            return serve(view, port)
        from esper.watch.terminal import watch

        return watch(view, "--once" in options)


def _port(text: str, web: bool) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise UserError(f"port={text} is not accepted: give a number up to 65535, or leave it out for a free one.")
    if text != "0" and not web:
        raise UserError("port=… is that of the page for a browser: add --web.")
    return int(text)


@contextmanager
def _view(name: str, given: Mapping[str, str]) -> Iterator[View]:
    server = {key: given[key] for key in SERVER if key in given}
    if server:
        if "url" not in server:
            raise UserError(f"{next(iter(server))}=… belongs to a bus elsewhere: give its address, url=rediss://….")
        with tempfile.TemporaryDirectory(prefix="esper-") as place, feed_elsewhere(name, server, Path(place)) as (feed, run):
            yield RunView(run, feed)
        return
    entry = find(name, given) if name else _under_way(given)
    if entry.folder is None:
        raise UserError(f"The folder of {entry.name} is not here. A run elsewhere is watched over its bus: esper watch {entry.id} url=….")
    view: View = SweepView(entry.folder) if entry.kind == SWEEP else RunView(entry.name, FolderFeed(entry.folder))
    try:
        yield view
    finally:
        view.close()


def _under_way(given: Mapping[str, str]) -> Entry:
    """The newest run or sweep that is under way.

    Raises:
        UserError: there is none.
    """
    running = [entry for entry in known(given) if entry.status == "RUNNING" and entry.folder is not None and entry.kind != "job"]
    if not running:
        place = given.get("output", "outputs")
        raise UserError(f"Nothing is under way in {place}; name a run or sweep to see how it ended: esper watch <run>.")
    return max(running, key=lambda entry: entry.changed)
