"""Prometheus endpoint and OpenTelemetry export of a bus's readings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from esper import secrets
from esper.bus.monitor.metric_names import BUCKETS_S, METRICS, Metric
from esper.bus.monitor.readings import PortState, Reading
from esper.errors import UserError

Source = Callable[[], list[Reading]]
ONE_EXPORT_S = 1.0  # instruments are asked one by one, and the server not for each of them


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
            raise UserError(f"bus.metrics_port={port} cannot be served ({error.strerror}): give a free port, or 0 for none") from None
        self.port = self._server.server_port

    def describe(self) -> list[Any]:
        """Nothing in advance: readings are taken when somebody asks."""
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

    def __init__(self, endpoint: str, run: str, system: str, source: Source, state: PortState, every_s: float = 10.0) -> None:
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

    def _instruments(self, meter: Any, state: PortState) -> None:
        """One for every metric there is: what has no value yet (no group reads, the server is away) may have one later."""
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
