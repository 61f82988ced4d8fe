"""What operators see: a scrape has every series that dashboard and alerts ask for, and a collector gets them too."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults import FragileServer, wait_until
from prometheus_client.parser import text_string_to_metric_families

from esper.bus.config import RedisConfig
from esper.bus.messages import Germinate
from esper.bus.port import BusPort
from esper.bus.rate import A_MINUTE, AlertLimit
from esper.bus.server.bus import ServerBus
from esper.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations"
FUNCTIONS = {"rate", "increase", "sum", "max", "by", "histogram_quantile", "le"}


@pytest.fixture
def fragile(tmp_path):
    running = FragileServer(tmp_path / "server")
    yield running
    running.process.kill()
    running.process.wait()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """A port with something to show: a command applied, telemetry read by a group, one message in its hands."""

    def __init__(self, server, folder, **settings):
        config = RedisConfig(timeout_s=0.3, retry_s=0.1, **settings)
        self.bus = ServerBus(config, server.address, folder / "bus")
        self.port = BusPort(self.bus, "run", ("a", "b"))
        self.tracker = self.bus.consumer("events", "run", "tracker", "one")
        self.port.started(0, 10, [{"name": "fc", "seeds": 4}])
        self.bus.producer("commands", "run", "operator").publish(Germinate(id="g", site="fc", seed=1))
        assert wait_until(lambda: self.port.commands(1))
        self.port.acknowledge("g", "applied", "", 1)
        self.port.transition(1, "fc", 1, 0, 0, 1, "command")
        self.port.telemetry(1, "fc", torch.zeros(4, 2))
        self.port.end_tick(1)
        self.port.barrier()
        assert self.tracker.read(1, 1)

    def close(self):
        self.port.close()
        self.bus.close()


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return [sample for family in families for sample in family.samples]


def value(samples, name, **labels):
    (found,) = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return found


def queries():
    board = json.loads((DOCS / "grafana.json").read_text())
    found = {target["expr"] for panel in board["panels"] for target in panel["targets"]}
    rules = yaml.safe_load((DOCS / "alerts.yaml").read_text())
    return sorted(found | {rule["expr"] for group in rules["groups"] for rule in group["rules"]})


def test_a_real_scrape_has_what_every_query_of_dashboard_and_alerts_asks_for(fragile, tmp_path):
    port = free_port()
    run = Run(fragile, tmp_path, metrics_port=port)
    samples = scrape(port)
    run.close()
    for query in queries():
        bare = re.sub(r"\[\w+\]|\d[\w.]*", " ", query)
        names = set(re.findall(r"esper_\w+", bare))
        assert names, query
        for name in names:
            series = [sample for sample in samples if sample.name == name]
            assert series, f"{query}: nothing is called {name}"
            for grouped in re.findall(r"by \(([^)]*)\)", query):
                for label in grouped.split(","):
                    assert all(label.strip() in sample.labels for sample in series), (query, label)
        assert set(re.findall(r"[a-z_]+", re.sub(r"by \([^)]*\)|esper_\w+", " ", bare))) <= FUNCTIONS, query


def test_the_values_are_right(fragile, tmp_path):
    port = free_port()
    run = Run(fragile, tmp_path, metrics_port=port)
    samples = scrape(port)
    assert value(samples, "esper_bus_up") == 1
    assert value(samples, "esper_tick") == 1
    assert value(samples, "esper_seeds", stage="DORMANT") == 3
    assert value(samples, "esper_seeds", stage="GERMINATED") == 1
    assert value(samples, "esper_command_seconds_count", status="applied") == 1
    assert value(samples, "esper_bus_pending_messages", group="tracker") == 1
    assert value(samples, "esper_bus_behind_messages", group="tracker") == 2
    assert value(samples, "esper_bus_oldest_unacknowledged_seconds", group="tracker") > 0
    assert value(samples, "esper_bus_sent_messages_total") == run.bus.counts()["sent"]
    fragile.kill()
    run.port.end_tick(2)
    assert wait_until(lambda: value(scrape(port), "esper_bus_up") == 0)
    assert value(scrape(port), "esper_bus_waiting_messages") >= 1
    fragile.start()
    assert wait_until(lambda: value(scrape(port), "esper_bus_up") == 1)
    run.close()


def test_a_port_in_use_is_a_sentence(fragile, tmp_path):
    with pytest.raises(UserError, match=r"bus.metrics_port=.* cannot be served"):
        Run(fragile, tmp_path, metrics_port=fragile.address.port)


class Collector(BaseHTTPRequestHandler):
    """Takes what an OpenTelemetry collector would."""

    def do_POST(self):
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


def test_a_collector_gets_the_same_over_otlp_under_opentelemetrys_names(fragile, tmp_path):
    import gzip

    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.bodies = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    run = Run(fragile, tmp_path, otlp=f"http://127.0.0.1:{collector.server_port}/v1/metrics")
    run.close()
    collector.shutdown()
    body = collector.bodies[-1]
    request = ExportMetricsServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    (resource,) = request.resource_metrics
    metrics = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    sent = metrics["messaging.client.sent.messages"].sum.data_points[0]
    attributes = {attribute.key: attribute.value.string_value for attribute in sent.attributes}
    assert attributes == {"messaging.system": "redis", "messaging.destination.name": "run"}
    stages = {p.attributes[-1].value.string_value: p.as_double for p in metrics["esper.seeds"].gauge.data_points}
    assert stages["DORMANT"] == 3
    assert {"messaging.client.consumed.messages", "esper.bus.dropped.messages", "esper.bus.up"} <= metrics.keys()


def test_alerts_about_the_bus_are_rate_limited_and_the_rest_counted():
    limit = AlertLimit()
    assert [limit.allows("bus_refused") for _ in range(A_MINUTE + 3)] == [True] * A_MINUTE + [False] * 3
    assert limit.allows("bus_down")
    assert limit.held_back == 3
