"""Shared by the tests of the bus."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.bus.server.embedded import EmbeddedServer

sys.path.insert(0, str(Path(__file__).parent))  # samples.py, faults.py


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One real Valkey server for the tests that do not hurt it."""
    running = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    yield running
    running.stop()
