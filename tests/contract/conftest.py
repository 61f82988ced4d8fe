"""Servers for the suite over every backend."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.bus.server.connection import Address
from esper.bus.server.embedded import EmbeddedServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bus"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tls import tls_before

pytest.register_assert_rewrite("esper.bus.conformance")


WAITS = ("test_what_a_consumer_keeps", "test_what_an_order_holds")
"""Claims about claim times, which let seconds pass."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that wait are slow, whatever the backend."""
    for item in items:
        if item.name.startswith(WAITS):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def server(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One real Valkey server for the tests that do not hurt it."""
    running = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tls(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The same server behind TLS with client certificates."""
    folder = tmp_path_factory.mktemp("tls")
    with tls_before(server.address.tcp_port, folder) as port:
        files = {"tls_ca": "authority.crt", "tls_cert": "client.crt", "tls_key": "client.key"}
        paths = {name: str(folder / file) for name, file in files.items()}
        yield dataclasses.replace(server.address, tcp_port=port, tls=True, **paths)
