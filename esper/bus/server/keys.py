"""Names of keys; the run in braces puts all keys of a run on one node of a cluster."""

from __future__ import annotations

from collections.abc import Iterable

RUNS = "esper:runs"


def names(members: Iterable[bytes]) -> list[str]:
    """Names in a set on a server, sorted; anybody may have written there, and what is no text names nothing of ours."""
    found = []
    for member in members:
        try:
            found.append(member.decode())
        except UnicodeDecodeError:
            continue
    return sorted(found)


def prefix(run: str) -> str:
    """What every key of a run starts with."""
    return f"esper:{{{run}}}"


def producers(run: str, stream: str) -> str:
    """Set of the names of a stream's producers."""
    return f"{prefix(run)}:{stream}"


def entries(run: str, stream: str, producer: str) -> str:
    """The server-side stream of one producer."""
    return f"{prefix(run)}:{stream}:{producer}"


def epoch(run: str, stream: str, producer: str) -> str:
    """Counter of a producer's starts."""
    return f"{prefix(run)}:epoch:{stream}:{producer}"


def last(run: str, stream: str, producer: str) -> str:
    """Id of the last entry a producer added."""
    return f"{prefix(run)}:last:{stream}:{producer}"


def dead(run: str) -> str:
    """Stream of dead letters."""
    return f"{prefix(run)}:dead"


def replays(run: str, stream: str, group: str) -> str:
    """Dead letters handed to a group once more."""
    return f"{prefix(run)}:replay:{stream}:{group}"


def counts(run: str, process: str) -> str:
    """What a process beside the trainer has counted."""
    return f"{prefix(run)}:counts:{process}"
