"""A tracker of one's own: it is handed every message of a run and keeps what it likes of them."""

from pathlib import Path

from esper.lifecycle import Stage
from esper.messages import RunStarted, Transition


class Diary:
    """Writes a line for every transition into ``diary.txt`` of the run's folder: tick, site, seed, stage."""

    wants_model = False

    def open(self, info) -> None:
        self.path = Path(info.folder) / "diary.txt"
        self.lines = self.path.read_text().splitlines() if self.path.exists() else []

    def record(self, messages) -> None:
        for message in messages:
            if isinstance(message, RunStarted):  # a resumed run goes through everything after this tick again
                self.lines = [line for line in self.lines if int(line.split()[0]) <= message.tick]
            if isinstance(message, Transition):
                self.lines.append(f"{message.tick} {message.site} {message.seed} {Stage(message.target).name}")

    def flush(self) -> None:
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(f"{line}\n" for line in self.lines))
        beside.replace(self.path)

    def close(self, status: str, summary) -> None:
        self.flush()
