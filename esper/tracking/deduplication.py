"""Which messages were handled before: a bus may hand one out twice."""

from __future__ import annotations

MAX_AHEAD = 10_000  # beyond this many out-of-order numbers the missing one is taken as lost for good


class Seen:
    """Remembers stream entries in constant memory, for numbers without holes."""

    def __init__(self) -> None:
        self._upto: dict[tuple[str, str, int], int] = {}
        self._ahead: dict[tuple[str, str, int], set[int]] = {}

    def is_new(self, stream: str, producer: str, entry: str) -> bool:
        """Whether entry ``<epoch>-<sequence>`` of this stream and producer comes for the first time; remembers it."""
        epoch, sequence = map(int, entry.split("-"))
        key = (stream, producer, epoch)
        upto, ahead = self._upto.get(key, 0), self._ahead.setdefault(key, set())
        if sequence <= upto or sequence in ahead:
            return False
        ahead.add(sequence)
        if len(ahead) > MAX_AHEAD:
            upto = min(ahead) - 1
        while upto + 1 in ahead:
            upto += 1
            ahead.remove(upto)
        self._upto[key] = upto
        return True
