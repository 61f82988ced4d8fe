"""The documentation site: every page of docs/, README.md and the studies' write-ups, built by Sphinx. See scripts/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import settings_reference  # noqa: E402

import esper  # noqa: E402

project, version, copyright = "esper", esper.__version__, "the authors of esper"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/**.md"]
exclude_patterns = [".*", "build", "outputs", "dist", "esper", "tests", "shared"]
exclude_patterns += ["experiments/*/findings.md", "experiments/*/outcome.md"]  # parts of the README.md beside them
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header", "misc.highlighting_failure"]  # headings may begin at ##, and code may have an … in it
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
linkcheck_timeout = 20
html_theme = "furo"
html_title = f"esper {version}"

FIRST = ("README.md", "question.md")  # what to read first in a folder; a study that has not run yet has its question alone
LINK = re.compile(r"\]\(([^)\s]+)\)")


def to_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """A link to a folder leads to the page to read first in it; the settings are written from the dataclasses."""
    here = (Path(app.srcdir) / page).parent

    def target(found: re.Match[str]) -> str:
        path, hash, anchor = found[1].partition("#")
        pages = [name for name in FIRST if path and "://" not in path and (here / path / name).is_file()]
        return f"]({path.rstrip('/')}/{pages[0]}{hash}{anchor})" if pages else found[0]

    source[0] = LINK.sub(target, source[0])
    source[0] = source[0].replace(settings_reference.MARK, settings_reference.text())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", to_pages)
