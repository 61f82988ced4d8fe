"""Corpora that need not fit into memory: their tokens are prepared once, on disk, and mapped from there.

A prepared corpus is a folder in the cache: one file of tokens a set, its documents one after the other with a separator behind each, and
``corpus.json``, which is written last. Its name is a hash of the settings and of the names, sizes and times of the files it was made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from esper.errors import UserError
from esper.tasks.base import SETS, Batch, Metric, Task, ready
from esper.tasks.config import TextConfig
from esper.tasks.documents import Document, LeftOut, dealt, documents
from esper.tasks.stream import Stream
from esper.tasks.text import PYTHON, bits, correct, sample_loss

VERSION = 1
"""Of the form in which corpora are prepared; it is part of their name."""
NAME = "corpus.json"
SEPARATOR = b"\0"
BYTES, DTYPE = 256, {1: "uint8", 2: "uint16"}


@dataclass(frozen=True)
class Prepared:
    """A corpus in the cache: by set its ``tokens``, ``bytes``, ``documents`` and ``sha256``; ``left_out`` in words."""

    folder: Path
    sets: dict[str, dict[str, Any]]
    vocabulary: int
    width: int
    """Bytes of a token."""
    left_out: str

    def stream(self, which: str, context: int, tokens: int = 0) -> Stream:
        """One set as windows of ``context + 1`` tokens; of its first ``tokens`` alone, where that is not 0."""
        count = int(self.sets[which]["tokens"])
        return Stream(self.folder / which, DTYPE[self.width], min(count, tokens or count), context)


def build(config: TextConfig) -> Task:
    """Prepare the corpus, or find it prepared, and map it.

    Raises:
        UserError: there is nothing to read, a set would be empty, or the cache cannot be written.
    """
    corpus = prepared(config)
    data: dict[str, Any] = {which: corpus.stream(which, config.context, config.train_tokens if which == "train" else 0) for which in SETS}
    for which, stream in data.items():
        if not len(stream):
            tokens, count = corpus.sets[which]["tokens"], corpus.sets[which]["documents"]
            raise UserError(
                f"task=text: the {which} set has {tokens} tokens of {count} texts, too few for a window of {config.context} + 1; give more "
                "text, lower task.context or raise task.held_out and task.held_out_bytes."
            )
    held = corpus.sets["validation"]
    ratio = held["tokens"] / held["bytes"]
    sizes = {which: [len(stream), corpus.sets[which]["sha256"]] for which, stream in data.items()}
    return Task(
        name=config.name,
        **data,
        collate=ready,
        sample_loss=sample_loss,
        metrics={
            "loss": Metric("min", sample_loss),
            "bits_per_byte": Metric("min", partial(bits_per_byte, ratio)),
            "accuracy": Metric("max", correct),
        },
        primary="loss",
        inputs="tokens",
        input_shape=(config.context,),
        outputs=corpus.vocabulary,
        digest=hashlib.sha256(json.dumps([config.context, sizes], sort_keys=True).encode()).hexdigest(),
        description=_describe(config, corpus, data),
        passes=config.passes,
    )


def bits_per_byte(ratio: float, output: Tensor, batch: Batch) -> Tensor:
    """The loss in bits a byte, ``[N]``; ``ratio`` is the number of tokens a byte in the validation set."""
    return bits(output, batch) * ratio


def prepared(config: TextConfig) -> Prepared:
    """The corpus in the cache, made now if it is not there."""
    found = documents(config)
    cache = _cache(config)
    folder = cache / _key(config, found)
    known = _read(folder)
    if known is not None:
        return known
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    except OSError as error:
        raise UserError(f"task=text cannot write to {cache}: {error.strerror}; name another folder with task.cache=…") from error
    try:
        _write(config, found, aside)
        shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged: it could not be read
        os.rename(aside, folder)
    except OSError as error:
        if _read(folder) is None:  # else another process was quicker
            raise UserError(f"task=text cannot write to {cache}: {error.strerror}; name another folder with task.cache=…") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    made = _read(folder)
    assert made is not None, folder
    return made


def _cache(config: TextConfig) -> Path:
    if config.cache:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "esper" / "text"


def _key(config: TextConfig, found: list[Document]) -> str:
    settings: list[Any] = [VERSION, config.held_out, config.held_out_bytes, config.split_seed]
    settings += ["bpe", config.vocabulary] if config.tokens == "bpe" else ["bytes"]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for document in found:
        digest.update(f"{document.name}\0{document.size}\0{document.stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _read(folder: Path) -> Prepared | None:
    """The corpus in ``folder``; None where there is none, or one whose files have another size than when they were written."""
    try:
        known = json.loads((folder / NAME).read_text(encoding="utf-8"))
        made = Prepared(folder, known["sets"], int(known["vocabulary"]), int(known["width"]), str(known["left_out"]))
        whole = all((folder / which).stat().st_size == made.sets[which]["tokens"] * made.width for which in SETS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made if whole else None


@dataclass
class _Counts:
    """What was written of one set."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    sha256: str = ""


def _write(config: TextConfig, found: list[Document], folder: Path) -> None:
    """Prepare into an empty folder. BPE tokens are made of the bytes that were written before, so that both have the same sets."""
    counts, left_out = _write_bytes(config, found, folder)
    vocabulary, width = BYTES, 1
    if config.tokens == "bpe":
        from esper.tasks import bpe

        vocabulary, width = config.vocabulary, 2
        encode = bpe.trained(folder / "train", vocabulary, folder / "tokenizer.json")
        for which in SETS:
            counts[which].tokens = bpe.encode_file(folder / which, encode, vocabulary - 1)
    sets = {which: asdict(one) | {"sha256": _sha256(folder / which)} for which, one in counts.items()}
    text = json.dumps({"sets": sets, "vocabulary": vocabulary, "width": width, "left_out": str(left_out)}, indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def _write_bytes(config: TextConfig, found: list[Document], folder: Path) -> tuple[dict[str, _Counts], LeftOut]:
    counts, left_out = {which: _Counts() for which in SETS}, LeftOut()
    files: dict[str, BinaryIO] = {}
    try:
        for which in SETS:
            files[which] = (folder / which).open("wb")
        for which, text in dealt(config, found, left_out):
            files[which].write(text + SEPARATOR)
            one = counts[which]
            one.documents, one.bytes, one.tokens = one.documents + 1, one.bytes + len(text) + 1, one.tokens + len(text) + 1
    finally:
        for file in files.values():
            file.close()
    return counts, left_out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(config: TextConfig, corpus: Prepared, data: dict[str, Stream]) -> str:
    source = "Python sources of the installed packages" if config.path == PYTHON else Path(config.path).name or "King James Bible"
    kind = f"BPE tokens of {corpus.vocabulary} kinds" if config.tokens == "bpe" else "bytes"
    count = sum(one["documents"] for one in corpus.sets.values())
    sizes = ", ".join(f"{which} {len(stream)}" for which, stream in data.items())
    total = math.fsum(one["bytes"] for one in corpus.sets.values()) / 1e6
    left = f" (left out: {corpus.left_out})" if corpus.left_out else ""
    return f"{source}, {count} texts{left}, {total:.1f} MB as {kind}, windows of {config.context}; {sizes}"
