"""Windows over a file of tokens that is mapped into memory, not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.tasks.base import Batch

RESIDENT = 2**32
"""Bytes of tokens up to which a stream lies on a GPU whole; batches of a longer one are copied there one by one."""


class Stream(Dataset[Batch]):
    """Window ``i`` begins at token ``i·length`` and holds ``length + 1``: inputs are all but the last, targets all but the first, int64.

    The windows' inputs cover the file once. Only the pages that a batch touches are read.
    """

    def __init__(self, path: Path, dtype: str, tokens: int, length: int, held: Tensor | None = None) -> None:
        """The first ``tokens`` of the file at ``path``; ``held``: the same, already in a device's memory."""
        self.path, self.dtype, self.tokens, self.length = path, dtype, tokens, length
        self.count = max(0, (tokens - 1) // length)
        self._windows = (
            (self._mapped() if held is None else held).unfold(0, length + 1, length) if self.count else torch.zeros(0, length + 1)
        )

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> Batch:
        """Inputs and targets ``[N, length]`` of the windows at ``indices`` (int64 ``[N]``, on the data's device)."""
        windows = self._windows[indices].long() & 0xFFFF  # 16 bits lie there as signed ones, which every device can gather
        return windows[:, :-1], windows[:, 1:]

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.gather(torch.tensor(indices, device=self._windows.device))

    def lies_on(self, device: torch.device) -> bool:
        """Whether ``device`` takes all of it: a CPU maps it, another one has it copied up to ``RESIDENT`` bytes."""
        return device.type == "cpu" or self._windows.untyped_storage().nbytes() <= RESIDENT

    def to(self, device: torch.device) -> Stream:
        """The same windows on ``device``; itself when they are there already."""
        if self._windows.device == device or not self.count:
            return self
        return Stream(self.path, self.dtype, self.tokens, self.length, self._mapped().to(device))

    def _mapped(self) -> Tensor:
        import numpy as np

        dtype = np.dtype("int16" if self.dtype == "uint16" else self.dtype)
        mapped = np.memmap(self.path, dtype=dtype, mode="c", shape=(self.tokens,))  # never written to; torch warns of "r"
        return torch.from_numpy(mapped)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its file's name, for the workers of a loader."""
        return Stream, (self.path, self.dtype, self.tokens, self.length)
