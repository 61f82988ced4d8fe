"""Every alert fires in the state it is about and not in a healthy one; every query of the dashboard has something to show."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import yaml
from faults import FragileServer, wait_until
from prometheus_client.samples import Sample
from promql import Scrapes, evaluate
from scraping import Run

from esper.bus.codec import Envelope, encode
from esper.bus.discovery import joined
from esper.messages import Germinate, Telemetry, TickEnded

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations"
RULES = {rule["alert"]: rule["expr"] for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]}
SMALL = {"codec": "raw", "memory_mb": 1, "spool_mb": 120}  # beyond 1 MiB on disk, beyond 120 MiB dropped


@pytest.fixture
def fragile(processes, tmp_path, monkeypatch):
    running = FragileServer(tmp_path / "server")
    monkeypatch.setenv("ESPER_BUS_PASSWORD", running.address.password)
    yield running
    running.process.kill()
    running.process.wait()


def put(run, stream, producer, body, age_s=0.0):
    """A message that was sent so long ago."""
    key = f"esper:{{run}}:{stream}:{producer}"
    run.bus.client.sadd(f"esper:{{run}}:{stream}", producer)
    run.bus.client.xadd(key, {"m": encode(Envelope("run", producer, 1, 1, time.time() - age_s, (), body))}, id="1-1")


def flood(run, server, megabytes):
    """So much telemetry for a server that is gone."""
    producer = run.bus.producer("telemetry", "run", "flood")
    server.kill()
    rows = Telemetry(site="fc", ticks=[1], seeds=2500, columns=["x"] * 100, data=bytes(1_000_000))
    for _ in range(megabytes):
        producer.publish(rows)


def bus_down(run, server):
    server.kill()
    run.port.end_tick(2)
    assert wait_until(lambda: run.bus.sender.open)


def dropping(run, server):
    flood(run, server, 140)


def gaps(run, server):
    run.invite(server)
    run.bus.client.xdel("esper:{run}:events:main", "1-2")
    with joined(run.folder, "tracking") as (bus, _):
        assert bus.consumer("events", "run", "tracker-1", "tracker").read(100, 1)


def refusing(run, server):
    run.bus.client.sadd("esper:{run}:commands", "stranger")
    run.bus.client.xadd("esper:{run}:commands:stranger", {"m": b"nonsense"})
    assert wait_until(lambda: run.bus.dead_letters("run"))


def spooling(run, server):
    flood(run, server, 110)


def consumer_behind(run, server):
    put(run, "events", "old", TickEnded(tick=1), age_s=300)
    assert wait_until(lambda: any(delivery.producer == "old" for delivery in run.tracker.read(100, 0.1)))


def consumer_absent(run, server):
    crowd = run.bus.producer("events", "run", "crowd")
    crowd.publish(TickEnded(tick=0))
    assert wait_until(lambda: any(delivery.producer == "crowd" for delivery in run.tracker.read(100, 0.1)))  # and no more
    for number in range(10_100):
        crowd.publish(TickEnded(tick=number))
    assert crowd.flush(20)


def commands_slow(run, server):
    put(run, "commands", "slow", Germinate(id="slow", site="fc", seed=2), age_s=40)
    run.end_one("slow", 2)


FAILING = {
    "EsperBusDown": bus_down,
    "EsperBusDropping": dropping,
    "EsperBusGaps": gaps,
    "EsperBusRefusing": refusing,
    "EsperBusDeadLetters": refusing,
    "EsperBusSpooling": spooling,
    "EsperBusConsumerBehind": consumer_behind,
    "EsperBusConsumerAbsent": consumer_absent,
    "EsperCommandsSlow": commands_slow,
}


def test_the_evaluator_of_these_tests_knows_counters_that_begin_anew_and_interpolates_in_a_histogram():
    def samples(name, *values, **labels):
        return [Sample(name, labels | {"le": bound}, value) for bound, value in values]

    scrapes = Scrapes(samples("c", ("", 7.0)), samples("c", ("", 3.0)), 10.0)
    assert list(evaluate("rate(c[5m])", scrapes).values()) == [0.3]
    assert not evaluate("increase(c[1h]) > 3", scrapes)
    histogram = Scrapes([], samples("h", ("1", 0.0), ("2", 4.0), ("+Inf", 5.0), a="x"), 10.0)
    assert evaluate("histogram_quantile(0.4, sum by (le) (h))", histogram) == {frozenset(): 1.5}
    with pytest.raises(AssertionError, match="not understood"):
        evaluate("topk(1, c)", scrapes)


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_fires_in_its_state_and_not_in_a_healthy_one(fragile, tmp_path, alert):
    run = Run(fragile, tmp_path, **SMALL)
    scrapes = [run.scrape(), run.scrape()]
    FAILING[alert](run, fragile)
    scrapes.append(run.scrape())
    assert not evaluate(RULES[alert], Scrapes(scrapes[0], scrapes[1], 15.0))
    assert evaluate(RULES[alert], Scrapes(scrapes[1], scrapes[2], 15.0))
    run.close()


def test_every_query_of_the_dashboard_shows_something(fragile, tmp_path):
    run = Run(fragile, tmp_path)
    first = run.scrape()
    run.apply("again", 2)
    scrapes = Scrapes(first, run.scrape(), 15.0)
    run.close()
    board = json.loads((DOCS / "grafana.json").read_text())
    for query in {target["expr"] for panel in board["panels"] for target in panel["targets"]}:
        found = evaluate(query, scrapes)
        assert found and not any(map(math.isnan, found.values())), query
