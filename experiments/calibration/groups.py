"""How often the verdict is wrong on runs that are not paired, over several tasks at once, and there with early stopping.

python experiments/calibration/groups.py                # writes groups.csv and groups.md beside itself
python experiments/calibration/groups.py --sweeps 500 --out /tmp/try
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from run import ALPHA, DRAWS, LOOKS, MARGIN, POWER, SAMPLES, batches, differences, shift_of  # beside this file

from esper.compare.statistics.group_power import detectable_by_groups
from esper.compare.statistics.permutation import Sizes, group_equivalence, permutation
from esper.compare.statistics.power import detectable, fewest_pairs
from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sequential import look_pairs, sequential_holm
from esper.compare.statistics.sign_flip import equivalence, sign_flip
from esper.compare.statistics.verdicts import holm

Array = NDArray[np.float64]
SIZES = ((4, 4), (6, 6), (10, 10), (20, 20), (5, 10), (10, 20))  # runs of every arm, and of the reference
ARMS, TASKS, TASK_PAIRS = (2, 4), (2, 4), (8, 15)
WIDER = 2.0  # how many times as far the reference's runs spread in the settings of unequal spread
FLIPS = 1_999
RATE = 60 / 64  # of the bounded accuracies
#: Means of the noises, around which the wider ones are stretched.
CENTRES = {"normal": 0.0, "heavy-tailed": 0.0, "skewed": float(np.exp(0.5) / np.sqrt((np.e - 1.0) * np.e))}
COLUMNS = (
    "mode", "noise", "runs", "arms", "tasks", "sweeps", "false_better", "false_equivalent", "effect_sd", "stated_power", "power",
)  # fmt: skip
Row = dict[str, object]


def groups(name: str, rng: np.random.Generator, sizes: Sizes, sweeps: int, shift: float, wider: float = 1.0) -> Array:
    """Runs of an arm and of the reference, task by task, ``[runs, sweeps]``, in standard deviations of a run of the arm."""
    parts = []
    for ours, theirs in sizes:
        if name == "bounded":
            parts += _accuracies(rng, (ours, theirs), sweeps, shift)
            continue
        mine, other = (DRAWS[name](rng, (count, 1, sweeps), np.zeros(1))[:, 0] - CENTRES[name] for count in (ours, theirs))
        parts += [mine + shift, other * wider]
    return np.concatenate(parts)


def _accuracies(rng: np.random.Generator, sizes: tuple[int, int], sweeps: int, shift: float) -> list[Array]:
    """Accuracies near 1 on 360 samples, of both arms: ties, a ceiling. The worse arm spreads further; the unit is between the two."""
    worse, unit = RATE, np.sqrt(RATE * (1 - RATE) / SAMPLES)
    for _ in range(6):
        worse = RATE - shift * unit
        unit = np.sqrt((RATE * (1 - RATE) + worse * (1 - worse)) / 2 / SAMPLES)
    return [rng.binomial(SAMPLES, rate, (runs, sweeps)) / SAMPLES / unit for rate, runs in zip((RATE, worse), sizes, strict=True)]


def unpaired(name: str, sizes: Sizes, sweeps: int, wider: float = 1.0) -> Iterator[Row]:
    """Error rates and power of arms against one reference; every arm has runs of its own, all share the reference's."""
    rng = generator(f"unpaired {name} {sizes} {wider}", len(sizes))
    most, (ours, theirs) = max(ARMS) - 1, sizes[0]
    better, same = (dict.fromkeys(ARMS, 0) for _ in range(2))
    equal = ours == theirs and wider == 1.0
    effects = {k: detectable_by_groups(ours, POWER, ALPHA, k - 1, len(sizes)) if equal else float("nan") for k in ARMS}
    found = dict.fromkeys(ARMS, 0)
    for size in batches(sweeps):
        null = _shared(name, rng, sizes, size, most, 0.0, wider)
        p_null = np.stack([permutation(one, sizes, flips=FLIPS, rng=rng) for one in null])
        edge = _shared(name, rng, sizes, size, most, MARGIN, wider)
        p_edge = np.stack([group_equivalence(one, sizes, MARGIN, flips=FLIPS, rng=rng) for one in edge])
        for k in ARMS:
            better[k] += int((holm(p_null[: k - 1]) <= ALPHA).any(axis=0).sum())
            same[k] += int((holm(p_edge[: k - 1]) <= ALPHA).any(axis=0).sum())
            if np.isfinite(effects[k]):
                real = permutation(groups(name, rng, sizes, size, effects[k]), sizes, flips=FLIPS, rng=rng)
                found[k] += int((holm(np.stack([real, *p_null[1 : k - 1]]))[0] <= ALPHA).sum())
    mode = ("unpaired" if wider == 1.0 else "unpaired, unequal spread") + (", pooled" if len(sizes) > 1 else "")
    for k in ARMS:
        stated = np.isfinite(effects[k])
        yield {
            "mode": mode, "noise": name, "runs": f"{ours} + {theirs}", "arms": k, "tasks": len(sizes), "sweeps": sweeps,
            "false_better": better[k] / sweeps, "false_equivalent": same[k] / sweeps,
            "effect_sd": round(effects[k], 3) if stated else "", "stated_power": POWER if stated else "",
            "power": found[k] / sweeps if stated else "",
        }  # fmt: skip


