"""The loop's own parts: schedules, devices, evaluation, and a run's settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.errors import UserError
from esper.randomness import generator, seed_for
from esper.trainer.config import TrainerConfig
from esper.trainer.device import choose_device, describe, numerics
from esper.trainer.schedule import SCHEDULES

TOTAL = 100


def curve(name: str, **settings: Any) -> list[float]:
    schedule = SCHEDULES[name](**settings)
    return [schedule.factor(step, TOTAL) for step in range(TOTAL)]


def shares(name: str) -> list[str]:
    """The keys of a schedule that are numbers."""
    return [field.name for field in dataclasses.fields(SCHEDULES[name]) if field.name not in ("name", "shape")]


def test_constant_is_constant_after_its_warm_up():
    assert set(curve("constant")) == {1.0}
    assert curve("constant", warmup=0.1)[:11] == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0])


def test_constant_then_decay_falls_in_its_last_part_alone():
    values = curve("constant_then_decay", decay=0.3, final=0.1)
    assert values[:71] == [1.0] * 71
    assert values[71:] == pytest.approx([0.1 + 0.9 * (100 - step) / 30 for step in range(71, 100)])
    assert curve("constant_then_decay", decay=0.0)[:99] == [1.0] * 99


@pytest.mark.parametrize(("name", "first"), [("cosine", 0), ("warmup_cosine", 20)])
def test_cosine_follows_half_a_wave(name: str, first: int):
    values = curve(name, final=0.05, **({"warmup": first / TOTAL} if first else {}))
    assert values[:first] == pytest.approx([(step + 1) / 20 for step in range(first)])
    for step in range(first, TOTAL):
        expected = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - first) / (TOTAL - first)))
        assert values[step] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "fall"), [("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - x**0.5), ("cosine", lambda x: math.cos(x * math.pi / 2) ** 2)]
)
def test_warmup_stable_decay_rises_stays_and_falls(shape: str, fall: Callable[[float], float]):
    values = curve("warmup_stable_decay", warmup=0.1, decay=0.2, final=0.1, shape=shape)
    assert values[:81] == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0] * 71)
    assert values[80:] == pytest.approx([0.1 + 0.9 * fall(step / 20) for step in range(20)])
    longer = SCHEDULES["warmup_stable_decay"](warmup=10 / 200, decay=0.2)
    assert [longer.factor(step, 200) for step in range(80)] == values[:80], "a longer run is the same one until its fall"


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_factor_is_between_nothing_and_one(name: str):
    for settings in ({}, dict.fromkeys(shares(name), 0.01)):
        assert all(0.0 < value <= 1.0 for value in curve(name, **settings))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_key_of_a_schedule_changes_its_curve(name: str):
    for key in shares(name):
        assert curve(name, **{key: 0.2}) != curve(name, **{key: 0.4}), key


def test_a_run_has_one_length():
    for steps, epochs in ((0, 0), (5, 5)):
        with pytest.raises(UserError, match="exactly one must be positive"):
            TrainerConfig(steps=steps, epochs=epochs)


def test_the_device_is_said_and_a_gpu_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(TrainerConfig()).type == "cpu"
    assert describe(torch.device("cpu"), TrainerConfig(threads=2)) == "device: cpu, 2 threads, fp32"
    with pytest.raises(UserError, match="torch sees no GPU"):
        choose_device(TrainerConfig(device="cuda"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_device(TrainerConfig(precision="fp16"))


def test_a_gpu_left_unused_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Big One")
    assert choose_device(TrainerConfig()) == torch.device("cuda", 0)
    assert choose_device(TrainerConfig(device="cpu")).type == "cpu"
    assert "a GPU is present but unused (Big One)" in describe(torch.device("cpu"), TrainerConfig(device="cpu"))
    assert describe(torch.device("cuda", 0), TrainerConfig(precision="bf16")) == "device: Big One (cuda:0), bf16"


def test_numerics_are_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.is_anomaly_enabled()
    with numerics(TrainerConfig(threads=1, detect_anomaly=True)):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1 and torch.is_anomaly_enabled()
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.is_anomaly_enabled())


def test_generators_are_one_a_purpose():
    def draw(*purpose: Any) -> float:
        return float(torch.rand(1, generator=generator(3, *purpose)))

    assert draw("host") == draw("host") != draw("branch")
    assert seed_for(1, "ab", "c") != seed_for(1, "a", "bc"), "words do not run together"
