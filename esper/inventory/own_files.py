"""The files that esper writes into a run's folder, known by their names: a file that is none of these is somebody else's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

CHECKPOINTS = "checkpoints"

#: Paths within a run's folder. A folder's pattern stands for all that esper puts there.
OWN = re.compile(
    r"""
    config\.yaml | \.config\.yaml\.tmp | summary\.(json|tmp) | run\.lock | job\.json | (esper|job|tracker)\.log
    | \.?environments\.json(\.tmp)? | \.?weights\.csv(\.tmp)? | \.?metrics\.csv(\.tmp)? | \.?events\.jsonl(\.tmp)? | trace\.json\.gz
    | started\.json | mlflow\.json | \.mlflow\.json\.\d+
    | (seeds|transitions|gates|metrics)\.(parquet|tmp)
    | \.parts/((seeds|transitions|gates|metrics)\.\d+\.\d+\.(parquet|tmp) | started\.json(\.tmp)? | alerts\.jsonl)
    | \.hydra/(config|hydra|overrides)\.yaml
    | figures/\w+\.png
    | model(-at-\d+)?/(model\.(json|safetensors|pt2|onnx)|sample\.npy|signature\.json)
    | checkpoints/\.?\d+(\.\d+\.\w+)?/(manifest\.json|state\.json|tensors\.safetensors)
    | bus/(join\.(json|partial)|payloads\.removed) | bus/(spool|payloads|server|controller)/.*
    """,
    re.VERBOSE,
)


@dataclass
class Contents:
    """What is in a run's folder: esper's own files, the others, and the bytes that the own ones take on the disk."""

    own: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    size: int = 0


def contents(folder: Path, below: str = "") -> Contents:
    """The contents of a run's ``folder``, or of its part ``below``; a link is somebody else's, and is not followed.

    Raises OSError for a folder that cannot be read.
    """
    found = Contents()
    waiting = [folder / below]
    while waiting:
        place = waiting.pop()
        for entry in os.scandir(place):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() or not OWN.fullmatch(path.relative_to(folder).as_posix()):
                found.others.append(path)
            else:
                found.own.append(path)
                found.size += entry.stat(follow_symlinks=False).st_blocks * 512
    return found


def remove_empty(folder: Path) -> None:
    """Remove the folders that hold nothing any more, ``folder`` itself last."""
    for place, _, _ in os.walk(folder, topdown=False):
        if not os.path.islink(place) and not os.listdir(place):
            os.rmdir(place)