def _shared(name: str, rng: np.random.Generator, sizes: Sizes, sweeps: int, arms: int, shift: float, wider: float) -> list[Array]:
    """The data of every arm; the reference's runs are those of the first."""
    all_ = [groups(name, rng, sizes, sweeps, shift, wider) for _ in range(arms)]
    start = 0
    for ours, theirs in sizes:
        for one in all_[1:]:
            one[start + ours : start + ours + theirs] = all_[0][start + ours : start + ours + theirs]
        start += ours + theirs
    return all_


def pooled(name: str, pairs: int, tasks: int, sweeps: int) -> Iterator[Row]:
    """Paired arms on several tasks: a verdict on each task and one on their mean, corrected together; once, and with looks."""
    draw, rng = DRAWS[name], generator(f"pooled {name} {tasks}", pairs)
    for arms in ARMS:
        count = (arms - 1) * (tasks + 1)
        if pairs < fewest_pairs(ALPHA, count):
            continue
        looks = look_pairs(pairs, LOOKS, fewest_pairs(ALPHA, count))
        effect = detectable(pairs, POWER, ALPHA, count)
        shift = shift_of(draw, rng, effect)
        better = same = early = power = 0
        for size in batches(sweeps):
            null = _with_mean([differences(draw, rng, pairs, size, np.zeros(arms)) for _ in range(tasks)])
            p_null = sign_flip(null, flips=FLIPS, rng=rng)
            better += int((holm(p_null) <= ALPHA).any(axis=0).sum())
            early += int(sequential_holm(null, looks, pairs, ALPHA, flips=FLIPS, rng=rng).any(axis=0).sum())
            edge = _with_mean([differences(draw, rng, pairs, size, np.array([0.0] + [MARGIN] * (arms - 1))) for _ in range(tasks)])
            same += int((holm(equivalence(edge, MARGIN, flips=FLIPS, rng=rng)) <= ALPHA).any(axis=0).sum())
            real = sign_flip(differences(draw, rng, pairs, size, np.array([0.0, shift])), flips=FLIPS, rng=rng)
            power += int((holm(np.concatenate([real, p_null[1:]]))[0] <= ALPHA).sum())
        shared = {"noise": name, "runs": f"{pairs} pairs", "arms": arms, "tasks": tasks, "sweeps": sweeps}
        yield {
            "mode": "pooled", **shared, "false_better": better / sweeps, "false_equivalent": same / sweeps,
            "effect_sd": round(effect, 3), "stated_power": POWER, "power": power / sweeps,
        }  # fmt: skip
        yield {"mode": "pooled, stopped early", **shared, "false_better": early / sweeps}


