"""A port with something to show, and what a Prometheus sees of it."""

from __future__ import annotations

import dataclasses
import socket
import urllib.request
from pathlib import Path

import torch
from faults import FragileServer, wait_until
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from esper.bus.config import RedisConfig
from esper.bus.discovery import invite
from esper.bus.server.bus import ServerBus
from esper.bus.trainer.bus_port import BusPort
from esper.messages import Germinate, Transition


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """A command applied, telemetry sent, one message in a tracker's hands."""

    def __init__(self, server: FragileServer, folder: Path, **settings: object) -> None:
        self.metrics = free_tcp_port()
        self.config = RedisConfig(**{"timeout_s": 0.3, "retry_s": 0.1, "metrics_port": self.metrics} | settings)
        self.folder = folder
        self.bus = ServerBus(self.config, server.address, folder / "bus")
        self.port = BusPort(self.bus, "run", ("a", "b"))
        self.tracker = self.bus.consumer("events", "run", "tracker", "one")
        self.port.started(0, 10, [{"name": "fc", "seeds": 4}])
        self.operator = self.bus.producer("commands", "run", "operator")
        self.apply("g", 1)
        self.port.emit(Transition(tick=1, site="fc", seed=1, branch=0, source=0, target=1, cause="command"))
        self.port.telemetry(1, "fc", torch.zeros(4, 2))
        self.port.end_tick(1)
        self.port.barrier()
        assert self.tracker.read(1, 1)

    def apply(self, id: str, tick: int) -> None:
        """A command from an operator to its end."""
        self.operator.publish(Germinate(id=id, site="fc", seed=1))
        self.end_one(id, tick)

    def end_one(self, id: str, tick: int) -> None:
        """A command that is on its way is handed out and applied."""
        assert wait_until(lambda: self.port.commands(tick))
        self.port.acknowledge(id, "applied", "", tick)

    def invite(self, server: FragileServer) -> None:
        """Let others join, as processes of their own would; the password is given by the environment."""
        config = dataclasses.replace(self.config, url=f"redis://127.0.0.1:{server.address.tcp_port}/0")
        outside = {"name": "none", "process": "external"}
        invite(self.folder, "run", config, {"config": {"controller": outside, "grafting": {"name": "linear"}, "tracking": outside}})

    def scrape(self) -> list[Sample]:
        """What is there now."""
        return [sample for family in self.families() for sample in family.samples]

    def families(self) -> list:
        """By name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def value(self, name: str, **labels: str) -> float:
        """One sample now."""
        (found,) = [s.value for s in self.scrape() if s.name == name and labels.items() <= s.labels.items()]
        return found

    def close(self) -> None:
        self.port.close()
        self.bus.close()
