"""A message bus of one's own: everything that producers say is also written into a journal that people can read."""

from pathlib import Path
from typing import TextIO

from esper.bus.codec import to_plain
from esper.bus.config import MemoryConfig
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import Producer
from esper.messages import Message


class JournalBus(MemoryBus):
    """The bus in memory, and ``<run folder>/bus/<file>`` with a line for every message of the streams in ``streams``."""

    def __init__(
        self, config: MemoryConfig, folder: Path, file: str = "journal.txt", streams: tuple[str, ...] = ("events", "commands")
    ) -> None:
        super().__init__(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.streams = streams
        self.journal = (folder / file).open("a", encoding="utf-8")

    def producer(self, stream: str, run: str, name: str = "main") -> Producer:
        made = super().producer(stream, run, name)
        return JournalProducer(made, self.journal, f"{stream}/{name}") if stream in self.streams else made

    def close(self) -> None:
        super().close()
        self.journal.close()


class JournalProducer:
    """Hands each message on to ``producer`` and then writes it down."""

    def __init__(self, producer: Producer, journal: TextIO, source: str) -> None:
        self.producer, self.journal, self.source = producer, journal, source
        self.epoch = producer.epoch

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        self.producer.publish(message, after)
        self.journal.write(f"{self.source} {to_plain(message)}\n")

    def flush(self, timeout_s: float) -> bool:
        self.journal.flush()
        return self.producer.flush(timeout_s)

    def close(self) -> None:
        self.producer.close()