def _with_mean(tasks: Sequence[Array]) -> Array:
    """The comparisons of all tasks and those of their mean, ``[pairs, comparisons, sweeps]``."""
    return np.concatenate([*tasks, np.mean(tasks, axis=0)], axis=1)


def settings(sweeps: int, workers: int) -> list[Row]:
    """All rows; every setting has a generator of its own, so that they do not depend on the number of processes."""
    asked: list[tuple[Callable[..., Iterator[Row]], tuple[object, ...]]] = []
    for name in DRAWS:
        asked += [(unpaired, (name, (size,), sweeps)) for size in SIZES]
        asked += [(unpaired, (name, (size,), sweeps, WIDER)) for size in ((10, 10), (10, 20), (20, 10)) if name in CENTRES]
        for tasks in TASKS:
            asked.append((unpaired, (name, ((5, 5),) * tasks, sweeps)))
            asked += [(pooled, (name, pairs, tasks, sweeps)) for pairs in TASK_PAIRS]
    with ProcessPoolExecutor(workers) as pool:
        return [row for rows in pool.map(_rows_of, *zip(*asked, strict=True)) for row in rows]


def _rows_of(setting: Callable[..., Iterator[Row]], arguments: tuple[object, ...]) -> list[Row]:
    return list(setting(*arguments))


TEXT = """# How often is the verdict wrong without pairs, and over several tasks?

**Question.** Runs of two arms that nothing pairs are judged by a permutation test of two groups. Several tasks get a verdict each and one
on their mean. How often is one of identical arms called better, or an arm that differs by exactly the margin equivalent? Does stopping
early change that? Is a difference of the stated size found as often as stated?

**Command.** `python experiments/calibration/groups.py --sweeps {sweeps}` ({seconds:.0f} s on shared cores; {versions}).
Every row is in `groups.csv`; this file is written by the same command.

**How.** As in [the calibration of paired arms](README.md): the same kinds of noise (all accuracies of a setting have one rate where runs
are not paired), α = 0.05, an error counted once a sweep, two and four arms. Effects and the margin are in standard deviations of a run
(of a paired difference where runs are paired). Three standard errors of a rate of 5 % are {error:.2f} points, of 80 % {three:.1f}.

## Not paired: false "better" in percent, the worse of 2 and 4 arms (limit 5)

The columns are the runs of an arm and of the reference.

{better}

## Not paired: false "equivalent" in percent with all arms at the margin of one standard deviation (limit 5)

{equivalent}

## Not paired: power in percent where 80 is stated, lowest–highest over 2 and 4 arms

{power}

The plan states the power for normal noise.

## Not paired, the reference's runs spread twice as far

The arms have the same mean and another spread, so they are not exchangeable, and no permutation test is exact. The statistic is
Welch's, for which the test comes near the limit as the groups grow; skewed noise in few runs keeps it from there. False "better" in
percent:

{wider}

False "equivalent" in percent, at the margin of one standard deviation of a run of the arm:

{wider_equivalent}

## Several tasks: false "better" in percent over all verdicts, those of the tasks and the pooled one (limit 5)

{pooled}

With three looks, stopped once decided (with so few pairs the early looks may spend next to nothing, so the rates are near those of one):

{early}

False "equivalent" with all arms at the margin in every task:

{pooled_equivalent}

Power in percent where 80 is stated for one arm that differs in one task, lowest–highest over 2 and 4 arms:

{pooled_power}

Not paired, 5 runs of every arm in every task, pooled over the tasks alone: false "better" in percent, false "equivalent", and the
power where 80 is stated:

{groups_pooled}

A dash: so few pairs can show nothing after Holm.

## Verdict

{verdict}
"""


