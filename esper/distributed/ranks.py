"""``Ranks``: the processes that train one model together, each of which is one rank.

Ranks tell each other small things over a group of gloo's, and add up gradients over the default group. Every exchange has a label. Where
two ranks come to different exchanges, all of them end with a sentence that names both, and none waits for ever.
"""

from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from esper.distributed.lost_rank import Roll
from esper.distributed.ordered_sum import ordered_sum
from esper.errors import RankLost, UserError

INLINE = 2048
"""Bytes that travel with the label; longer messages need a second exchange."""
BUCKET = 2**25
"""Bytes of tensors that are added up at a time."""
WAIT = datetime.timedelta(minutes=30)
"""How long a rank may be late: one that dies is noticed at once, one that hangs only then."""

Value = TypeVar("Value")


class Ranks:
    """The ranks of this training, as one of them sees them; alone, it waits for nobody.

    ``shards`` is the number of micro-batches of which a global batch consists: the trainer's, which leaves the same bits on every number
    of ranks. It is 0 in a loop of the user's own, where every rank has batches of its own. ``sharded`` says that the host is shared out by
    FSDP, so that every pass through it takes all ranks.
    """

    sharded = False

    def __init__(self, shards: int = 0) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self.shards = shards
        self._control: Any = None
        self._roll: Roll | None = None
        if self.size > 1:
            with self.watched("the start"):
                self._control = dist.new_group(backend="gloo", timeout=WAIT)
                self._roll = Roll(self.rank, self.size)

    @classmethod
    def alone(cls, shards: int = 0) -> Ranks:
        """One rank, whatever other processes there are."""
        made = cls.__new__(cls)
        made.rank, made.size, made.shards, made._control, made._roll = 0, 1, shards, None, None
        return made

    @property
    def group(self) -> Any:
        """The group over which ranks tell each other things; None where this one is alone."""
        return self._control

    @property
    def share(self) -> range:
        """The places of this rank's micro-batches among the ``shards`` of a global batch."""
        each = self.shards // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def many(self) -> bool:
        """Whether anything is agreed on with others, or shared out as if there were others."""
        return self.size > 1 or self.shards > 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this is the rank of the last micro-batches."""
        return self.rank == self.size - 1

    # --- messages ---

    def gather(self, label: str, value: Any, tensor: Tensor | None = None) -> list[tuple[Any, Tensor]]:
        """What every rank has to say, in their order: a value that JSON can hold, and a tensor of any length, as float64."""
        mine = torch.zeros(0, dtype=torch.float64) if tensor is None else tensor.detach().to("cpu", torch.float64).reshape(-1)
        if self.size == 1:
            return [(value, mine)]
        return [_unpacked(packed) for packed in self._exchange(label, _packed(value, mine))]

    def values(self, label: str, value: Any) -> list[Any]:
        """What every rank has to say, without tensors."""
        return [found for found, _ in self.gather(label, value)]

    def decided(self, label: str, value: Callable[[], Value], by: int = 0, passes: bool = False) -> Value:
        """A value that one rank computes, alone, and all take; computed by the others, it might be another.

        Where it takes ``passes`` through a sharded host, all ranks compute it at the same time.
        """
        if self.size == 1:
            return value()
        mine = value() if self.rank == by or (passes and self.sharded) else None
        found: Value = self.values(label, mine if self.rank == by else None)[by]
        return found

    def all_agree(self, label: str, yes: bool) -> bool:
        """Whether all ranks say yes."""
        return all(self.values(label, yes))

    def _exchange(self, label: str, payload: Tensor) -> list[Tensor]:
        crc, length = zlib.crc32(label.encode()), payload.numel()
        head = torch.zeros(16 + INLINE, dtype=torch.uint8)
        head[:16] = torch.tensor([crc, length], dtype=torch.int64).view(torch.uint8)
        head[16 : 16 + min(length, INLINE)] = payload[:INLINE]
        with self.watched(label):
            heads = self._all(head)
            numbers = [one[:16].clone().view(torch.int64).tolist() for one in heads]
            if any(number[0] != crc for number in numbers):
                raise self._parted(label)
            longest = max(number[1] for number in numbers)
            whole = [one[16:] for one in heads] if longest <= INLINE else self._all(_padded(payload, longest))
        return [one[: number[1]] for one, number in zip(whole, numbers, strict=True)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self._control)
        return found

    def _parted(self, label: str) -> UserError:
        text = _padded(torch.frombuffer(bytearray(label.encode()[:256]), dtype=torch.uint8), 256)
        labels = [_bytes(one).rstrip(b"\0").decode(errors="replace") for one in self._all(text)]
        other = next(rank for rank, one in enumerate(labels) if one != labels[0])
        return UserError(
            f"The processes have parted: rank 0 has come to '{labels[0]}', and rank {other} to '{labels[other]}'. All of them must make "
            "the same calls with the same settings, data and code; resume from the last checkpoint once they do."
        )

    def come_to(self, label: str) -> None:
        """Meet all ranks before passes through a sharded host; one that has come to another place would wait in the passes for ever."""
        if self.sharded:
            self.values(label, None)

    # --- what must be equal ---

    def refuse_different(self, label: str, parts: dict[str, Any]) -> None:
        """Raise UserError where a rank has another value of a part than rank 0; the sentence names the first such part."""
        found = self.values(label, parts)
        for name, value in found[0].items():
            others = [rank for rank, one in enumerate(found) if one.get(name) != value]
            if others:
                raise UserError(
                    f"{name} of rank {others[0]} is not that of rank 0, and what grows would not be the same in each process; give all "
                    f"{self.size} processes the same."
                )

    # --- sums ---

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums over all ranks, in a fixed order, with the same bits on all of them.

        A None stands for zeros of the shape, dtype and device of its place in ``like``; where all ranks have None, so has the sum. Each
        rank adds up a share of the elements and all gather the shares, which sends as many bytes as an all-reduce in a ring does.
        """
        if self.size == 1:
            return list(tensors)
        present = torch.tensor([float(tensor is not None) for tensor in tensors], device=like[0].device if like else None)
        whole = [torch.zeros_like(one) if tensor is None else tensor for tensor, one in zip(tensors, like, strict=True)]
        with self.watched("the sum of the gradients"):
            *sums, counts = self._sums([*whole, present])
        return [total if count else None for total, count in zip(sums, counts.tolist(), strict=True)]

    def _sums(self, tensors: list[Tensor]) -> list[Tensor]:
        """All shares are sent before the first is waited for, in the same order on every rank."""
        buckets = list(_buckets(tensors))
        sent = []
        for bucket in buckets:
            flat = torch.cat([tensors[place].reshape(-1) for place in bucket])
            flat = _padded(flat, -(-flat.numel() // self.size) * self.size)
            mine = torch.empty_like(flat)
            sent.append((dist.all_to_all_single(mine, flat, async_op=True), flat, mine))
        gathered = []
        for work, flat, mine in sent:
            work.wait()
            share = ordered_sum(list(mine.view(self.size, -1).unbind()))
            gathered.append((dist.all_gather(list(flat.view(self.size, -1).unbind()), share, async_op=True), flat))
        found: dict[int, Tensor] = {}
        for bucket, (work, flat) in zip(buckets, gathered, strict=True):
            work.wait()
            sizes = [tensors[place].numel() for place in bucket]
            for place, part in zip(bucket, torch.split(flat[: sum(sizes)], sizes), strict=True):
                found[place] = part.view(tensors[place].shape)
        return [found[place] for place in range(len(tensors))]

    @torch.no_grad()
    def from_rank(self, tensors: Sequence[Tensor], rank: int = 0) -> None:
        """Give these tensors the values that they have on one rank."""
        if self.size > 1:
            with self.watched("what one rank has for all"):
                for tensor in tensors:
                    dist.broadcast(tensor, rank)

    @contextmanager
    def watched(self, doing: str) -> Iterator[None]:
        """Context of a wait for other ranks. Raises RankLost, which names the rank that is gone, for a connection that broke."""
        try:
            yield
        except (RankLost, UserError):
            raise
        except RuntimeError as error:
            if self._roll is None:
                raise RankLost(f"The processes of this training could not find each other: {error}") from error
            self.break_off()  # so that nobody waits for this rank
            raise self._roll.missing(doing, error) from error

    @contextmanager
    def watched_passes(self) -> Iterator[None]:
        """Context of passes through a sharded host, in which a connection may break as well: ``watched`` then."""
        try:
            yield
        except RuntimeError as error:
            if not self.sharded or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            with self.watched("a pass through the host"):
                raise

    def leave(self, why: str) -> None:
        """Tell the others why this rank ends before they do, and break the connections."""
        if self._roll is not None and self._control is not None:
            self.break_off()
            self._roll.leave(why)

    def break_off(self) -> None:
        """Close the connections to the other ranks; the roll stays."""
        self._control = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _packed(value: Any, tensor: Tensor) -> Tensor:
    text = json.dumps(value).encode()
    packed = torch.empty(8 + len(text) + 8 * tensor.numel(), dtype=torch.uint8)
    packed[:8] = torch.tensor([len(text)], dtype=torch.int64).view(torch.uint8)
    packed[8 : 8 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    packed[8 + len(text) :] = tensor.contiguous().view(torch.uint8)
    return packed


def _unpacked(packed: Tensor) -> tuple[Any, Tensor]:
    length = int(packed[:8].clone().view(torch.int64))
    return json.loads(_bytes(packed[8 : 8 + length])), packed[8 + length :].clone().view(torch.float64)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors of one dtype, about ``BUCKET`` bytes of them at a time."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[int] = []
        size = 0
        for place, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                continue
            bucket.append(place)
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _bytes(tensor: Tensor) -> bytes:
    held = bytearray(tensor.numel())
    if held:
        torch.frombuffer(held, dtype=torch.uint8).copy_(tensor)
    return bytes(held)


def _padded(tensor: Tensor, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=tensor.dtype, device=tensor.device)
    padded[: tensor.numel()] = tensor
    return padded
