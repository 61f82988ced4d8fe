"""``metrics.csv`` and ``events.jsonl``: a run for spreadsheets and ``grep``."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from esper.bus.codec import to_plain
from esper.messages import Alert, Message, Metrics, RunStarted, Telemetry, TickEnded
from esper.tracking.config import CsvConfig
from esper.tracking.run_info import RunInfo


class CsvFiles:
    """Appends as messages come; a resumed run first removes the lines that it is going to write again."""

    wants_model = False
    called = "writing the CSV files"

    def __init__(self, config: CsvConfig) -> None:
        self.config = config
        self._encode = msgspec.json.Encoder()
        self._said: list[str] = []

    def open(self, info: RunInfo) -> None:
        """Open both files in the run's folder for appending."""
        self._info = info
        folder = Path(info.folder)
        self._paths = (folder / "metrics.csv", folder / "events.jsonl")
        self._open_files()

    def _open_files(self) -> None:
        self._metrics, self._events = (path.open("a", newline="", encoding="utf-8") for path in self._paths)
        self._writer = csv.writer(self._metrics)
        if self._metrics.tell() == 0:
            self._writer.writerow(["tick", "name", "value"])

    def record(self, messages: Sequence[Message]) -> None:
        """Write metrics to the one file and every other event to the other; telemetry rows are in seeds.parquet."""
        for message in messages:
            if isinstance(message, Metrics):
                self._writer.writerows([message.tick, name, value] for name, value in message.values.items())
            elif not isinstance(message, Telemetry | TickEnded):
                if isinstance(message, RunStarted):
                    self._cut_after(message.tick)
                line = self._encode.encode(to_plain(message)).decode() + "\n"
                if isinstance(message, Alert) and line in self._said:
                    self._said.remove(line)
                else:
                    self._events.write(line)

    def _cut_after(self, tick: int) -> None:
        """Remove an earlier session's lines of the ticks that the run repeats.

        An alert given after the checkpoint of its tick comes again, and is written once.
        """
        self._metrics.close()
        self._events.close()
        metrics, events = self._paths
        said = enumerate(_whole_lines(metrics))
        _replace(metrics, [line for number, line in said if number == 0 or int(line.split(",", 1)[0]) <= tick])
        kept = [(msgspec.json.decode(line), line) for line in _whole_lines(events)]
        _replace(events, [line for event, line in kept if event["tick"] <= tick] if tick > 0 else [])
        self._said = [line for event, line in kept if event["tick"] == tick > 0 and event["kind"] == "Alert"]
        self._open_files()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._metrics.flush()
        self._events.flush()

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Close the files and draw the figures."""
        self._metrics.close()
        self._events.close()
        if self.config.figures:
            from esper.tracking.figures import drawn

            drawn(Path(self._info.folder))


def _whole_lines(path: Path) -> list[str]:
    """Lines with their ends; a process killed while writing left its last one without."""
    with path.open(newline="", encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


def _replace(path: Path, lines: list[str]) -> None:
    """Replace a file by writing another and renaming it, so that a complete one exists even if the process dies."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", newline="", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(beside, path)