def readme(rows: Sequence[Mapping[str, object]], sweeps: int, seconds: float, versions: str) -> str:
    """The page of these rows."""
    error, three = 300 * sqrt(0.05 * 0.95 / sweeps), 300 * sqrt(0.16 / sweeps)

    def of(mode: str) -> list[Mapping[str, object]]:
        return [row for row in rows if row["mode"] == mode]

    def columns(row: Mapping[str, object]) -> str:
        return f"{row['runs']}, {row['tasks']} tasks" if str(row["mode"]).startswith("pooled") or row["tasks"] != 1 else str(row["runs"])

    def table(found: Sequence[Mapping[str, object]], cell: Callable[[Sequence[Mapping[str, object]]], str]) -> str:
        heads = list(dict.fromkeys(columns(row) for row in found))
        lines = ["| noise | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for noise in dict.fromkeys(str(row["noise"]) for row in found):
            cells = [[row for row in found if row["noise"] == noise and columns(row) == head] for head in heads]
            lines.append(f"| {noise} | " + " | ".join(cell(one) if one else "–" for one in cells) + " |")
        return "\n".join(lines)

    def worst(column: str) -> Callable[[Sequence[Mapping[str, object]]], str]:
        return lambda found: f"{100 * max(float(str(row[column])) for row in found):.2f}"

    def powers(found: Sequence[Mapping[str, object]]) -> str:
        known = [100 * float(str(row["power"])) for row in found if row.get("power") not in ("", None)]
        return f"{min(known):.1f}–{max(known):.1f}" if known else "–"

    alone, wide, both = of("unpaired"), of("unpaired, unequal spread"), of("unpaired, pooled")
    several, early = of("pooled"), of("pooled, stopped early")
    return TEXT.format(
        sweeps=sweeps,
        seconds=seconds,
        versions=versions,
        error=error,
        three=three,
        better=table(alone, worst("false_better")),
        equivalent=table(alone, worst("false_equivalent")),
        power=table([row for row in alone if row["power"] != ""], powers),
        wider=table(wide, worst("false_better")),
        wider_equivalent=table(wide, worst("false_equivalent")),
        pooled=table(several, worst("false_better")),
        early=table(early, worst("false_better")),
        pooled_equivalent=table(several, worst("false_equivalent")),
        pooled_power=table(several, powers),
        groups_pooled=table(both, lambda one: " / ".join([worst("false_better")(one), worst("false_equivalent")(one), powers(one)])),
        verdict="\n".join(_said(name, found, error) for name, found in _claims(alone, both, several, early)),
    )


Rows = Sequence[Mapping[str, object]]


def _claims(alone: Rows, both: Rows, several: Rows, early: Rows) -> Iterator[tuple[str, list[float]]]:
    claims: list[tuple[str, Rows, str]] = [
        ('False "better", not paired', [*alone, *both], "false_better"),
        ('False "equivalent", not paired', [*alone, *both], "false_equivalent"),
        ('False "better", several tasks', several, "false_better"),
        ('False "equivalent", several tasks', several, "false_equivalent"),
        ('False "better", several tasks with early stopping', early, "false_better"),
    ]
    for name, rows, column in claims:
        yield name, [100 * float(str(row[column])) for row in rows]


def _said(name: str, found: list[float], error: float) -> str:
    worst, above = max(found), sum(rate > 5 + error for rate in found)
    word = "holds" if worst <= 5 else "holds within the error of the simulation" if not above else f"DOES NOT HOLD in {above} settings"
    return f"- {name} ≤ 5 %: {word} (worst of {len(found)} settings {worst:.2f} %, mean {np.mean(found):.2f} %)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=10_000, help="simulated sweeps per setting")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of groups.csv and groups.md")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = settings(given.sweeps, given.workers)
    seconds = time.perf_counter() - started
    import scipy

    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    with (given.out / "groups.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (given.out / "groups.md").write_text(readme(rows, given.sweeps, seconds, f"{given.workers} processes; {versions}"))


if __name__ == "__main__":
    main()
