"""``tensorboard/events…`` in the run's folder: curves, figures and the settings, written by torch's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.messages import Message, RunStarted
from esper.tracking.config import TensorBoardConfig
from esper.tracking.curves import Curves, import_now
from esper.tracking.run_info import RunInfo
from esper.tracking.run_page import final_values, main_values, page_description

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardEvents:
    """Appends as messages come. A resumed run marks what it is going to write again, and TensorBoard drops the earlier of both."""

    wants_model = False
    called = "writing TensorBoard's event files"

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config

    def try_out(self) -> None:
        """Import what the end of the run needs.

        Raises:
            UserError: TensorBoard is not installed.
        """
        import_now("torch.utils.tensorboard", "tensorboard", self.config.figures)

    def open(self, info: RunInfo) -> None:
        """Begin an event file, with the settings by which TensorBoard's HParams page tells runs apart."""
        self.try_out()
        self._info = info
        self._curves = Curves(self.config.points)
        self._place = Path(info.folder) / FOLDER
        self._goes_on = self._place.is_dir() and any(self._place.iterdir())
        self._writer = self._begin()
        self._describe({})

    def _begin(self, purge_step: int | None = None) -> SummaryWriter:
        """A new event file; one with a ``purge_step`` takes back what earlier ones have from there on."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._place), purge_step=purge_step)

    def _describe(self, results: Mapping[str, float]) -> None:
        """The run's settings and, at its end, its results."""
        from torch.utils.tensorboard.summary import hparams

        info = self._info
        named = {key: value for key, value in info.tags.items() if key in ("seed", "arm")}
        for part in hparams(dict(info.chosen | info.changed | named), dict(results)):
            writer: Any = self._writer.file_writer
            writer.add_summary(part)

    def record(self, messages: Sequence[Message]) -> None:
        """Write metrics, means over seeds and counts of alerts; everything else is in the Parquet files."""
        for message in messages:
            if isinstance(message, RunStarted) and self._goes_on:
                self._writer.close()
                self._writer = self._begin(message.tick + 1)
        started = self._info.started_ms
        for tick, name, value in self._curves.points(messages):
            self._writer.add_scalar(name, value, tick, walltime=(started + tick) / 1000)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._writer.flush()

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Write final values, the description and the figures, and close the file."""
        tick, found = self._curves.tick, dict(final_values(summary) + main_values(summary))
        try:
            for name, value in found.items():
                self._writer.add_scalar(name, value, tick)
            self._describe(found)
            self._writer.add_text("run", f"**{status}** {self._info.name}\n\n{page_description(summary)}", tick)
            if self.config.figures:
                self._draw(tick)
        finally:
            self._writer.close()

    def _draw(self, tick: int) -> None:
        import numpy as np
        from PIL import Image

        from esper.tracking.figures import drawn

        for path in drawn(Path(self._info.folder)):
            with Image.open(path) as image:
                self._writer.add_image(f"figures/{path.stem}", np.asarray(image.convert("RGB")), tick, dataformats="HWC")
