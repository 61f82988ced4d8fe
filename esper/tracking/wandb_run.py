"""A run in Weights & Biases: curves, figures, settings and results. Its own process, which W&B starts, talks to the server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import UserError
from esper.messages import Message
from esper.tracking.config import WandbConfig
from esper.tracking.curves import Curves, import_now
from esper.tracking.run_info import RunInfo
from esper.tracking.run_page import final_values, main_values, page_description

if TYPE_CHECKING:
    from wandb import Run

TICK = "tick"  # the axis of every curve: W&B's own step must not go back, and a resumed run does


class WandbRun:
    """Logs a row of values for each tick. A resumed run goes on in the same W&B run, and logs again what came after its checkpoint."""

    wants_model = False
    called = "Weights & Biases"

    def __init__(self, config: WandbConfig) -> None:
        self.config = config

    def try_out(self) -> None:
        """Import what the end of the run needs.

        Raises:
            UserError: wandb is not installed.
        """
        import_now("wandb", "wandb", self.config.figures)

    def open(self, info: RunInfo) -> None:
        """Begin the W&B run, or go on with the one of this folder.

        Raises:
            UserError: W&B does not accept it: nobody is logged in, or the server does not answer.
        """
        self.try_out()
        import wandb

        self._info = info
        self._curves = Curves(self.config.points)
        self._rows: dict[int, dict[str, float]] = {}
        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        try:
            self._run: Run = wandb.init(
                project=self.config.project,
                entity=self.config.entity or None,
                mode=self.config.mode or None,  # type: ignore[arg-type]
                dir=info.folder,
                id=hashlib.sha256(f"{info.run} {info.folder}".encode()).hexdigest()[:16],
                resume="allow",
                reinit="create_new",
                name=info.name,
                group=info.tags.get("sweep"),
                config=info.config | {"chosen": info.chosen | info.changed, "tags": info.tags},
                settings=settings,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"Weights & Biases does not take the run: {reason}. Log in, or choose tracking.mode=offline.") from error
        self._run.define_metric("*", step_metric=TICK)

    def record(self, messages: Sequence[Message]) -> None:
        """Collect metrics, means over seeds and counts of alerts by tick; everything else is in the Parquet files."""
        for tick, name, value in self._curves.points(messages):
            self._rows.setdefault(tick, {})[name] = value

    def flush(self) -> None:
        """Hand everything to W&B's process, which writes it to its file, and from there to the server."""
        rows, self._rows = sorted(self._rows.items()), {}
        for tick, values in rows:
            self._run.log({TICK: tick, **values})

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Log results and figures, and end the run as finished or failed."""
        code = 1
        try:
            self.flush()
            self._run.summary.update({"status": status, **dict(final_values(summary) + main_values(summary))})
            self._run.notes = page_description(summary)
            if self.config.figures:
                self._draw()
            code = 0 if status == "FINISHED" else 1
        finally:
            self._run.finish(exit_code=code)

    def _draw(self) -> None:
        import wandb

        from esper.tracking.figures import drawn

        pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in drawn(Path(self._info.folder))}
        self._run.log({TICK: self._curves.tick, **pictures})
