"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) by the package ``tokenizers``, trained on the training set alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from esper.errors import UserError
from esper.extras import import_extra

LEARNT = 32_000_000
"""Bytes of the training set that the merges are learnt from."""
BLOCK = 8_000_000
"""Bytes that are encoded at once."""
Encode = Callable[[list[str]], list[list[int]]]


def trained(path: Path, vocabulary: int, save: Path) -> Encode:
    """Learn ``vocabulary − 1`` tokens from the documents in ``path``; the last number is left for what separates documents.

    Raises:
        UserError: the package is not installed, or the text is too short for so many tokens.
    """
    import_extra("tokenizers", "task.tokens=bpe", "tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_first(documents_in(path), LEARNT), trainer)
    if tokenizer.get_vocab_size() < vocabulary - 1:
        known = tokenizer.get_vocab_size() + 1
        raise UserError(
            f"task.vocabulary={vocabulary}: the training set is too short for so many tokens; use task.vocabulary={known} or less."
        )
    tokenizer.save(str(save))
    return lambda texts: [one.ids for one in tokenizer.encode_batch(texts)]


def encode_file(path: Path, encode: Encode, separator: int) -> int:
    """Replace a file of documents by their tokens, uint16, with ``separator`` behind each document; returns the number of tokens."""
    import numpy as np

    count, aside = 0, path.with_name(f"{path.name}.tokens")
    documents = documents_in(path)
    with aside.open("wb") as file:
        while block := list(_first(documents, BLOCK)):
            for ids in encode(block):
                tokens = np.array([*ids, separator], dtype=np.uint16)
                file.write(tokens.tobytes())
                count += len(tokens)
    os.replace(aside, path)
    return count


def documents_in(path: Path) -> Iterator[str]:
    """The documents of a file, each with a NUL behind it, as text; a block of the file at a time."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            *whole, rest = (rest + block).split(b"\0")
            for document in whole:
                yield document.decode("utf-8")


def _first(documents: Iterable[str], most: int) -> Iterator[str]:
    """Documents until they have ``most`` characters together."""
    for document in documents:
        yield document
        most -= len(document)
        if most <= 0:
            return
