"""Links of the documentation that leave it: their form, and addresses written in two ways; ``scripts/docs --links`` asks servers too."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

PAGES = ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "experiments/**/*.md")
_LINK = re.compile(r"\]\(\s*<?((?:[a-z]+:)?//[^)>]*|[a-z]+:[^)>]*)>?\s*\)|<((?:https?|ftp):[^>]*)>", re.IGNORECASE)
_HOST = re.compile(r"(?=.{4,253}$)([a-z0-9](-?[a-z0-9])*\.)+[a-z]{2,}")


def external_links(root: Path) -> dict[str, list[str]]:
    """Every address that a page of the site links to, with the pages and lines where it stands."""
    found: dict[str, list[str]] = {}
    for page in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for match in _LINK.finditer(line):
                found.setdefault(match[1] or match[2], []).append(f"{page.relative_to(root)}:{number}")
    return found


def complaints(links: dict[str, list[str]]) -> list[str]:
    """What is wrong with the form of these addresses, a sentence each; nothing is asked over the network."""
    told = [f"{place}: {address} {reason}." for address, places in links.items() if (reason := _wrong(address)) for place in places]
    spellings: dict[str, list[str]] = {}
    for address in links:
        spellings.setdefault(_same(address), []).append(address)
    for alike in spellings.values():
        told += [f"{place}: {other} is {alike[0]} in another spelling; write one." for other in alike[1:] for place in links[other]]
    return told


def _wrong(address: str) -> str:
    if re.search(r"\s", address):
        return "has a space in it"
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError as error:
        return f"cannot be read ({error})"
    if parts.scheme != "https":
        return "does not begin with https://"
    if not _HOST.fullmatch(host):
        return f"has no host that could be asked ('{host}')"
    return "ends with a sign of punctuation" if address[-1] in ".,;:!?'\"" else ""


def _same(address: str) -> str:
    """The address without what mostly makes no difference: the scheme, ``www.``, capitals of the host, a slash at the end."""
    scheme, _, rest = address.partition("//")
    host, slash, path = rest.partition("/")
    return (host.lower().removeprefix("www.") + slash + path).rstrip("/") if scheme else address


def main(words: Iterable[str]) -> int:
    """Check the pages under the folder given; 1 where something is wrong."""
    links = external_links(Path(*words))
    told = complaints(links)
    print("\n".join(told) or f"{len(links)} addresses are well formed.")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
