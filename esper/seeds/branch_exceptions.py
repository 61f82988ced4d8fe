"""Calling the code of a branch: an exception is kept for the engine, and the branch adds nothing to that forward.

A branch that raises cannot affect the host, just as one that gives NaN cannot. On a host that FSDP shares out it ends the run instead:
the passes of all processes must be alike, and FSDP does not survive a backward pass that breaks off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from esper.errors import UserError
from esper.seeds.branch_groups import BlockGroup, Group


def containable(error: Exception) -> bool:
    """Whether an exception is the branch's own: not a sentence for the user, nor memory that could not be had."""
    full = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    return not (isinstance(error, UserError) or full)


def run_contained(group: Group | BlockGroup, like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """The result of ``compute``; zeros shaped as ``like``, with ``group.error``, where it raises or has another shape."""
    if torch.compiler.is_compiling():  # nothing of a graph runs while it is traced
        return compute()
    try:
        delta = compute()
        if delta.shape != like.shape:
            raise ValueError(f"the branch gave {list(delta.shape)} where it writes {list(like.shape)}")
    except Exception as error:
        if not (group.contained and containable(error)):
            raise
        group.error = group.error or error
        return torch.zeros_like(like)
    return delta


def take_errors(groups: Iterable[Any]) -> dict[int, Exception]:
    """By branch, the exception of its group since the last call; the groups forget it."""
    found: dict[int, Exception] = {}
    for group in groups:
        error = getattr(group, "error", None)
        if error is not None:
            found.update(dict.fromkeys(group.branches, error))
            group.error = None
    return found
