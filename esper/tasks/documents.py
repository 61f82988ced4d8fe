"""The documents of a corpus: which files there are, what is left out, and which set each of them is dealt to."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from esper.errors import UserError
from esper.randomness import generator
from esper.tasks.base import SETS
from esper.tasks.config import TextConfig
from esper.tasks.text import PYTHON, king_james, read_file

HELD = ("test", "validation", "judge")
"""The sets that are filled first; ``train`` takes what they leave."""


@dataclass(frozen=True)
class Document:
    """A file, or a stretch of one: ``size`` in bytes, and a ``stamp`` that changes when its contents do."""

    name: str
    size: int
    stamp: str
    read: Callable[[], bytes]


def documents(config: TextConfig) -> list[Document]:
    """What ``task.path`` names, sorted by name.

    Raises:
        UserError: there is nothing to read.
    """
    if config.path == PYTHON:
        roots = {name: Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
        found = {one.name: one for root in dict.fromkeys(roots.values()) for one in _files(root, ["*.py"])}
    elif config.path and Path(config.path).expanduser().is_dir():
        found = {one.name: one for one in _files(Path(config.path).expanduser(), config.files)}
    else:
        found = {one.name: one for one in _stretches(config)}
    if not found:
        pattern = "*.py" if config.path == PYTHON else ", ".join(config.files)
        raise UserError(f"task=text finds no file ({pattern}) in {config.path}; name another folder, or other files with task.files=[…].")
    return [found[name] for name in sorted(found)]


def _files(root: Path, patterns: list[str]) -> Iterator[Document]:
    """Files below ``root``; hidden ones, and what lies behind links to folders, are passed over."""
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            path = Path(folder, name)
            if path.is_file():
                facts = path.stat()
                yield Document(path.relative_to(root).as_posix(), facts.st_size, str(facts.st_mtime_ns), path.read_bytes)


def _stretches(config: TextConfig) -> Iterator[Document]:
    """A single text in ``config.stretches`` pieces, cut between characters."""
    data = (read_file(config.path) if config.path else king_james()).encode()
    ends = [len(data) * number // config.stretches for number in range(config.stretches + 1)]
    for number in range(1, config.stretches):
        while ends[number] < len(data) and data[ends[number]] & 0xC0 == 0x80:  # inside a character
            ends[number] += 1
    for number in range(config.stretches):
        part = data[ends[number] : ends[number + 1]]
        yield Document(f"{number:06d}", len(part), hashlib.sha256(part).hexdigest(), partial(bytes, part))


@dataclass
class LeftOut:
    """How many documents are in no set, and why."""

    empty: int = 0
    repeated: int = 0
    not_text: int = 0

    def __str__(self) -> str:
        said = {"empty": self.empty, "the same as another": self.repeated, "no UTF-8 text": self.not_text}
        return ", ".join(f"{count} {reason}" for reason, count in said.items() if count)


def dealt(config: TextConfig, found: list[Document], left_out: LeftOut) -> Iterator[tuple[str, bytes]]:
    """(set, text) of every document, set by set; the last one of a held-out set is cut where the set is full.

    The order is that of ``split_seed``. A set that is held out takes documents no larger than itself first. Nothing is read
    twice, and a text that was dealt before is left out, so that no set knows another's.
    """
    share = min(config.held_out_bytes, round(config.held_out * sum(document.size for document in found)))
    order = torch.randperm(len(found), generator=generator(config.split_seed, "split")).tolist()
    waiting = sorted(order, key=lambda place: found[place].size > share)
    seen: set[bytes] = set()
    for which in HELD:
        room = share
        while room > 0 and waiting:
            text = _text(found[waiting.pop(0)], seen, left_out)
            if text:
                yield which, text if len(text) <= room else text[:room].decode("utf-8", "ignore").encode()
            room -= len(text)
    left = set(waiting)
    for place in order:
        text = _text(found[place], seen, left_out) if place in left else b""
        if text:
            yield "train", text


def _text(document: Document, seen: set[bytes], left_out: LeftOut) -> bytes:
    """The document's bytes; none where it is left out."""
    try:
        text = document.read()
    except OSError as error:
        raise UserError(f"task=text cannot read {document.name}: {error.strerror}; make it readable or move it away.") from error
    key = hashlib.sha256(text).digest()
    if not text:
        left_out.empty += 1
    elif key in seen:
        left_out.repeated += 1
    elif b"\0" in text or not _is_utf8(text):
        left_out.not_text += 1
    else:
        seen.add(key)
        return text
    return b""


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


assert set(HELD) | {"train"} == set(SETS)
