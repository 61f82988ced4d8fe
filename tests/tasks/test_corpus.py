"""Folders of texts as streams of tokens: sets that share no file, prepared once, mapped and never read whole."""

from __future__ import annotations

import json
import pickle
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks import corpus as module
from esper.tasks.base import SETS, Task
from esper.tasks.corpus import prepared
from esper.tasks.loading import Batches
from esper.tasks.stream import Stream

COUNT = 40


def words(number: int) -> str:
    return "".join(f"{number:02d} is a file, line {line}: ça va {number * line}\n" for line in range(12))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """40 texts in three folders; beside them what is left out: an empty one, a copy, a picture, hidden ones."""
    root = tmp_path / "texts"
    for number in range(COUNT):
        file = root / f"part{number % 3}" / f"{number:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(words(number), encoding="utf-8")
    (root / "empty.txt").write_text("")
    (root / "copy.txt").write_text(words(3), encoding="utf-8")
    (root / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (root / "latin.txt").write_bytes("ça".encode("latin-1"))
    (root / ".hidden.txt").write_text("secret" * 100)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret" * 100)
    return root


def settings(place: Path, **changes: Any) -> Any:
    return CONFIGS["text"](**({"path": str(place), "context": 16, "held_out": 0.1, "cache": str(place.parent / "cache")} | changes))


def raw(place: Path, **changes: Any) -> dict[str, bytes]:
    """The bytes of every prepared set."""
    folder = prepared(settings(place, **changes)).folder
    return {which: (folder / which).read_bytes() for which in SETS}


def test_every_text_is_in_one_set_whole_or_cut_where_a_held_out_set_is_full(place: Path) -> None:
    sets = raw(place)
    texts = {number: words(number).encode() for number in range(COUNT)}
    found = {which: data.split(b"\0")[:-1] for which, data in sets.items()}
    assert all(len(parts) > 1 for parts in found.values())
    owners = [number for parts in found.values() for part in parts for number, text in texts.items() if text.startswith(part)]
    assert sorted(owners) == list(range(COUNT)), "none twice, none missing, nothing hidden"
    assert all(part in texts.values() for part in found["train"])
    assert all(part in texts.values() for which in SETS for part in found[which][:-1])
    share = round(0.1 * sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and "/." not in str(file)))
    assert all(share - 3 <= sum(map(len, found[which])) <= share for which in ("judge", "validation", "test"))


def test_what_is_left_out_is_said(place: Path) -> None:
    task = settings(place).build()
    assert "texts, 40 texts (left out: 1 empty, 1 the same as another, 2 no UTF-8 text)" in task.description
    assert (task.inputs, task.input_shape, task.outputs, task.primary) == ("tokens", (16,), 256, "loss")
    assert "picture" not in str(prepared(settings(place, files=["*.txt"])).left_out)


def test_windows_cover_the_file_once_and_targets_are_the_next_bytes(place: Path) -> None:
    task, data = settings(place).build(), raw(place)["train"]
    inputs, targets = task.train.__getitems__(list(range(len(task.train))))
    assert bytes(inputs.flatten().tolist()) == data[: inputs.numel()] and len(data) - inputs.numel() <= 16
    assert bytes(targets.flatten().tolist()) == data[1 : inputs.numel() + 1]
    assert torch.equal(task.train[3][0], inputs[3]) and inputs.dtype == torch.int64


def test_a_part_of_the_training_set_is_its_beginning_and_leaves_the_other_sets_alone(place: Path) -> None:
    whole, part = settings(place).build(), settings(place, train_tokens=400).build()
    assert len(part.train) == 24 and torch.equal(part.train[23][1], whole.train[23][1])
    assert len(part.test) == len(whole.test) and part.digest != whole.digest


def test_the_split_depends_on_its_own_seed_alone(place: Path) -> None:
    digests = [settings(place, split_seed=seed).build().digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert raw(place)["test"] != raw(place, split_seed=1)["test"]


def test_a_corpus_is_prepared_once_and_again_where_a_file_changed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda config, found, folder: (made.append(folder), write(config, found, folder))[1])
    first = settings(place).build().digest
    assert settings(place, context=8).build().digest != first and len(made) == 1, "another length reads the same files"
    (place / "part0" / "00.txt").write_text("something else\n" * 30)
    assert settings(place).build().digest != first and len(made) == 2
    known = prepared(settings(place)).folder
    (known / "train").write_bytes(b"cut short")
    again = settings(place).build().digest
    assert len(made) == 3 and settings(place).build().digest == again
    assert not [path for path in known.parent.iterdir() if path.name.startswith(".")], "nothing is left lying about"


