"""The documentation site builds without a warning, and no link of it leads nowhere."""

from __future__ import annotations

import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from esper.config import GROUPS, options

pytestmark = pytest.mark.usefixtures("processes")


def _build(checkout: Path, source: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """Sphinx as scripts/docs calls it."""
    (line,) = [
        line
        for line in (checkout / "scripts" / "docs").read_text(encoding="utf-8").splitlines()
        if "-m sphinx" in line and "-b html" in line
    ]
    values = {"$python": sys.executable, "$place/.doctrees": str(place / ".doctrees"), "$place": str(place), ".": str(source)}
    words = [values.get(word, word) for word in shlex.split(line)]
    return subprocess.run(words, cwd=checkout, capture_output=True, text=True, timeout=600)


class _Page(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = dict(given)
        self.anchors.add(attributes.get("id") or "")
        self.targets += [target for key in ("href", "src") if (target := attributes.get(key))]


def test_the_site_builds_and_every_link_leads_somewhere(checkout: Path, tmp_path: Path) -> None:
    built = _build(checkout, checkout, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.resolve(): _Page(path) for path in tmp_path.rglob("*.html") if "_static" not in path.parts}
    lost = []
    for path, page in pages.items():
        for target in map(urlsplit, page.targets):
            if target.scheme or target.netloc:
                continue
            to = (path.parent / unquote(target.path)).resolve() if target.path else path
            if not to.exists() or (target.fragment and to in pages and unquote(target.fragment) not in pages[to].anchors):
                lost.append(f"{path.relative_to(tmp_path)}: {target.geturl()}")
    assert not lost and len(pages) > 50
    settings = (tmp_path / "docs" / "reference" / "settings.html").read_text(encoding="utf-8")
    assert all(f"{group}={name}" in settings for group in GROUPS for name in options(group))
    assert "tracking.experiment" in settings and "MLflow experiment that the run belongs to" in settings
    assert 'id="esper.engine.attach.attach"' in (tmp_path / "docs" / "reference" / "api.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#no-such-heading", "../experiments/none"])
def test_a_link_that_leads_nowhere_fails_the_build(link: str, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n[there]({link})\n", encoding="utf-8")
    built = _build(checkout, tmp_path, tmp_path / "built")
    assert built.returncode != 0 and "index.md:3: WARNING" in built.stderr
