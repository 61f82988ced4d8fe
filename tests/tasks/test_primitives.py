"""Reasoning primitives: problems whose answers are right, measured where they stand, and held out."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from esper.errors import UserError
from esper.tasks import CONFIGS, Task
from esper.tasks.base import SETS
from esper.tasks.primitives import BYTES, KINDS

TEXT = "".join(f"line {number} says {number * number}.\n" for number in range(2000))


def task(**settings: object) -> Task:
    return CONFIGS["primitives"](**{"train": 60, "held_out": 20, **settings}).build()


def read(given: Task, which: str = "train") -> list[str]:
    """The samples as text, with the markers as <kind>."""
    data = getattr(given, which)
    inputs, targets = data.gather(torch.arange(len(data)))
    whole = torch.cat((inputs, targets[:, -1:]), 1).tolist()
    return ["".join(chr(token) if token < BYTES else f"<{KINDS[token - BYTES]}>" for token in row) for row in whole]


def test_every_answer_is_right_and_every_sample_has_problems_of_every_kind() -> None:
    orders, asked_again = set(), 0
    for sample in read(task(variables=3, sums=2, digits=2)):
        lines = sample.removesuffix("\n").split("\n")
        kinds = [re.findall("<(.*?)>", line)[0] for line in lines]
        orders.add(tuple(kinds))
        assert sorted(kinds) == sorted([*KINDS, "adding"])
        names: list[str] = []
        for line, kind in zip(lines, kinds, strict=True):
            stated, *asked = line.split(f"<{kind}>")
            if kind == "copying":
                assert [stated] == asked and len(stated) == 6
            elif kind == "adding":
                left, right = stated.split("+")
                assert int(left) + int(right) == int(asked[0]) and len(left) == len(right) == 2
            else:
                given, depth = dict(stated.removesuffix(";").split(";")), int(kind[-1])  # type: ignore[arg-type]
                assert len(given) == 3 * (depth + 1) and len(asked) == 3
                names += given
                asked_again += len({name for name, _ in asked}) < 3
                for name, answer in asked:
                    steps, value = 0, given[name]
                    while value in given:
                        steps, value = steps + 1, given[value]
                    assert (value, steps) == (answer, depth)
        assert len(names) == len(set(names)) == 3 * (1 + 2 + 3)
    assert asked_again > 20  # what was answered already tells nothing of what was not
    assert len(orders) > 20


def test_no_sum_is_in_two_sets_and_the_split_seed_alone_draws_the_problems() -> None:
    one = task(train=3000, held_out=300, digits=1)
    sums = [set(re.findall(r"(\d\+\d)<adding>", "".join(read(one, which)))) for which in SETS]
    assert all(sums) and sum(map(len, sums)) == len(set.union(*sums)) == 100
    assert task().digest == task().digest != task(split_seed=1).digest
    assert len(set(read(task(train=3000)))) == 3000


def test_a_net_that_is_right_everywhere_solves_all_and_one_wrong_token_loses_that_answer_alone() -> None:
    given = task(text=0)
    batch = given.validation.gather(torch.arange(20))
    output = 30.0 * F.one_hot(batch[1], given.outputs).float()
    for name, metric in given.metrics.items():
        assert torch.allclose(metric.compute(output, batch), torch.zeros(20) if "loss" in name else torch.ones(20), atol=1e-5), name
    asked = batch[0][0] == BYTES + KINDS.index("copying")
    place = int(asked.nonzero()) + 5  # its last letter
    output[0, place] = 0.0
    output[0, place, ord("\n")] = 30.0
    solved = {name: float(metric.compute(output, batch)[0]) for name, metric in given.metrics.items()}
    assert solved["copying"] == 0.0 and solved["solved"] == pytest.approx(0.8) and solved["adding"] == solved["assignment_2"] == 1.0
    assert solved["loss"] == pytest.approx(30.0 / (6 + 3 * 4 + 2 * 3), abs=1e-4)  # of all the answers' tokens one is wrong


def test_what_a_problem_states_is_not_in_the_loss() -> None:
    given = task()
    inputs, targets = given.test.gather(torch.arange(20))
    output = torch.zeros(*targets.shape, given.outputs, requires_grad=True)
    given.sample_loss(output, (inputs, targets)).sum().backward()
    learnt = output.grad.abs().sum(2).gt(0)  # type: ignore[union-attr]
    assert learnt.sum(1).tolist() == [6 + 3 * 4 + 2 * 3] * 20
    assert (inputs[learnt] >= BYTES).sum() == 20 * (1 + 2)  # a word or a sum begins behind its marker, a value behind a name


def test_a_text_stands_before_the_problems_and_is_begun_again_where_it_is_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(TEXT)
    given = task(text=50, path=str(path), held_out_bytes=1500, cache=str(tmp_path), train=1500)
    samples = read(given)
    stretches = len(given.train.text)  # type: ignore[attr-defined]
    assert all(part in TEXT for sample in samples for part in sample[:50].split("\0")) and stretches < 1500
    assert samples[0][:50] == samples[stretches][:50] and samples[0] != samples[stretches]
    assert not {sample[:50] for sample in samples} & {sample[:50] for sample in read(given, "validation")}
    assert given.input_shape == given.train[0][0].shape
    batch = given.test.gather(torch.arange(20))
    even = torch.zeros(*batch[1].shape, given.outputs)
    output = even.clone()
    output[:, :49] = 30.0 * F.one_hot(batch[1][:, :49], given.outputs).float()
    assert given.metrics["text_loss"].compute(output, batch).max() < 1e-4
    assert torch.allclose(given.metrics["answer_loss"].compute(output, batch), torch.full((20,), even[0, 0].exp().sum().log()))
    copy = pickle.loads(pickle.dumps(given.judge))
    assert torch.equal(copy.__getitems__([3])[1], given.judge[3][1].unsqueeze(0))


def test_a_text_of_one_byte_is_refused() -> None:
    with pytest.raises(UserError, match="2 or more, or 0 for no text"):
        task(text=1)
