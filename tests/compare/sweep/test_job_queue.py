"""Which job of a sweep begins next, what it waits for, and which pairs a time limit leaves out; the clock here is set by hand."""

from __future__ import annotations

import dataclasses
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.cli.compose import compose
from esper.compare.sweep.arms import lay_out
from esper.compare.sweep.job_queue import Entry, JobQueue
from esper.compare.sweep.sweep import PreparedJob, Sweep
from esper.compare.sweep.tuning import tuning_jobs

composed = cache(lambda *words: compose(["tracking=none", *words]))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sweep_of(arms: tuple[str, ...], seeds: int, blocks: tuple[str, ...] = ("digits",), minutes: float = 0.0, **compare: Any) -> Sweep:
    texts = [[f"arm={arm}", f"task={task}", f"seed={seed}"] for arm in arms for task in blocks for seed in range(seeds)]
    layout = lay_out(texts, ["task"])
    base = composed()
    jobs = [
        PreparedJob(
            job,
            dataclasses.replace(base, seed=job.seed, compare=dataclasses.replace(base.compare, **compare)),
            {},
            Path("nowhere") / str(job.number),
        )
        for job in layout.jobs
    ]
    sweep = Sweep(layout, jobs, Path("nowhere"), [], Console(file=StringIO()), minutes=minutes, began=0.0)
    sweep.tuning_jobs = tuning_jobs(jobs, 1, Path("nowhere"))
    return sweep


def queued(sweep: Sweep, workers: int = 2, clock: Clock | None = None) -> JobQueue:
    queue = JobQueue(sweep, workers, clock or Clock())
    queue.add(set(sweep.layout.seeds))
    return queue


