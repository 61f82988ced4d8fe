"""How often the verdict of a sweep is wrong: 10,000 simulated sweeps per setting, decided by esper's own functions.

python experiments/calibration/run.py            # all settings, writes results.csv, cost.json and README.md beside itself
python experiments/calibration/run.py --sweeps 500 --out /tmp/try
python experiments/calibration/run.py --again    # only the second part, from the results.csv that is there

Second part: rates above 5 % are simulated again on ten times as many fresh sweeps, and power is stated from pilots.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.power import detectable, fewest_pairs, power
from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sequential import look_pairs, sequential_holm
from esper.compare.statistics.sign_flip import equivalence, sign_flip
from esper.compare.statistics.verdicts import Verdict, classify, holm, verdicts

Array = NDArray[np.float64]
PAIRS = (6, 8, 10, 15, 20, 30)
ARMS = (2, 3, 4, 6)
SEQUENTIAL_PAIRS = (10, 15, 20, 30)
SEQUENTIAL_ARMS, LOOKS = (2, 4), 3
ALPHA, POWER, MARGIN = 0.05, 0.8, 1.0  # the margin in standard deviations of a paired difference
SAMPLES = 360  # size of the test set behind the bounded accuracies (digits keeps 20 % of 1,797)
UNIT = np.sqrt(60 * 4 / (64 * 65) / SAMPLES)  # mean of p·(1 − p) over Beta(60, 4) is 60·4 / (64·65)
PILOT = 20_000  # differences of a pilot from which the power is stated again
BATCH = 250  # sweeps that share random sign patterns
Draw = Callable[[np.random.Generator, tuple[int, int, int], Array], Array]


def normal(rng: np.random.Generator, shape: tuple[int, int, int], shift: Array) -> Array:
    """Normal noise of unit variance in every run."""
    return rng.standard_normal(shape) + shift


def heavy(rng: np.random.Generator, shape: tuple[int, int, int], shift: Array) -> Array:
    """Student's t with 3 degrees of freedom: now and then a run far off."""
    return rng.standard_t(3, shape) / np.sqrt(3.0) + shift


def skewed(rng: np.random.Generator, shape: tuple[int, int, int], shift: Array) -> Array:
    """Lognormal noise: most runs alike, a long tail on one side."""
    return rng.lognormal(0.0, 1.0, shape) / np.sqrt((np.e - 1.0) * np.e) + shift


def bounded(rng: np.random.Generator, shape: tuple[int, int, int], shift: Array) -> Array:
    """Accuracies near 1 on 360 samples, a rate shared by the pair: ties, a ceiling, a shift that changes the spread.

    The arm with the largest shift is at the shared rate, the others are below, so that the ceiling cuts no difference.
    Scaled to unit standard deviation of a run within its pair at the shared rate.
    """
    rates = rng.beta(60, 4, (shape[0], 1, shape[2]))
    chance = rates + (shift - shift.max()) * UNIT
    return rng.binomial(SAMPLES, np.clip(chance, 0.0, 1.0), shape) / SAMPLES / UNIT


DRAWS: dict[str, Draw] = {"normal": normal, "heavy-tailed": heavy, "skewed": skewed, "bounded": bounded}


def differences(draw: Draw, rng: np.random.Generator, pairs: int, sweeps: int, shift: Array) -> Array:
    """Differences to the first arm in standard deviations, ``[pairs, arms − 1, sweeps]``; ``shift`` is ``[arms]``."""
    runs = draw(rng, (pairs, len(shift), sweeps), np.sqrt(2.0) * shift[None, :, None])
    return (runs[:, 1:] - runs[:, :1]) / np.sqrt(2.0)


def shift_of(draw: Draw, rng: np.random.Generator, effect: float) -> float:
    """The shift that is ``effect`` standard deviations of the differences *at* that shift: the bounded noise widens."""
    shift = effect
    for _ in range(6 if draw is bounded else 0):
        shift = effect * float(differences(draw, rng, 50_000, 1, np.array([0.0, shift])).std())
    return shift


def batches(sweeps: int) -> Iterator[int]:
    """Sizes of the batches that add up to ``sweeps``."""
    for start in range(0, sweeps, BATCH):
        yield min(BATCH, sweeps - start)


