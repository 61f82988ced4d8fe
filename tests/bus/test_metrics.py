"""What operators see: the right values, and the same names in a scrape and at an OpenTelemetry collector."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from faults import FragileServer, wait_until
from scraping import Run

from esper.bus.discovery import joined
from esper.bus.metrics import BUCKETS_S, METRICS
from esper.bus.programs import inspect
from esper.errors import UserError


@pytest.fixture
def fragile(processes, tmp_path):
    running = FragileServer(tmp_path / "server")
    yield running
    running.process.kill()
    running.process.wait()


def test_the_values_are_right(fragile, tmp_path):
    run = Run(fragile, tmp_path)
    assert run.value("esper_bus_up") == 1
    assert run.value("esper_tick") == 1
    assert run.value("esper_seeds", stage="DORMANT") == 3
    assert run.value("esper_seeds", stage="GERMINATED") == 1
    assert run.value("esper_command_seconds_count", status="applied") == 1
    assert run.value("esper_bus_pending_messages", group="tracker") == 1
    assert run.value("esper_bus_behind_messages", group="tracker") == 2
    assert run.value("esper_bus_oldest_unacknowledged_seconds", group="tracker") > 0
    assert run.value("esper_bus_sent_messages_total", process="trainer") == run.bus.counts()["sent"]
    fragile.kill()
    run.port.end_tick(2)
    assert wait_until(lambda: run.value("esper_bus_up") == 0)
    assert run.value("esper_bus_waiting_messages") >= 1
    fragile.start()
    assert wait_until(lambda: run.value("esper_bus_up") == 1)
    run.close()


def test_what_an_external_tracker_counts_is_shown_by_the_trainer_and_by_status(fragile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESPER_BUS_PASSWORD", fragile.address.password)
    run = Run(fragile, tmp_path)
    run.invite(fragile)
    assert run.value("esper_bus_gaps_messages_total", process="tracker") == 0
    run.bus.client.xdel("esper:{run}:events:main", "1-2")
    with joined(tmp_path, "tracking") as (bus, _):
        assert len(bus.consumer("events", "run", "tracker-1", "tracker").read(100, 1)) == 2
        assert wait_until(lambda: run.value("esper_bus_gaps_messages_total", process="tracker") == 1)
    assert inspect.main(["status", str(tmp_path)]) == 0
    assert "tracker: 0 sent, 2 received, 0 acknowledged, 0 dropped, 1 gaps" in capsys.readouterr().out
    for part, received in (("controller", 2), ("controller", 4), ("tracking", 2)):
        with joined(tmp_path, part) as (bus, _):  # started again: a controller goes on, a tracker reads anew
            bus.consumer("events", "run", f"{part}-{received}", "one").read(100, 1)
        process = "tracker" if part == "tracking" else part
        assert run.value("esper_bus_received_messages_total", process=process) == received
    run.bus.client.set("esper:{run}:counts:tracker", b"nonsense")
    assert run.value("esper_bus_gaps_messages_total", process="tracker") == 0
    run.close()


def test_a_port_in_use_is_a_sentence(fragile, tmp_path):
    with pytest.raises(UserError, match=r"bus.metrics_port=.* cannot be served"):
        Run(fragile, tmp_path, metrics_port=fragile.address.tcp_port)


class Collector(BaseHTTPRequestHandler):
    """Takes what an OpenTelemetry collector would."""

    def do_POST(self):
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def collector():
    running = HTTPServer(("127.0.0.1", 0), Collector)
    running.bodies = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def test_a_collector_gets_over_otlp_all_that_a_scrape_shows_under_opentelemetrys_names(fragile, tmp_path, collector):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    run = Run(fragile, tmp_path, otlp=f"http://127.0.0.1:{collector.server_port}/v1/metrics")
    scraped = {family.name + ("_total" if family.type == "counter" else "") for family in run.families() if family.samples}
    count = run.value("esper_command_seconds_count", status="applied")
    run.close()
    body = collector.bodies[-1]
    request = ExportMetricsServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    (resource,) = request.resource_metrics
    received = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    assert scraped == {metric.name for metric in METRICS}
    assert received.keys() == {metric.otel_name for metric in METRICS if metric.name in scraped}
    sent = received["messaging.client.sent.messages"].sum.data_points[0]
    attributes = {attribute.key: attribute.value.string_value for attribute in sent.attributes}
    assert attributes == {"messaging.system": "redis", "messaging.destination.name": "run", "process": "trainer"}
    stages = {p.attributes[-1].value.string_value: p.as_double for p in received["esper.seeds"].gauge.data_points}
    assert stages["DORMANT"] == 3
    (took,) = received["esper.command.seconds"].histogram.data_points
    assert (took.count, tuple(took.explicit_bounds)) == (count, BUCKETS_S)
    assert received["esper.command.seconds"].unit == "s"
