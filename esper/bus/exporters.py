"""Prometheus endpoint and OpenTelemetry export of a bus's readings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from esper.bus.readings import BUCKETS_S, PortState, Reading
from esper.errors import UserError

Source = Callable[[], list[Reading]]
OTEL_NAMES = {
    "esper_bus_sent_messages_total": "messaging.client.sent.messages",
    "esper_bus_received_messages_total": "messaging.client.consumed.messages",
}


class PrometheusEndpoint:
    """Serves ``/metrics`` on loopback until closed; every scrape takes fresh readings."""

    def __init__(self, port: int, source: Source, state: PortState) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._source, self._state = source, state
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise UserError(
                f"bus.metrics_port={port} cannot be served ({error.strerror}): give a free port, or 0 for none"
            ) from None
        self.port = self._server.server_port

    def describe(self) -> list[Any]:
        """Nothing in advance: readings are taken when somebody asks."""
        return []

    def collect(self) -> Iterator[Any]:
        """Families in the form of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {}
        for reading in self._source():
            family = families.get(reading.name)
            if family is None:
                kind = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
                labels = [name for name, _ in reading.labels]
                family = families[reading.name] = kind(reading.name, reading.help, labels=labels)
            family.add_metric([value for _, value in reading.labels], reading.value)
        yield from families.values()
        commands = HistogramMetricFamily(
            "esper_command_seconds", "From sending a command to its end in the trainer.", labels=["status"]
        )
        for status, histogram in list(self._state.commands.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), histogram.counts, strict=True):
                total += count
                buckets.append((bound, total))
            commands.add_metric([status], buckets, histogram.total)
        yield commands

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class OtlpExporter:
    """Sends readings to an OpenTelemetry collector every ``every_s`` seconds (OTLP over HTTP), and once on closing."""

    def __init__(self, endpoint: str, run: str, system: str, source: Source, every_s: float = 10.0) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise UserError(f"bus.otlp={endpoint!r} is no address of a collector: give http://host:4318/v1/metrics")
        self._source = source
        self._attributes = {"messaging.system": system, "messaging.destination.name": run}
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint), export_interval_millis=every_s * 1000)
        resource = Resource.create({"service.name": "esper", "service.instance.id": run})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("esper.bus")
        for name, kind, text in {(reading.name, reading.kind, reading.help) for reading in source()}:
            make = meter.create_observable_counter if kind == "counter" else meter.create_observable_gauge
            make(OTEL_NAMES.get(name, name.removesuffix("_total").replace("_", ".")), [self._observer(name)], "", text)

    def _observer(self, name: str) -> Callable[[Any], Iterator[Any]]:
        from opentelemetry.metrics import Observation

        def observe(options: object) -> Iterator[Any]:
            for reading in self._source():
                if reading.name == name:
                    yield Observation(float(reading.value), self._attributes | dict(reading.labels))

        return observe

    def close(self) -> None:
        """Send the last readings."""
        self._provider.shutdown()
