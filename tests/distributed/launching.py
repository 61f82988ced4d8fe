"""Runs a function on several real processes that are the ranks of one torch.distributed group over gloo."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

LIMIT_S = 120.0


def on_ranks(count: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returned on each rank: ``(class name, text)`` of an exception, None if the process died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "esper", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, count, str(meeting), work, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for pipe, process in zip(pipes, processes, strict=True):
        there = pipe.poll(LIMIT_S)
        try:
            results.append(pipe.recv() if there else ("Hung", "no answer"))
        except EOFError:
            results.append(None)
        if not there:
            process.kill()
        process.join()
    return results


def _rank(pipe: Any, rank: int, count: int, meeting: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    try:
        pipe.send(work(rank, *arguments))
    except Exception as error:
        traceback.print_exc()
        pipe.send((type(error).__name__, str(error)))
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()
