"""The notebooks of docs/notebooks are run from top to bottom, by a kernel of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
SHOWN = {
    "grow.ipynb": ("text/html", "226 → "),
    "look_at_a_run.ipynb": ("image/png", "('digits', "),
    "compare_arms.ipynb": ("text/html", "against the reference"),
}
"""What each shows: a kind of display, and words that a cell prints."""


def test_every_notebook_is_among_those_that_are_run() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("processes", "whole_runs")
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for key, value in {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / ".ipython")}.items():
        monkeypatch.setitem(os.environ, key, value)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "a notebook is kept without outputs: clear them"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kind, words = SHOWN[name]
    assert any(kind in output.get("data", {}) for output in outputs)
    assert words in "".join(output.get("text", "") for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