def begun(name: str, pairs: int) -> tuple[np.random.Generator, tuple[float, ...]]:
    """The generator of a setting, and the pilot's differences, which it draws first."""
    rng = generator(f"calibration {name}", pairs)
    return rng, tuple(differences(DRAWS[name], rng, PILOT, 1, np.zeros(2)).ravel().tolist())


def fixed_settings(name: str, pairs: int, sweeps: int) -> Iterator[dict[str, object]]:
    """Error rates and power of sweeps that are looked at once."""
    (rng, _), draw, most = begun(name, pairs), DRAWS[name], max(ARMS)
    better, same, found = (dict.fromkeys(ARMS, 0) for _ in range(3))
    effects = {k: detectable(pairs, POWER, ALPHA, k - 1) for k in ARMS}
    shifts = {k: shift_of(draw, rng, effects[k]) if np.isfinite(effects[k]) else 0.0 for k in ARMS}
    for size in batches(sweeps):
        null = differences(draw, rng, pairs, size, np.zeros(most))
        p_null = sign_flip(null, rng=rng)
        at_margin = differences(draw, rng, pairs, size, np.array([0.0] + [MARGIN] * (most - 1)))
        p_margin = equivalence(at_margin, MARGIN, rng=rng)
        for k in ARMS:
            codes = verdicts(null[:, : k - 1], 0.1, ALPHA, rng=rng) if pairs <= 10 else _codes(null, p_null, k)
            better[k] += int(np.isin(codes, (Verdict.A_BETTER, Verdict.B_BETTER)).any(axis=0).sum())
            same[k] += int((holm(p_margin[: k - 1]) <= ALPHA).any(axis=0).sum())
            if np.isfinite(effects[k]):
                found[k] += _found(draw, rng, p_null, pairs, size, k, shifts[k])
    for k in ARMS:
        possible = pairs >= fewest_pairs(ALPHA, k - 1)
        yield {
            "mode": "fixed", "noise": name, "pairs": pairs, "arms": k, "sweeps": sweeps,
            "false_better": better[k] / sweeps, "false_equivalent": same[k] / sweeps,
            "power": found[k] / sweeps if possible else "", "stated_power": POWER if possible else "",
            "effect_sd": round(effects[k], 3) if possible else "",
        }  # fmt: skip


def _codes(null: Array, p_null: Array, arms: int) -> NDArray[np.int8]:
    """Verdicts with no margin: nothing is called equivalent, so every significant difference counts as an error."""
    p = holm(p_null[: arms - 1])
    return classify(null[:, : arms - 1].mean(axis=0), p, np.ones_like(p), ALPHA)


def _found(draw: Draw, rng: np.random.Generator, p_null: Array, pairs: int, size: int, arms: int, shift: float) -> int:
    """In how many sweeps the one arm that differs is found, the other arms being like the reference."""
    real = differences(draw, rng, pairs, size, np.array([0.0, shift]))
    p = np.concatenate([sign_flip(real, rng=rng), p_null[1 : arms - 1]])
    return int(((holm(p)[0] <= ALPHA) & (real[:, 0].mean(axis=0) > 0)).sum())


def sequential_settings(name: str, pairs: int, sweeps: int) -> Iterator[dict[str, object]]:
    """Error rate of sweeps that are looked at three times and stopped when decided."""
    rng, draw = generator(f"sequential {name}", pairs), DRAWS[name]
    for arms in SEQUENTIAL_ARMS:
        looks = look_pairs(pairs, LOOKS, fewest_pairs(ALPHA, arms - 1))
        wrong = found = 0
        effect = detectable(pairs, POWER, ALPHA, arms - 1, looks=LOOKS)
        shift = shift_of(draw, rng, effect)
        for size in batches(sweeps):
            null = differences(draw, rng, pairs, size, np.zeros(arms))
            wrong += int(sequential_holm(null, looks, pairs, ALPHA, flips=1_999, rng=rng).any(axis=0).sum())
            real = differences(draw, rng, pairs, size, np.array([0.0, shift]))
            found += int(sequential_holm(real, looks, pairs, ALPHA / (arms - 1), flips=1_999, rng=rng).sum())
        yield {
            "mode": f"sequential, looks {looks}", "noise": name, "pairs": pairs, "arms": arms, "sweeps": sweeps,
            "false_better": wrong / sweeps, "power": found / sweeps, "stated_power": POWER,
            "effect_sd": round(effect, 3),
        }  # fmt: skip


