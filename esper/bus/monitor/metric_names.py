"""The names of all that a bus can be asked for, in one list: Prometheus and OpenTelemetry show the same of it."""

from __future__ import annotations

from dataclasses import dataclass

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STREAM = ("stream", "producer")
_GROUP = (*_STREAM, "group")
_PROCESS = ("process",)


@dataclass(frozen=True)
class Metric:
    """``name`` is Prometheus', ``kind`` is counter, gauge or histogram (in seconds, by BUCKETS_S), ``unit`` is in UCUM's notation.

    ``otel`` is OpenTelemetry's own name, where its messaging conventions have one.
    """

    name: str
    kind: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    otel: str = ""

    @property
    def otel_name(self) -> str:
        """What an OpenTelemetry collector knows it as."""
        return self.otel or self.name.removesuffix("_total").replace("_", ".")


def _counted(name: str, help: str, otel: str = "") -> Metric:
    return Metric(f"esper_bus_{name}_messages_total", "counter", "{message}", help, _PROCESS, otel)


COUNTED = {
    "sent": _counted("sent", "Messages the bus has stored.", "messaging.client.sent.messages"),
    "received": _counted(
        "received", "Messages handed to the process's consumers, redeliveries included.", "messaging.client.consumed.messages"
    ),
    "acknowledged": _counted("acknowledged", "Messages acknowledged by the process's consumers."),
    "dropped": _counted("dropped", "Messages given up: memory and spool were full, or the server lost more than could be sent again."),
    "gaps": _counted("gaps", "Sequence numbers that the process's consumers found missing."),
    "duplicates": _counted("duplicates", "Messages recognised as seen before and not handed out again."),
    "refused": _counted("refused", "Messages that were corrupt, malformed, oversized, newer or of another run."),
    "dead_letters": _counted("dead_letters", "Messages given up on after too many deliveries or because they were unreadable."),
    "retries": _counted("retries", "Attempts to reach the server that failed."),
    "late": _counted("late", "Messages released out of order because the bounded hold ran out."),
}
"""What every process counts for itself, by the names of ``esper.bus.protocol``."""

UP = Metric("esper_bus_up", "gauge", "1", "1 while the bus answers.")
SPOOL = Metric("esper_bus_spool_bytes", "gauge", "By", "Bytes waiting on disk.")
WAITING = Metric("esper_bus_waiting_messages", "gauge", "{message}", "Published, not yet stored.")
DEAD_LETTERS = Metric("esper_bus_dead_letters", "gauge", "{message}", "Dead letters lying on the server.")
STATUS = Metric("esper_bus_status_seconds", "gauge", "s", "How long the server took to say how it is.")
ENTRIES = Metric("esper_bus_entries", "gauge", "{message}", "Entries on the server.", _STREAM)
PENDING = Metric("esper_bus_pending_messages", "gauge", "{message}", "Delivered, not acknowledged.", _GROUP)
BEHIND = Metric("esper_bus_behind_messages", "gauge", "{message}", "Not yet delivered.", _GROUP)
OLDEST = Metric(
    "esper_bus_oldest_unacknowledged_seconds", "gauge", "s", "Age of the oldest message delivered and not acknowledged.", _GROUP
)
COMMANDS = Metric("esper_command_seconds", "histogram", "s", "From sending a command to its end in the trainer.", ("status",))
SEEDS = Metric("esper_seeds", "gauge", "{seed}", "Seeds by stage.", ("stage",))
TICK = Metric("esper_tick", "gauge", "{tick}", "The tick the trainer is at.")

METRICS = (*COUNTED.values(), UP, SPOOL, WAITING, DEAD_LETTERS, STATUS, ENTRIES, PENDING, BEHIND, OLDEST, COMMANDS, SEEDS, TICK)
