"""External links of the documentation, as far as they can be checked without the network; ``scripts/docs --links`` asks the servers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def links(checkout: Path) -> ModuleType:
    """The program that scripts/docs --links runs first."""
    spec = importlib.util.spec_from_file_location("external_links", checkout / "docs" / "site" / "external_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_external_link_is_well_formed_and_written_in_one_way(links: ModuleType, checkout: Path) -> None:
    found = links.external_links(checkout)
    assert {"https://hydra.cc", "https://mlflow.org"} <= found.keys()
    assert links.complaints(found) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a](http://example.org)", "page.md:2: http://example.org does not begin with https://."),
        ("[a](//example.org/x)", "//example.org/x does not begin with https://."),
        ("[a](https://example)", "has no host that could be asked ('example')."),
        ("[a](https://exa mple.org)", "has a space in it."),
        ("<https://example.org/a,>", "ends with a sign of punctuation."),
        ("[a](https://[::1)", "cannot be read (Invalid IPv6 URL)."),
        ("[a](https://example.org/a) [b](https://www.Example.org/a/)", "www.Example.org/a/ is https://example.org/a in another spelling"),
    ],
)
def test_a_link_that_no_server_could_answer_is_named_with_its_line(links: ModuleType, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n{text}\n", encoding="utf-8")
    (told,) = links.complaints(links.external_links(tmp_path))
    assert words in told and told.startswith("page.md:2: ")
    assert links.main([str(tmp_path)]) == 1


def test_links_within_the_site_and_addresses_in_code_are_no_business_of_it(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](other.md#x) `http://127.0.0.1:5000` [b](https://example.org/a) [c](https://example.org/a)\n")
    assert list(links.external_links(tmp_path)) == ["https://example.org/a"]
    assert links.main([str(tmp_path)]) == 0