def again(row: dict[str, object], sweeps: int) -> dict[str, object]:
    """The row with its rates above 5 % simulated anew on fresh sweeps, and its power stated from a pilot's differences."""
    name, pairs, arms = str(row["noise"]), int(str(row["pairs"])), int(str(row["arms"]))
    draw, fresh = DRAWS[name], dict(row)
    for column in ("false_better", "false_equivalent"):
        fresh[f"{column}_again"] = ""
        if row[column] != "" and float(str(row[column])) > ALPHA:
            rng = generator(f"again {row['mode']} {name} {column} {arms}", pairs)
            wrong = sum(_wrong(row, column, draw, rng, size) for size in batches(sweeps))
            fresh[f"{column}_again"] = wrong / sweeps
    fresh["pilot_power"] = ""
    if row["mode"] == "fixed" and row["power"] != "":
        _, pilot = begun(name, pairs)
        effect = detectable(pairs, POWER, ALPHA, arms - 1)
        fresh["pilot_power"] = round(power(pairs, effect, ALPHA, arms - 1, pilot), 4)
    return fresh


def _wrong(row: dict[str, object], column: str, draw: Draw, rng: np.random.Generator, size: int) -> int:
    """In how many of ``size`` fresh sweeps the row's setting makes the error that ``column`` counts."""
    pairs, arms = int(str(row["pairs"])), int(str(row["arms"]))
    if column == "false_equivalent":
        data = differences(draw, rng, pairs, size, np.array([0.0] + [MARGIN] * (arms - 1)))
        return int((holm(equivalence(data, MARGIN, rng=rng)) <= ALPHA).any(axis=0).sum())
    null = differences(draw, rng, pairs, size, np.zeros(arms))
    if row["mode"] == "fixed":
        return int((holm(sign_flip(null, rng=rng)) <= ALPHA).any(axis=0).sum())
    looks = look_pairs(pairs, LOOKS, fewest_pairs(ALPHA, arms - 1))
    return int(sequential_holm(null, looks, pairs, ALPHA, flips=1_999, rng=rng).any(axis=0).sum())


COLUMNS = (
    "mode",
    "noise",
    "pairs",
    "arms",
    "sweeps",
    "false_better",
    "false_equivalent",
    "effect_sd",
    "stated_power",
    "pilot_power",
    "power",
    "false_better_again",
    "false_equivalent_again",
)
AGAIN = 10  # times as many sweeps in the second part


def first_part(sweeps: int) -> list[dict[str, object]]:
    """All settings."""
    rows: list[dict[str, object]] = []
    for name in DRAWS:
        for pairs in PAIRS:
            rows += fixed_settings(name, pairs, sweeps)
        for pairs in SEQUENTIAL_PAIRS:
            rows += sequential_settings(name, pairs, sweeps)
        print(name, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=10_000, help="simulated sweeps per setting")
    parser.add_argument("--again", action="store_true", help="take the first part from results.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of results.csv, cost.json and README.md")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results, cost = given.out / "results.csv", given.out / "cost.json"
    started = time.perf_counter()
    if given.again:
        with results.open(newline="") as file:
            rows: list[dict[str, object]] = [dict(row) for row in csv.DictReader(file)]
        spent = json.loads(cost.read_text())
    else:
        rows, spent = first_part(given.sweeps), {"sweeps": given.sweeps, "first": round(time.perf_counter() - started)}
    started = time.process_time()
    rows = [again({"false_better": "", "false_equivalent": "", **row}, AGAIN * spent["sweeps"]) for row in rows]
    spent["second"] = round(time.process_time() - started)
    import scipy
    from report import readme  # beside this file

    spent["versions"] = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    cost.write_text(json.dumps(spent, indent=2) + "\n")
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (given.out / "README.md").write_text(readme(rows, spent))


if __name__ == "__main__":
    main()
