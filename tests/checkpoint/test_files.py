"""Checkpoints on disk: whole or refused, nothing executed, older ones kept as asked."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.checkpoint import disk
from esper.checkpoint import files as pieces
from esper.checkpoint.background_saver import Retention, Saver
from esper.checkpoint.files import Written, map_bytes, parse_tensors, read_bytes, write_bytes, write_tensors
from esper.checkpoint.tree import join, kept, same, split
from esper.errors import UserError

STATE: dict[str, Any] = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(3, dtype=torch.bfloat16)},
    "numbers": [1, -2.5, float("nan"), float("inf"), True, None, "text", [torch.tensor(3, dtype=torch.int16)]],
    "flags": torch.tensor([True, False]),
}


def saved(folder: Path, step: int = 7, score: float | None = None, state: Any = None) -> Path:
    """One checkpoint in ``folder``."""
    return disk.write(disk.copy(state or STATE, step, step, {"host": {}}, score), folder).path


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    checkpoint, state = disk.read(saved(tmp_path))
    assert same(state, STATE) and checkpoint.step == 7


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3000, 10_500])
def test_every_piece_has_its_own_hash_and_every_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "SMALL", 500)  # so that this little is hashed in threads
    lot = random.Random(size)
    content, path = lot.randbytes(size), tmp_path / "part"
    cuts = sorted(lot.randrange(size + 1) for _ in range(7))
    stated = write_bytes(path, [content[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)])
    assert path.read_bytes() == content and len(stated.sha256) == -(-size // 1000)
    assert Written.of_card(json.loads(json.dumps(stated.card()))) == stated
    assert read_bytes(path, stated) == bytes(map_bytes(path, stated)) == content
    for place in {0, size // 2, size - 1} if size else ():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for read in (read_bytes, map_bytes):
            with pytest.raises(ValueError, match="not what was written"):
                read(path, stated)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="longer"):
        map_bytes(path, stated)


def test_what_is_kept_of_a_state_does_not_see_what_happens_to_its_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = kept(disk.read(path)[1])
    with (path / disk.TENSORS).open("r+b") as file:
        file.write(bytes((path / disk.TENSORS).stat().st_size))
    assert same(state, STATE)


def test_a_copy_does_not_see_what_training_does_next() -> None:
    weights = torch.zeros(3)
    plain, tensors = split({"weights": weights})
    weights += 1
    assert join(plain, tensors)["weights"].sum() == 0


def test_the_files_are_safetensors_to_the_library_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, tensors = split(STATE)
    write_tensors(tmp_path / "ours", tensors)
    assert same(load_file(tmp_path / "ours"), tensors)
    save_file(tensors, tmp_path / "theirs")
    assert same(parse_tensors(memoryview(bytearray((tmp_path / "theirs").read_bytes()))), tensors)


@pytest.mark.slow  # seconds of computing
def test_ten_thousand_mutations_are_refused_or_identical(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole")
    lot, damaged = random.Random(0), tmp_path / "damaged"
    shutil.copytree(path, damaged)
    originals = {file.name: file.read_bytes() for file in path.iterdir()}
    refused = 0
    for _ in range(10_000):
        name = lot.choice(sorted(originals))
        (damaged / name).write_bytes(mutated(originals[name], lot))
        try:
            _, state = disk.read(damaged)
            assert same(state, STATE)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
        (damaged / name).write_bytes(originals[name])
    assert refused > 9_000


def mutated(content: bytes, lot: random.Random) -> bytes:
    """One random fault: a bit, a byte, a cut, a gap, an insertion, two swapped stretches, zeros."""
    place, length = lot.randrange(len(content)), lot.randrange(1, 64)
    kind = lot.randrange(7)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << lot.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + bytes([lot.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place]
    if kind == 3:
        return content[:place] + content[place + length :]
    if kind == 4:
        return content[:place] + lot.randbytes(length) + content[place:]
    if kind == 5:
        return content[place:] + content[:place]
    return content[:place] + bytes(length) + content[place + length :]


def forged(path: Path, **parts: bytes) -> None:
    """Put other parts in and make every hash right again, as somebody hostile would."""
    import hashlib

    manifest = json.loads((path / disk.MANIFEST).read_text())
    for name, content in {disk.STATE: parts.get("state"), disk.TENSORS: parts.get("tensors")}.items():
        if content is not None:
            (path / name).write_bytes(content)
            manifest["parts"][name] = Written(len(content), pieces.PIECE, (hashlib.sha256(content).hexdigest(),)).card()
    manifest |= json.loads(parts.get("manifest", b"{}"))
    manifest["sha256"] = disk._own_digest(manifest)
    (path / disk.MANIFEST).write_text(json.dumps(manifest))


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_exploits_execute_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    hostile = [pickle.dumps(Exploit(mark), protocol) for protocol in (0, 2, 4)]
    torch.save({"weights": Exploit(mark)}, tmp_path / "hostile.pt")
    hostile.append((tmp_path / "hostile.pt").read_bytes())
    for number, content in enumerate(hostile):
        for part in ("state", "tensors"):
            path = saved(tmp_path / f"{number}-{part}")
            forged(path, **{part: content})
            with pytest.raises(UserError, match="cannot be used"):
                disk.read(path)
        (path / disk.MANIFEST).write_bytes(content)
        with pytest.raises(UserError, match="cannot be used"):
            disk.read(path)
    assert not mark.exists()


FORGERIES = {
    "deep": {"state": b"[" * 100_000},
    "huge header": {"tensors": (1 << 62).to_bytes(8, "little") + b"{}"},
    "short": {"tensors": b"abc"},
    "not json": {"state": b"{"},
    "unknown number": {"state": b'{"a": {"$float": "__import__"}}'},
    "missing tensor": {"state": b'{"a": {"$tensor": "nothing"}}'},
    "no parts": {"manifest": b'{"parts": []}'},
    "parts of nothing": {"manifest": b'{"parts": {"state.json": 3, "tensors.safetensors": null}}'},
    "pieces of no size": {"manifest": b'{"parts": {"state.json": {"bytes": 5, "piece": 0, "sha256": []}}}'},
    "fewer hashes than pieces": {"manifest": b'{"parts": {"state.json": {"bytes": 5, "piece": 1, "sha256": []}}}'},
    "an old one's hash": {"manifest": b'{"schema": 1, "parts": {"state.json": {"bytes": 5, "sha256": {}}}}'},
    "an old one without parts": {"manifest": b'{"schema": 1, "parts": []}'},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_parts_with_right_hashes_are_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    forged(path, **FORGERIES[name])
    with pytest.raises(UserError, match="cannot be used"):
        disk.read(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F128", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
    ],
)
def test_headers_that_lie_about_their_bytes_are_refused(entry: dict[str, Any]) -> None:
    header = json.dumps({"a": entry}).encode()
    with pytest.raises(ValueError, match="'a'"):
        parse_tensors(memoryview(bytearray(len(header).to_bytes(8, "little") + header + bytes(8))))


def test_a_newer_a_foreign_and_an_absent_one_are_refused_in_words(tmp_path: Path) -> None:
    path = saved(tmp_path)
    forged(path, manifest=b'{"schema": 99, "esper": "7.0"}')
    with pytest.raises(UserError, match=r"schema 99.*install the version of esper that wrote it \(7.0\)"):
        disk.read(path)
    forged(path, manifest=b'{"format": "theirs"}')
    with pytest.raises(UserError, match="not a checkpoint of esper"):
        disk.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        disk.read(tmp_path / "nothing")


def test_the_newest_whole_one_is_found_behind_damaged_ones(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 5), saved(tmp_path, 9)
    (second / disk.TENSORS).write_bytes(b"cut")
    found = disk.newest(tmp_path)
    assert found is not None and found[0].path == first and "truncated" in found[2][0]
    (first / disk.STATE).unlink()
    with pytest.raises(UserError, match="None of the 2 checkpoints"):
        disk.newest(tmp_path)
    assert disk.newest(tmp_path / "elsewhere") is None


def test_retention_by_count_score_and_age(tmp_path: Path) -> None:
    for step, score in ((1, 0.3), (2, 0.9), (3, 0.5), (4, None), (5, 0.1)):
        saved(tmp_path, step, score)
    disk.retain(tmp_path, keep=2, best=1, hours=1.0)
    assert [int(path.name) for path in disk.checkpoints(tmp_path)] == [1, 2, 3, 4, 5]
    disk.retain(tmp_path, keep=2, best=1, hours=0.0)
    assert [int(path.name) for path in disk.checkpoints(tmp_path)] == [2, 4, 5]
    disk.forget_after(tmp_path, 4)
    assert [int(path.name) for path in disk.checkpoints(tmp_path)] == [2, 4]


def test_of_equal_scores_the_first_is_the_best_since_later_ones_were_not_measured(tmp_path: Path) -> None:
    for step, score in ((1, 0.3), (2, 0.9), (3, 0.9), (4, 0.9), (5, 0.1)):
        saved(tmp_path, step, score)
    disk.retain(tmp_path, keep=1, best=1, hours=0.0)
    assert [int(path.name) for path in disk.checkpoints(tmp_path)] == [2, 5]


def test_a_checkpoint_that_cannot_be_reached_for_a_moment_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [saved(tmp_path, step) for step in (1, 2, 3)]
    (paths[0] / disk.MANIFEST).write_text("{")  # damaged: it goes
    read = Path.read_bytes

    def away(path: Path) -> bytes:
        if path == paths[1] / disk.MANIFEST:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", away)
    disk.retain(tmp_path, keep=1, best=0, hours=0.0)
    assert disk.checkpoints(tmp_path) == paths[1:]


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path)
    shutil.copytree(path, tmp_path / ".000000009.123")
    assert disk.checkpoints(tmp_path) == [path]
    disk.sweep_out(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["000000007"]


def test_nothing_counts_before_what_was_said_is_kept(tmp_path: Path) -> None:
    answers = [False, True]
    saver = Saver(tmp_path, Retention(), settled=lambda: answers.pop(0))
    for step in (1, 2):
        saver.save(lambda step=step: disk.copy(STATE, step, step, {}, None), wait=True)
    assert [int(path.name) for path in disk.checkpoints(tmp_path)] == [2]


def test_an_error_of_the_writing_thread_reaches_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    saver = Saver(tmp_path / "file", Retention())
    with pytest.raises(OSError):
        saver.save(lambda: disk.copy(STATE, 1, 1, {}, None), wait=True)


def test_tensors_that_share_bytes_are_refused() -> None:
    place = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"a": place, "b": place}).encode()
    with pytest.raises(ValueError, match="overlap"):
        parse_tensors(memoryview(len(header).to_bytes(8, "little") + header + bytes(4)))


def test_a_manifest_that_somebody_changed_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    manifest = json.loads((path / disk.MANIFEST).read_text())
    (path / disk.MANIFEST).write_text(json.dumps(manifest | {"tick": manifest["tick"] + 1}))
    with pytest.raises(UserError, match="is not what was written"):
        disk.read(path)
