"""What a verdict says: on what, how sure, and what it lacks; and that its figure says the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import Judgement
from esper.compare.results.figures import draw
from esper.compare.results.plan import Plan
from esper.compare.results.runs import Run
from esper.compare.statistics.power import needed_pairs, spread_interval
from esper.compare.statistics.random_draws import generator

DIGITS = {"task": "digits", "model": "mlp", "samples": 360}


def plan_of(pairs: int, arms: tuple[str, ...] = ("host", "up"), blocks: tuple[str, ...] = ("",), **changed: object) -> Plan:
    settings = {name: {"arm": name} for name in arms}
    plan = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, arms[0], settings, tuple(range(pairs)), blocks, about={"": DIGITS})
    return dataclasses.replace(plan, **changed)


def runs_of(differences: dict[str, list[float]], block: str = "") -> list[Run]:
    pairs = len(next(iter(differences.values())))
    runs = [Run("host", seed, 0.5, block) for seed in range(pairs)]
    return runs + [Run(arm, seed, 0.5 + value, block) for arm, values in differences.items() for seed, value in enumerate(values)]


def judged(differences: list[float], **changed: object) -> Judgement:
    return analyse(runs_of({"up": differences}), plan_of(len(differences), **changed)).verdicts[0]


def test_the_sentence_names_task_model_pairs_and_level() -> None:
    found = judged([0.2 + 0.01 * step for step in range(8)])
    assert found.sentence.startswith("up is better than host on digits with mlp: accuracy +0.235 (95% interval +0.")
    assert ", 8 pairs, p = 0.0078 after Holm" in found.sentence
    assert "on digits" not in judged([0.2] * 8, about={}).sentence


def test_blocks_are_named_by_their_task_and_the_pooled_verdict_by_what_they_share() -> None:
    about = {"digits": DIGITS, "mnist1d": {**DIGITS, "task": "mnist1d", "samples": 1000}}
    plan = plan_of(8, blocks=("digits", "mnist1d"), about=about)
    runs = [run for block in plan.blocks for run in runs_of({"up": [0.2 + 0.01 * step for step in range(8)]}, block)]
    heads = [row.sentence.partition(":")[0] for row in analyse(runs, plan).verdicts]
    assert heads == [
        "up is better than host on digits with mlp",
        "up is better than host on mnist1d with mlp",
        "up is better than host with mlp over all 2 blocks",
    ]
    other = dataclasses.replace(plan, blocks=("trainer.batch_size=8", "trainer.batch_size=64"), about={"trainer.batch_size=8": DIGITS})
    runs = [dataclasses.replace(run, block={"digits": other.blocks[0]}.get(run.block, other.blocks[1])) for run in runs]
    assert " on digits with mlp in trainer.batch_size=8:" in analyse(runs, other).verdicts[0].sentence


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_below_six_pairs_only_what_six_would_take_is_said(pairs: int) -> None:
    found = judged([0.303, 0.31, 0.2, 0.4, 0.35][:pairs])
    few = f"{pairs} pairs" if pairs > 1 else "1 pair"
    assert found.sentence.endswith(f"; {few} can show no difference, 6 are the fewest that can, where all of them point the same way.")
    assert found.needs is not None and found.needs.rows == () and "more pairs" not in found.sentence


def test_more_pairs_are_said_with_their_difference_their_power_and_how_unsure_the_spread_is() -> None:
    values = [0.3, -0.2, 0.5, 0.1, 0.4, -0.1, 0.6]
    found = judged(values)
    spread = float(np.std(values, ddof=1))
    low, high = spread_interval(spread, 7, 0.05)
    assert (low / spread, high / spread) == pytest.approx((0.6444, 2.2021), abs=1e-3)  # the tables of χ² with 6 degrees of freedom
    minimum, seen = (tuple(needed_pairs(effect / s, 0.8, 0.05) - 7 for s in (spread, low, high)) for effect in (0.01, np.mean(values)))
    assert found.needs is not None
    assert [(row.more, *row.between) for row in found.needs.rows] == [minimum, (seen[0], max(seen[1], 0), seen[2])]
    assert found.sentence.endswith(
        f"; with 80% power about {minimum[0]:,} more pairs find 0.01 ({minimum[1]:,} to {minimum[2]:,}) and about {seen[0]} more pairs "
        f"find the 0.23 seen ({max(seen[1], 0)} to {seen[2]}), as the spread of the differences, {spread:.2g} in these 7 pairs, may be "
        f"{low:.2g} to {high:.2g}."
    )


def test_pairs_that_had_the_power_for_what_is_worth_having_say_so() -> None:
    found = judged([0.03, -0.03, 0.04, -0.02, 0.01, 0.02, 0.03, 0.03, 0.0, 0.02], minimum_effect=0.026)
    assert found.verdict == "inconclusive" and found.needs is not None
    first, second = found.needs.rows
    assert first.more == 0 and first.between[1] > 0 and second.more > 0
    assert f"these 10 find 0.026 already ({first.between[1]} more at most) and about {second.more} more pairs find the " in found.sentence


def test_a_difference_smaller_than_one_test_sample_is_said_to_be_so() -> None:
    few = judged([1 / 360, -1 / 360, 0.0, 1 / 360, 0.0, 0.0, 1 / 360, 0.0])
    assert few.resolution == 1 / 360
    assert "; the difference seen is smaller than one of 360 test samples (0.0028)" in few.sentence
    assert "test samples" not in judged([k / 360 for k in (1, 2, 1, 1, 2, 1, 1, 1)]).sentence
    assert "test samples" not in judged([0.001, -0.0007, 0.0012, 0.0003, 0.0001, 0.0002, 0.0004, 0.0011]).sentence  # no counts: a loss, say
    result = analyse(runs_of({"up": [1 / 360, 0.0, 0.0, 1 / 360, 0.0, 0.0]}), plan_of(6, minimum_effect=0.001))
    assert "The 0.001 worth having is less than one of the 360 test samples." in result.notes


def sweeps() -> list[dict[str, list[float]]]:
    """Sweeps of three arms, many of them near the border of a verdict, some of them accuracies with ties."""
    rng, found = generator("intervals"), []
    for number in range(12):
        pairs = (8, 11, 18)[number % 3]
        effects = {"up": 0.006 * number, "down": -0.01, "same": 0.001}
        noise = {arm: effect + rng.normal(0, 0.02, pairs) for arm, effect in effects.items()}
        found.append({arm: list(np.round(values * 360) / 360 if number % 2 else values) for arm, values in noise.items()})
    return found


@pytest.mark.slow
def test_no_interval_contradicts_its_verdict() -> None:
    seen = set()
    for differences in sweeps():
        pairs = len(differences["up"])
        plan = plan_of(pairs, ("host", *differences), minimum_effect=0.02)
        for row in analyse(runs_of(differences), plan).verdicts:
            (low, high), (least, most) = row.interval, row.equivalence_interval
            assert (low > 0 or high < 0) == (row.p_holm <= plan.alpha)
            assert (least > -0.02 and most < 0.02) == (row.p_equivalent <= plan.alpha)
            seen.add((row.p_holm <= plan.alpha, row.p_equivalent <= plan.alpha))
    assert len(seen) >= 3


def test_the_figure_draws_the_intervals_that_were_tested_and_names_task_model_pairs_and_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[float, ...]] = []
    words: list[str] = []
    plot, annotate, title = Axes.plot, Axes.annotate, Axes.set_title
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **more: (lines.append(tuple(np.ravel(x))), plot(self, x, *rest, **more))[1])
    monkeypatch.setattr(Axes, "annotate", lambda self, text, *rest, **more: (words.append(text), annotate(self, text, *rest, **more))[1])
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **more: (words.append(text), title(self, text, **more))[1])
    differences = {"up": [0.2 + 0.01 * step for step in range(8)], "far": [0.3 - 0.1 * step for step in range(8)]}
    plan = plan_of(8, ("host", *differences))
    result = analyse(runs_of(differences), plan)
    draw(result, plan, tmp_path)
    for row in result.verdicts:
        assert {row.interval, row.equivalence_interval, (row.difference,)} <= set(lines)
    assert {"better, 8 pairs, 97.5%", "inconclusive, 8 pairs, 95%", "accuracy on digits with mlp"} <= set(words)
    two = analyse(runs_of({"up": [0.3, 0.303]}), plan_of(2))
    draw(two, plan_of(2), tmp_path)
    assert "inconclusive, 2 pairs, no interval" in words