def test_a_process_that_was_slower_takes_what_the_quicker_one_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write

    def overtaken(config: Any, found: Any, folder: Path) -> None:
        monkeypatch.setattr(module, "_write", write)
        prepared(config)
        write(config, found, folder)

    monkeypatch.setattr(module, "_write", overtaken)
    corpus = prepared(settings(place))
    assert corpus.sets["train"]["documents"] > 20 and len(list(corpus.folder.parent.iterdir())) == 1


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("uint16", 65535)])
def test_a_stream_gives_every_token_that_its_type_holds(tmp_path: Path, dtype: str, most: int) -> None:
    np.array([0, 1, most // 2, most // 2 + 1, most], dtype=dtype).tofile(tmp_path / "tokens")
    inputs, targets = Stream(tmp_path / "tokens", dtype, 5, 4)[0]
    assert [*inputs.tolist(), int(targets[-1])] == [0, 1, most // 2, most // 2 + 1, most]


@pytest.mark.usefixtures("processes")
def test_a_stream_is_mapped_and_travels_as_its_name(place: Path) -> None:
    stream: Stream = settings(place).build().train
    assert len(pickle.dumps(stream)) < 500
    assert torch.equal(pickle.loads(pickle.dumps(stream)).__getitems__([2])[0], stream.__getitems__([2])[0])
    assert stream.lies_on(torch.device("cpu")) and stream.to(torch.device("cpu")) is stream
    plain = Batches(stream, 4, 0, lambda batch: batch)
    workers = Batches(stream, 4, 0, lambda batch: batch, num_workers=1)
    try:
        for step in range(3):
            assert torch.equal(plain.at(step)[0], workers.at(step)[0])
    finally:
        workers.close()


def test_a_stream_too_large_for_a_device_is_copied_there_batch_by_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Stream = settings(place).build().train
    meta = torch.device("meta")
    assert stream.lies_on(meta)
    monkeypatch.setattr("esper.tasks.stream.RESIDENT", 100)
    assert not stream.lies_on(meta) and stream.lies_on(torch.device("cpu"))
    assert not Batches(stream, 4, 0, lambda batch: batch, device="meta")._resident


def test_bpe_tokens_are_those_of_the_same_texts(place: Path) -> None:
    task = settings(place, tokens="bpe", vocabulary=300).build()
    folder = prepared(settings(place, tokens="bpe", vocabulary=300)).folder
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    for which, data in raw(place).items():
        ids = torch.frombuffer(bytearray((folder / which).read_bytes()), dtype=torch.uint16).long()
        ends = [-1, *(ids == 299).nonzero().flatten().tolist()]
        texts = [tokenizer.decode(ids[start + 1 : end].tolist()) for start, end in pairwise(ends)]
        assert "\0".join([*texts, ""]).encode() == data
    assert task.outputs == 300 and int(task.train.__getitems__([0])[0].max()) < 300
    assert task.digest == settings(place, tokens="bpe", vocabulary=300, cache=str(place.parent / "other")).build().digest


def test_bits_a_byte_compare_vocabularies(place: Path) -> None:
    for changes in ({}, {"tokens": "bpe", "vocabulary": 300}):
        task: Task = settings(place, **changes).build()
        held = prepared(settings(place, **changes)).sets["validation"]
        batch = task.validation.__getitems__([0, 1])
        even = torch.zeros(2, 16, task.outputs)
        expected = torch.log2(torch.tensor(float(task.outputs))) * held["tokens"] / held["bytes"]
        assert task.metrics["bits_per_byte"].compute(even, batch).tolist() == pytest.approx([float(expected)] * 2)


def test_a_single_text_in_bytes_is_dealt_in_stretches(tmp_path: Path) -> None:
    text = "".join(f"ça va {number}? " for number in range(3000))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    config = CONFIGS["text"](path=str(tmp_path / "one.txt"), tokens="bytes", context=16, stretches=60, cache=str(tmp_path / "cache"))
    task = config.build()
    folder = prepared(config).folder
    found = [part for which in SETS for part in (folder / which).read_bytes().split(b"\0")[:-1]]
    assert all(part.decode() in text for part in found) and sum(map(len, found)) > 0.95 * len(text.encode())
    assert "one.txt" in task.description


def test_python_stands_for_the_sources_of_the_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"purelib": str(tmp_path / "pure"), "platlib": str(tmp_path / "plat")}
    for name, folder in folders.items():
        package = Path(folder) / name
        package.mkdir(parents=True)
        for number in range(12):
            (package / f"module{number}.py").write_text(f"# {name} {number}\n" * 30)
        (package / "notes.txt").write_text("none of these")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: folders)
    config = CONFIGS["text"](path="python", context=16, held_out=0.1, cache=str(tmp_path / "cache"))
    assert config.build().description.startswith("Python sources of the installed packages, 24 texts, 0.0 MB as bytes")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": "characters"}, r"^task.tokens=characters is for a single file"),
        ({"files": ["*.md"]}, r"^task=text finds no file \(\*\.md\) in .*task\.files=\[…\]"),
        ({"context": 5000}, r"^task=text: the train set has \d+ tokens|^task=text: the judge set|^task=text: the (judge|validation) set"),
        (
            {"tokens": "bpe", "vocabulary": 4000},
            r"^task\.vocabulary=4000: the training set is too short .* use task\.vocabulary=\d+ or less",
        ),
        ({"cache": "/proc/nowhere"}, r"^task=text cannot write to /proc/nowhere: .*task\.cache="),
    ],
    ids=["characters", "no files", "context", "vocabulary", "cache"],
)
def test_what_cannot_be_is_refused_in_a_sentence(place: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(place, **changes).build()
    assert not list((place.parent / "cache").glob(".*")), "and nothing half made is left"


def test_a_part_of_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abc" * 5000)
    with pytest.raises(UserError, match=r"task\.train_tokens is for bytes and bpe"):
        CONFIGS["text"](path=str(tmp_path / "one.txt"), train_tokens=100).build()


def test_the_description_on_disk_is_plain(place: Path) -> None:
    known = json.loads((prepared(settings(place)).folder / "corpus.json").read_text())
    assert set(known) == {"sets", "vocabulary", "width", "left_out"} and set(known["sets"]) == set(SETS)
    assert known["sets"]["train"]["tokens"] == known["sets"]["train"]["bytes"]
