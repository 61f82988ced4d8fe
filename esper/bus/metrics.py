"""The metrics of a run's bus: their names, their values at one moment, and the exporters to Prometheus and OpenTelemetry."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from esper import secrets
from esper.bus.protocol import Bus, remote
from esper.errors import UserError
from esper.lifecycle.stages import Stage

if TYPE_CHECKING:
    from esper.bus.server.status import RunStatus


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
        """The name in OpenTelemetry."""
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
"""The counters of every process, by their names in ``esper.bus.protocol``."""

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


TRAINER = "trainer"  # the process that exports; the counters of other processes are on the server


@dataclass(frozen=True)
class Reading:
    """One value of a metric that is not a histogram; ``labels`` are values, in the order of the metric's names."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


@dataclass
class Histogram:
    """Durations in seconds by bucket (upper bounds BUCKETS_S, then infinity)."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds


class TrainerState:
    """The state of the trainer that is exported beside the bus: seeds by stage, the tick, and how long commands took.

    ``told`` are called with status and seconds of every command that ends.
    """

    def __init__(self) -> None:
        self.tick = 0
        self.stages: Counter[int] = Counter()
        self.commands: dict[str, Histogram] = {}
        self.told: list[Callable[[str, float], None]] = []

    def started(self, tick: int, sites: list[dict[str, Any]]) -> None:
        """Every seed is DORMANT unless its site says otherwise."""
        self.tick = tick
        for site in sites:
            self.stages.update(site.get("stages") or [int(Stage.DORMANT)] * int(site.get("seeds", 0)))

    def moved(self, seed: int, source: int, target: int) -> None:
        """A seed changed stage; block branches (seed −1) are not seeds."""
        if seed >= 0:
            self.stages[source] -= 1
            self.stages[target] += 1

    def finished(self, status: str, seconds: float) -> None:
        """A command ended ``seconds`` after it was sent."""
        self.commands.setdefault(status, Histogram()).add(seconds)
        for tell in self.told:
            tell(status, seconds)


def readings(bus: Bus, run: str, state: TrainerState) -> list[Reading]:
    """Everything at this moment; while the server does not answer, its readings are left out."""
    counts = bus.counts()
    found = _counters_of(TRAINER, counts)
    found.append(Reading(SPOOL, counts["spool_bytes"]))
    found.append(Reading(WAITING, counts.get("waiting", 0)))
    found.append(Reading(TICK, state.tick))
    found += [Reading(SEEDS, state.stages[stage], (stage.name,)) for stage in Stage]
    away = remote(bus)
    up = away is None or away.reachable
    on_server, answered = _on_server(bus, run) if up and away is not None else ([], up)
    found.append(Reading(UP, float(up and answered)))
    return found + on_server


def _counters_of(process: str, counts: dict[str, int]) -> list[Reading]:
    return [Reading(metric, counts.get(name, 0), (process,)) for name, metric in COUNTED.items()]


def _on_server(bus: Bus, run: str) -> tuple[list[Reading], bool]:
    """Readings of the messages on the server, and whether it answered; an own remote bus has none."""
    import redis

    from esper.bus.server.bus import ServerBus
    from esper.bus.server.status import status

    if not isinstance(bus, ServerBus):
        return [], True
    try:
        began = time.perf_counter()
        found = status(bus, run)
        took = time.perf_counter() - began
    except redis.RedisError:
        return [], False
    return [Reading(STATUS, took), *_stored(found)], True


def _stored(found: RunStatus) -> list[Reading]:
    """Messages on the server, and the counters of the processes that read there."""
    result = [Reading(DEAD_LETTERS, found.dead_letters)]
    for process, counts in found.counts.items():
        result += _counters_of(process, counts)
    for stream in found.streams:
        labels = (stream.stream, stream.producer)
        result.append(Reading(ENTRIES, stream.entries, labels))
        for group in stream.groups:
            named = (*labels, group.name)
            result.append(Reading(PENDING, group.pending, named))
            result.append(Reading(BEHIND, group.behind, named))
            result.append(Reading(OLDEST, group.oldest_s, named))
    return result


Source = Callable[[], list[Reading]]
ONE_EXPORT_S = 1.0  # instruments are asked one by one, and the server not for each of them


class PrometheusEndpoint:
    """Serves ``/metrics`` on loopback until closed; every scrape takes fresh readings."""

    def __init__(self, tcp_port: int, source: Source, state: TrainerState) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._source, self._state = source, state
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(tcp_port, "127.0.0.1", registry)
        except OSError as error:
            raise UserError(f"bus.metrics_port={tcp_port} cannot be served ({error.strerror}): give a free port, or 0 for none") from None
        self.tcp_port = self._server.server_port

    def describe(self) -> list[Any]:
        """Nothing in advance: readings are taken at every scrape."""
        return []

    def collect(self) -> Iterator[Any]:
        """Families in the form of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        made = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        families = {metric.name: made[metric.kind](metric.name, metric.help, labels=metric.labels) for metric in METRICS}
        for reading in self._source():
            families[reading.metric.name].add_metric(reading.labels, reading.value)
        for status, histogram in list(self._state.commands.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), histogram.counts, strict=True):
                total += count
                buckets.append((bound, total))
            families["esper_command_seconds"].add_metric([status], buckets, histogram.total)
        yield from families.values()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class OtlpExporter:
    """Sends readings to an OpenTelemetry collector every ``every_s`` seconds (OTLP over HTTP), and once on closing."""

    def __init__(self, endpoint: str, run: str, system: str, source: Source, state: TrainerState, every_s: float = 10.0) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        secrets.check("bus.otlp", endpoint)
        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise UserError(f"bus.otlp={endpoint!r} is no address of a collector: give http://host:4318/v1/metrics")
        self._source = source
        self._taken: list[Reading] = []
        self._taken_at = float("-inf")
        self._attributes = {"messaging.system": system, "messaging.destination.name": run}
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint), export_interval_millis=every_s * 1000)
        resource = Resource.create({"service.name": "esper", "service.instance.id": run})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._instruments(self._provider.get_meter("esper.bus"), state)

    def _instruments(self, meter: Any, state: TrainerState) -> None:
        """An instrument for every metric, also for one without a value yet (no group reads, the server is away)."""
        for metric in METRICS:
            if metric.kind == "histogram":
                bounds = {"explicit_bucket_boundaries_advisory": BUCKETS_S}
                state.told.append(self._recorder(metric, meter.create_histogram(metric.otel_name, metric.unit, metric.help, **bounds)))
                continue
            make = meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
            make(metric.otel_name, [self._observer(metric)], metric.unit, metric.help)

    def _recorder(self, metric: Metric, instrument: Any) -> Callable[[str, float], None]:
        (label,) = metric.labels
        return lambda status, seconds: instrument.record(seconds, self._attributes | {label: status})

    def _observer(self, metric: Metric) -> Callable[[Any], Iterator[Any]]:
        from opentelemetry.metrics import Observation

        def observe(options: object) -> Iterator[Any]:
            for reading in self._readings():
                if reading.metric is metric:
                    labels = dict(zip(metric.labels, reading.labels, strict=True))
                    yield Observation(float(reading.value), self._attributes | labels)

        return observe

    def _readings(self) -> list[Reading]:
        if time.monotonic() - self._taken_at > ONE_EXPORT_S:
            self._taken, self._taken_at = self._source(), time.monotonic()
        return self._taken

    def close(self) -> None:
        """Send the last readings."""
        self._taken_at = float("-inf")
        self._provider.shutdown()
