"""The processes that torchrun starts for one run: they meet, rank 0 tells the others what to train, and these train beside it.

Rank 0 alone composes the configuration, has the folder, the bus, the controller and the trackers. The others write nothing.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from esper.checkpoint.tree import join, split
from esper.config import PRESETS, RootConfig, build, plain
from esper.distributed import Ranks, refuse_uneven
from esper.distributed.ranks import WAIT
from esper.errors import UserError
from esper.running.builders import build_trainer
from esper.running.checkpointing import beside, listening, write_part
from esper.running.world import world
from esper.trainer.device import choose_device, numerics
from esper.trainer.trainer import Trainer

log = logging.getLogger(__name__)

meeting: Any = dist  # some of whose names type checkers do not see


def refuse_wrong_processes(config: RootConfig) -> None:
    """Raise UserError for several processes that would each train alone, or among which a global batch cannot be shared out."""
    _, size = world()
    if config.trainer.shards:
        refuse_uneven(config.trainer.shards, size)
    elif size > 1:
        raise UserError(
            f"These are {size} processes, and trainer={config.trainer.name} trains in one: add trainer=ddp (or fsdp), or leave "
            "torchrun out."
        )


@contextmanager
def joined() -> Iterator[Ranks]:
    """Context in which this process has met the others that torchrun started; without torchrun it is alone."""
    rank, size = world()
    if size == 1:
        yield Ranks.alone()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever waits for another process must end with it
    store, _, _ = next(meeting.rendezvous("env://"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store still knows where the dead processes before were
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=meeting.PrefixStore(f"esper/{restarts}", store), rank=rank, world_size=size, timeout=WAIT)
    ranks = Ranks()
    signal.signal(signal.SIGTERM, before)
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(str(error) or type(error).__name__)
        gc.freeze()  # else this process would look through all that it leaves for a second, while torchrun waits to start it again
        raise
    finally:
        ranks.break_off()


def tell(ranks: Ranks, config: RootConfig, state: Any) -> None:
    """Tell the other ranks what to train, and the ``state`` to go on from; call on rank 0."""
    ranks.shards = config.trainer.shards
    presets = {preset: getattr(config, preset) for preset in PRESETS}
    ranks.decided("the run", lambda: {"config": plain(config), "presets": presets, "goes_on": state is not None})
    if state is not None and ranks.size > 1:
        _share(ranks, state["trainer"])


def follow() -> int:
    """Train beside rank 0 what it says; returns the exit code. What goes wrong is said by rank 0."""
    rank, _ = world()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    with joined() as ranks:
        told: Any = ranks.decided("the run", lambda: None)
        config = build(told["config"], told["presets"])
        ranks.shards = config.trainer.shards
        state = _share(ranks, None) if told["goes_on"] else None
        device, task = choose_device(config.trainer), config.task.build()
        with numerics(config.trainer):
            trainer = build_trainer(config, task, device, state=state, ranks=ranks)
            with listening(trainer):
                try:
                    trainer.fit(_stop_with_the_others)
                except _Stopped:
                    log.info("stopped with rank 0 after step %d", trainer.outcome.steps)
    return 0


class _Stopped(Exception):
    """Rank 0 saves a checkpoint after this step and ends."""


def _stop_with_the_others(trainer: Trainer) -> None:
    if trainer.ranks.sharded:
        told: Any = trainer.ranks.decided(beside(trainer.outcome.steps), lambda: None)
        if told[0]:
            write_part(trainer, told[0])
        if told[1]:
            raise _Stopped
    elif trainer.grow.agreement.stops and trainer.config.checkpoint_every:
        raise _Stopped


def _share(ranks: Ranks, tree: Any) -> Any:
    """Rank 0's tree of plain values and tensors, on every rank."""
    shape, tensors = split(tree) if ranks.first else (None, {})
    kinds = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]
    described: Any = ranks.decided("the saved state", lambda: [shape, kinds])
    for name, kind, size in described[1]:
        tensor = tensors.setdefault(name, torch.empty(size, dtype=getattr(torch, kind)))
        if tensor.numel():
            ranks.from_rank([tensor.reshape(-1).view(torch.uint8)])
    return tree if ranks.first else join(described[0], tensors)