def named(queue: JobQueue, entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    job = queue.job(entry).job
    return " ".join(part for part in ("tune" if entry.tuning else "", job.arm, job.block, str(job.seed)) if part)


def taken(queue: JobQueue) -> list[str]:
    """All that can begin at once."""
    found = []
    while (entry := queue.next()) is not None:
        found.append(named(queue, entry))
    return found


def test_pairs_are_complete_early_in_every_block() -> None:
    queue = queued(sweep_of(("a", "b"), 2, ("x", "y")))
    order = [f"{arm} {block} {seed}" for seed in (0, 1) for block in ("x", "y") for arm in ("a", "b")]
    assert taken(queue) == order
    assert queue.next() is None and not queue.waiting


def test_a_job_waits_for_those_of_its_own_seed_alone() -> None:
    queue = queued(sweep_of(("final", "grown"), 2, final_of={"final": "grown"}))
    assert taken(queue) == ["grown 0", "grown 1"]
    second = next(entry for entry in queue.running if queue.job(entry).job.seed == 1)
    queue.ended(second, 1.0)
    assert taken(queue) == ["final 1"]


def test_an_arm_waits_for_its_own_tuning_and_for_that_of_the_arms_it_depends_on() -> None:
    sweep = sweep_of(("final", "grown"), 1, final_of={"final": "grown"}, tune={"optimizer.lr": [0.1, 0.2]})
    queue = queued(sweep)
    assert taken(queue) == ["tune grown 1000000"] * 2
    first, second = queue.running
    assert queue.ended(first, 1.0) is None
    assert taken(queue) == []
    assert queue.ended(second, 1.0) == ("grown", "")
    assert taken(queue) == ["tune final 1000000"] * 2 + ["grown 0"]
    for entry in list(queue.running):
        queue.ended(entry, 1.0)
    assert taken(queue) == ["final 0"]


def test_the_time_limit_leaves_out_whole_pairs_and_keeps_shorter_ones() -> None:
    clock = Clock()
    queue = queued(sweep_of(("a", "b"), 3, ("long", "short"), minutes=1.0), workers=2, clock=clock)
    seconds = {"long": 25.0, "short": 5.0}
    ran, under_way = [], []
    while queue.waiting:
        while len(queue.running) < 2 and (entry := queue.next()) is not None:
            ran.append(named(queue, entry))
            under_way.append((clock.now + seconds[queue.job(entry).job.block], entry))
        if not under_way:
            break
        under_way.sort()
        clock.now, entry = under_way.pop(0)
        queue.ended(entry, seconds[queue.job(entry).job.block])
    assert ran == ["a long 0", "b long 0", "a short 0", "b short 0", "a long 1", "b long 1", "a short 1", "b short 1"]
    assert clock.now <= 60.0
    assert sorted(named(queue, entry) for entry in queue.waiting) == ["a long 2", "a short 2", "b long 2", "b short 2"]


def test_a_pair_whose_jobs_wait_for_each_other_needs_the_time_of_both() -> None:
    clock = Clock()
    queue = queued(sweep_of(("grown", "final"), 2, minutes=1.0, final_of={"final": "grown"}), workers=8, clock=clock)
    grown = queue.next()
    assert grown is not None and named(queue, grown) == "grown 0"
    clock.now = 20.0
    queue.ended(grown, 20.0)
    assert named(queue, queue.next()) == "final 0"  # begun with its pair, whatever it takes
    clock.now = 30.0
    assert named(queue, queue.next()) == "nothing"  # 20 s of grown and as much of final would end at 70 s


def test_a_block_is_not_tuned_where_there_is_no_time_for_its_first_pairs() -> None:
    clock = Clock()
    queue = queued(sweep_of(("a", "b"), 1, ("x", "y"), minutes=1.0, tune={"optimizer.lr": [0.1, 0.2]}), workers=4, clock=clock)
    assert taken(queue)[:4] == ["tune a x 1000000"] * 2 + ["tune b x 1000000"] * 2
    queue = queued(sweep_of(("a", "b"), 1, ("x", "y"), minutes=1.0, tune={"optimizer.lr": [0.1, 0.2]}), workers=4, clock=clock)
    first = [queue.next() for _ in range(4)]
    clock.now = 20.0
    for entry in first:
        assert entry is not None
        queue.ended(entry, 20.0)
    # the pairs of x end at 40 s on two of the four workers; tuning y and its pairs would end beyond 60 s
    assert taken(queue) == ["a x 0", "b x 0"]
    assert len(queue.waiting) == 6


def test_a_job_of_another_length_is_taken_to_need_as_long_a_step() -> None:
    clock = Clock()
    sweep = sweep_of(("a", "b"), 2, minutes=1.0)
    for number, one in enumerate(sweep.jobs):
        steps = dataclasses.replace(one.config.trainer, steps=100 if one.job.seed == 0 else 400)
        sweep.jobs[number] = dataclasses.replace(one, config=dataclasses.replace(one.config, trainer=steps))
    queue = queued(sweep, workers=2, clock=clock)
    for entry in (queue.next(), queue.next()):
        assert entry is not None
        queue.ended(entry, 16.0)
    assert queue.next() is None and len(queue.waiting) == 2  # 64 s


def test_without_a_limit_nothing_is_left_out() -> None:
    clock = Clock()
    queue = queued(sweep_of(("a", "b"), 2), clock=clock)
    clock.now = 1e9
    assert len(taken(queue)) == 4


def test_keys_that_share_a_value_are_tuned_together_and_lengths_only_where_they_are_free() -> None:
    tune = {"optimizer.lr,optimizer.branch_lr": [0.1, 0.2], "trainer.steps": [100, 200]}
    sweep = sweep_of(("grown", "equal"), 1, tune=tune, equal_macs={"equal": "grown/grown"})
    values = {arm: [one.job.values for one in sweep.tuning_jobs if one.job.arm == arm] for arm in ("grown", "equal")}  # type: ignore[attr-defined]
    assert values["equal"] == [{"optimizer.lr": rate, "optimizer.branch_lr": rate} for rate in (0.1, 0.2)]
    assert len(values["grown"]) == 4
    assert values["grown"][1] == {"optimizer.lr": 0.1, "optimizer.branch_lr": 0.1, "trainer.steps": 200}
    assert [one.config.optimizer.branch_lr for one in sweep.tuning_jobs[-2:]] == [0.1, 0.2]
