"""The fingerprint changes with any bit of weights or curves, and with nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from esper.trainer.evaluation import fingerprint, untimed

HISTORY = [(1, "train/loss", 2.5), (2, "train/loss", math.nan)]


def weights() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }


def test_order_and_memory_layout_of_weights_do_not_count():
    other = dict(reversed(weights().items()))
    other["a"] = other["a"].t().contiguous().t()
    assert fingerprint(weights(), HISTORY) == fingerprint(other, iter(HISTORY))


@pytest.mark.parametrize("name", ["a", "half", "b"])
def test_one_bit_of_a_weight_counts(name: str):
    other = weights()
    flat = other[name].clone()
    flat.view(-1).view(torch.uint8)[0] ^= 1
    assert fingerprint(weights(), HISTORY) != fingerprint(other | {name: flat}, HISTORY)


def test_shape_dtype_and_name_count():
    base = fingerprint(weights(), HISTORY)
    assert base != fingerprint(weights() | {"a": torch.arange(6.0)}, HISTORY)
    assert base != fingerprint(weights() | {"b": torch.tensor(3, dtype=torch.int32)}, HISTORY)
    assert fingerprint({"x": torch.ones(1)}, []) != fingerprint({"y": torch.ones(1)}, [])


def test_every_value_name_and_tick_of_the_history_counts():
    base = fingerprint({}, HISTORY)
    for changed in (
        [(1, "train/loss", 2.5000000001), HISTORY[1]],
        [(1, "train/lost", 2.5), HISTORY[1]],
        [(0, "train/loss", 2.5), HISTORY[1]],
        HISTORY[:1],
    ):
        assert base != fingerprint({}, changed)


def test_what_a_clock_said_is_left_out():
    assert untimed([(1, "cost/seconds", 1.0), (1, "cost/judge_seconds", 1.0), (1, "cost/steps_per_second", 1.0), *HISTORY]) == HISTORY
