"""``esper.load_run(folder)``: what a run left, as frames, figures and its model, for a notebook or a script."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import UserError
from esper.report.end_of_run import BRANCH_COLUMNS, RIGHT, branch_rows, closing_lines
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.run_folder import CONFIG, read_config, status
from esper.tracking.recorded_tables import read_recorded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

DPI = 110


@dataclass(frozen=True)
class Picture:
    """A figure that a notebook shows as it is; ``figure`` is matplotlib's own, to be changed or saved."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=DPI)
        return out.getvalue()


class SavedRun:
    """One run, read from its folder as things are asked for; one that has not ended is read as far as it came.

    ``folder`` is the run's, ``status`` how it ended (RUNNING where a process is at it now). Frames are pandas':
    ``metrics`` has a row a tick and a column a metric, NaN where none was recorded then; ``transitions``, ``gates`` and ``seeds`` have the
    columns of the Parquet files (docs/tracking.md).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = status(folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty for a run that has not ended. Its parts are those of ``esper.report.summary_file.Summary``."""
        return read_summary(self.folder) if (self.folder / SUMMARY).exists() else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, as nested plain values."""
        return read_config(self.folder)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.summary.get("name") or self.config.get("name") or self.folder.name)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Float64, a row a tick and a column a metric."""
        long = read_recorded(self.folder, "metrics").to_pandas()
        wide = long.pivot_table(index="tick", columns="name", values="value", aggfunc="last", dropna=False)
        named: pd.DataFrame = wide.rename_axis(columns=None)
        return named

    @cached_property
    def transitions(self) -> pd.DataFrame:
        """A row a transition."""
        return self._frame("transitions")

    @cached_property
    def gates(self) -> pd.DataFrame:
        """A row an answer of a gate."""
        return self._frame("gates")

    @cached_property
    def seeds(self) -> pd.DataFrame:
        """The telemetry: a row a seed and tick. It may be large."""
        return self._frame("seeds")

    def _frame(self, name: str) -> pd.DataFrame:
        frame: pd.DataFrame = read_recorded(self.folder, name).to_pandas()
        return frame

    @cached_property
    def branches(self) -> pd.DataFrame:
        """A row a branch, as the summary has them: site, seed, blueprint, gain, parameters, path; empty before the run's end."""
        import pandas as pd

        return pd.DataFrame(self.summary.get("branches") or [])

    @cached_property
    def figures(self) -> dict[str, Picture]:
        """``stages``, ``learning`` and ``gates``, those for which something was recorded; drawn anew."""
        from esper.tracking.figures import figures_of

        return {name: Picture(figure) for name, figure in figures_of(self.folder).items()}

    def model(self, **arguments: Any) -> nn.Module:
        """The final model with what grew built in, on the CPU; arguments as of ``esper.load_model``. Imports torch.

        Raises:
            UserError: the run has not come to a model.
        """
        from esper.export.saved_model import load_model

        return load_model(self.folder, **arguments)

    def __repr__(self) -> str:
        return f"SavedRun({str(self.folder)!r}, {self.name}, {self.status})"

    def _repr_html_(self) -> str:
        """The report of the run's end as a notebook shows it."""
        lines = closing_lines(self.summary) if self.summary else [("status", self.status), ("output", str(self.folder))]
        rows = "".join(f'<tr><th style="text-align:left">{escape(label)}</th><td>{escape(text)}</td></tr>' for label, text in lines)
        parts = [f"<b>{escape(self.name)}</b>", f"<table>{rows}</table>"]
        if branches := self.summary.get("branches"):
            sides = ["right" if name in RIGHT else "left" for name in BRANCH_COLUMNS]
            heads = "".join(f'<th style="text-align:{side}">{escape(name)}</th>' for name, side in zip(BRANCH_COLUMNS, sides, strict=True))
            cells = (
                "".join(f'<td style="text-align:{side}">{escape(cell)}</td>' for cell, side in zip(row, sides, strict=True))
                for row in branch_rows(branches)
            )
            parts.append(f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        return "".join(parts)


def load_run(folder: str | Path) -> SavedRun:
    """The run in ``folder``, finished or not. Nothing is read yet but how it ended, and torch is not imported.

    Raises:
        UserError: there is no run.
    """
    place = Path(folder)
    if not place.is_dir() or not ((place / CONFIG).exists() or (place / SUMMARY).exists()):
        raise UserError(f"{place} is no run's folder; name the output folder of a run, which `esper list` shows.")
    return SavedRun(place)
