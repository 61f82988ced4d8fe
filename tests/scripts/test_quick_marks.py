"""What ``scripts/test quick`` leaves out."""

from __future__ import annotations

import pytest


def test_a_test_that_starts_processes_is_slow(processes: None, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow")


def test_a_test_with_a_server_is_slow_though_the_fixture_lies_further_back(esper: object, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow")


def test_any_other_test_is_quick(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow") is None
