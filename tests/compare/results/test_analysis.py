"""From runs to ``comparison.json``, tables and figures."""

import dataclasses
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from esper.compare.config import CompareConfig
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import as_dict, write_json
from esper.compare.results.figures import _lines, draw
from esper.compare.results.plan import Plan, changes, load_plan, make_plan, parse_plan, save_plan
from esper.compare.results.report import show, write_results
from esper.compare.results.runs import Run
from esper.compare.statistics.random_draws import generator
from esper.errors import UserError


def plan_of(names: tuple[str, ...], pairs: int = 10, **changed: object) -> Plan:
    config = CompareConfig(spread=0.01)
    settings = {name: {"arm": name} for name in names}
    made = make_plan(config, arms=settings, seeds=range(pairs), blocks=[""], metric="accuracy", direction="max")
    return dataclasses.replace(made, **changed)


def runs_of(effects: dict[str, float], pairs: int = 10, spread: float = 0.005, block: str = "") -> list[Run]:
    rng, runs = generator("runs"), []
    for seed in range(pairs):
        level = 0.9 + rng.normal(0, 0.02)
        for arm, effect in effects.items():
            costs = {"macs": 1e9 * (1 + effect), "seconds": 10.0, "parameters": 858.0}
            runs.append(Run(arm, seed, level + effect + rng.normal(0, spread), block, costs=costs, growth={"fossils": 1.0}))
    return runs


def test_each_of_the_four_verdicts_is_reached() -> None:
    plan = plan_of(("host", "up", "down", "same", "noisy"), 15)
    runs = runs_of({"host": 0.0, "up": 0.05, "down": -0.05, "same": 0.0}, 15, 0.003)
    runs += [Run("noisy", seed, 0.9 + float(v)) for seed, v in enumerate(generator("noisy").normal(0, 0.1, 15))]
    found = {row.arm: row for row in analyse(runs, plan).verdicts}
    assert {arm: row.verdict for arm, row in found.items()} == {
        "up": "B better", "down": "A better", "same": "equivalent", "noisy": "inconclusive",
    }  # fmt: skip
    assert "1.05 × the MACs" in found["up"].sentence
    assert "worse than host" in found["down"].sentence
    assert found["noisy"].needs is not None and found["noisy"].needs.rows[0].more > 100
    assert "more pairs find 0.01" in found["noisy"].sentence


def test_blocks_are_judged_apart_and_pooled_within_one_correction() -> None:
    plan = plan_of(("host", "up"), blocks=("digits", "mnist1d"))
    runs = runs_of({"host": 0.0, "up": 0.05}, block="digits") + runs_of({"host": 0.0, "up": 0.03}, block="mnist1d")
    result = analyse(runs, plan)
    assert [row.block for row in result.verdicts] == ["digits", "mnist1d", "pooled"]
    assert plan.comparisons == 3
    assert result.verdicts[0].p_holm == pytest.approx(3 * result.verdicts[0].p)
    assert result.verdicts[2].difference == pytest.approx(np.mean([row.difference for row in result.verdicts[:2]]))


def test_failed_runs_are_counted_and_hurt_the_arm_that_failed() -> None:
    runs = runs_of({"host": 0.0, "up": 0.02})
    broken = [dataclasses.replace(r, status="FAILED", value=float("nan")) if r.arm == "up" and r.seed < 4 else r for r in runs]
    whole, hurt = (analyse(these, plan_of(("host", "up"))).verdicts[0] for these in (runs, broken))
    assert whole.verdict == "B better"
    assert hurt.verdict == "inconclusive"
    assert (hurt.failed, hurt.pairs) == ((4, 0), 10)


def without(runs: list[Run], arm: str, seeds: range) -> list[Run]:
    return [dataclasses.replace(r, status="FAILED", value=float("nan")) if r.arm == arm and r.seed in seeds else r for r in runs]


@pytest.mark.parametrize("failed", [1, 5, 7, 8, 10, 15])
def test_an_arm_that_fails_is_never_equivalent_however_alike_its_other_runs_are(failed: int) -> None:
    alike = runs_of({"host": 0.0, "up": 0.0}, 15, 0.0005)
    assert analyse(alike, plan_of(("host", "up"), 15)).verdicts[0].verdict == "equivalent"
    row = analyse(without(alike, "up", range(failed)), plan_of(("host", "up"), 15)).verdicts[0]
    assert (row.verdict, row.p_equivalent) == ("A better" if failed >= 7 else row.verdict, 1.0)
    assert row.verdict in ("A better", "inconclusive")
    assert f"failed runs: {failed} of up" in row.sentence


@pytest.mark.slow  # seconds of computing
def test_as_many_failures_on_either_side_show_no_equivalence_and_neither_do_pairs_in_which_both_failed() -> None:
    alike = runs_of({"host": 0.0, "up": 0.0}, 15, 0.0005)
    crossed = without(without(alike, "up", range(7)), "host", range(7, 14))
    row = analyse(crossed, plan_of(("host", "up"), 15)).verdicts[0]
    assert row.verdict == "inconclusive" and "failed runs: 7 of up, 7 of host" in row.sentence
    for both, verdict in ((7, "equivalent"), (11, "inconclusive")):  # 8 pairs are left, and 4
        runs = without(without(alike, "up", range(both)), "host", range(both))
        assert analyse(runs, plan_of(("host", "up"), 15)).verdicts[0].verdict == verdict


def test_without_a_minimum_effect_an_arm_that_fails_every_time_is_worse() -> None:
    runs = [Run("host", seed, 0.9) for seed in range(10)] + [Run("up", seed, float("nan"), status="FAILED") for seed in range(10)]
    row = analyse(runs, plan_of(("host", "up"), minimum_effect=0.0)).verdicts[0]
    assert row.verdict == "A better" and max(row.points) < 0.0
    assert "up is worse than host" in row.sentence and "failed runs: 10 of up" in row.sentence


def test_a_failure_in_one_block_keeps_the_pooled_verdict_from_equivalent() -> None:
    alike = [dataclasses.replace(run, block=block) for block in ("x", "y") for run in runs_of({"host": 0.0, "up": 0.0}, 15, 0.0005)]
    plan = plan_of(("host", "up"), 15, blocks=("x", "y"))
    broken = [dataclasses.replace(r, value=float("nan")) if (r.arm, r.block, r.seed) == ("up", "x", 3) else r for r in alike]
    assert [row.verdict for row in analyse(alike, plan).verdicts] == ["equivalent"] * 3
    assert [row.verdict for row in analyse(broken, plan).verdicts] == ["inconclusive", "equivalent", "inconclusive"]


def test_a_sweep_in_which_all_runs_failed_is_refused() -> None:
    with pytest.raises(UserError, match="All 2 runs"):
        analyse([Run("host", 0, float("nan")), Run("up", 0, 1.0, status="FAILED")], plan_of(("host", "up")))
    with pytest.raises(UserError, match="no runs"):
        analyse([], plan_of(("host", "up")))


def test_an_a_a_test_says_that_it_is_one() -> None:
    plan = plan_of(("host", "again"), arms={"host": {"x": 1}, "again": {"x": 1}})
    result = analyse(runs_of({"host": 0.0, "again": 0.0}), plan)
    assert any("A/A" in note for note in result.notes)
    assert result.verdicts[0].verdict in ("equivalent", "inconclusive")


def test_arms_that_gave_the_same_numbers_are_named() -> None:
    runs = runs_of({"host": 0.0})
    runs += [dataclasses.replace(run, arm="up") for run in runs]
    result = analyse(runs, plan_of(("host", "up")))
    assert any("same number in every pair" in note for note in result.notes)
    assert result.verdicts[0].verdict == "equivalent"


def test_missing_pairs_make_the_analysis_exploratory_and_are_named() -> None:
    runs = [run for run in runs_of({"host": 0.0, "up": 0.05}) if run.seed < 8 or run.arm == "host"]
    result = analyse(runs, plan_of(("host", "up")))
    assert result.exploratory == ["8 of 10 planned pairs are there"]
    assert any("[8, 9]" in note for note in result.notes)


def test_a_changed_margin_makes_the_analysis_exploratory() -> None:
    plan = plan_of(("host", "up"))
    result = analyse(runs_of({"host": 0.0, "up": 0.05}), dataclasses.replace(plan, minimum_effect=0.001), plan)
    assert result.exploratory == ["minimum_effect was 0.01 in the plan and is 0.001 now"]


def test_a_sequential_sweep_may_stop_at_a_look_and_stay_confirmatory() -> None:
    plan = plan_of(("host", "up"), 15, sequential=True)
    result = analyse(runs_of({"host": 0.0, "up": 0.05}, 10), plan)
    assert result.verdicts[0].verdict == "B better"
    assert result.exploratory == []


@pytest.mark.slow  # seconds of computing
def test_no_p_value_of_a_sequential_sweep_contradicts_its_verdict() -> None:
    weak = [-0.008, -0.002, 0.013, -0.019, 0.01, 0.0, 0.007, 0.005, 0.008, 0.014, -0.002, 0.022, 0.014, 0.015, 0.019]
    plan = plan_of(("host", "up"), 15, minimum_effect=0.001)
    runs = [Run("host", seed, 0.5) for seed in range(15)] + [Run("up", seed, 0.5 + value) for seed, value in enumerate(weak)]
    once, looked = (analyse(runs, dataclasses.replace(plan, sequential=sequential)) for sequential in (False, True))
    assert once.verdicts[0].p_holm <= plan.alpha < looked.verdicts[0].p_holm < 0.07
    assert f"p = {looked.verdicts[0].p_holm:.2g} after Holm" in looked.verdicts[0].sentence
    assert (once.verdicts[0].verdict, looked.verdicts[0].verdict) == ("B better", "inconclusive")
    assert [note for note in looked.notes if "the smallest α at which the looks so far would have decided" in note] and once.notes == []
    early = [0.05, 0.06, 0.04, 0.05, 0.06, 0.06, 0.07, 0.05, 0.06, 0.05, -0.05, -0.09, -0.04, -0.06, 0.02]  # clear at the second look
    runs = [Run("host", seed, 0.5) for seed in range(15)] + [Run("up", seed, 0.5 + value) for seed, value in enumerate(early)]
    kept = analyse(runs, dataclasses.replace(plan, sequential=True)).verdicts[0]
    assert kept.verdict == "B better" and kept.p <= kept.p_holm <= plan.alpha


def test_ranking_names_whom_each_arm_surely_beats() -> None:
    plan = plan_of(("host", "up", "more"), 12, ranking=True)
    result = analyse(runs_of({"host": 0.0, "up": 0.05, "more": 0.1}, 12), plan)
    out = StringIO()
    show(result, plan, Console(file=out, width=140))
    assert len(result.ranking) == 3
    assert out.getvalue().index("more", out.getvalue().index("all against all")) > 0
    assert "host, up" in out.getvalue() or "up, host" in out.getvalue()


def test_json_is_strict_and_holds_every_pair(tmp_path: Path) -> None:
    plan = plan_of(("host", "up"), 4)
    path = write_json(analyse(runs_of({"host": 0.0, "up": 0.05}, 4), plan), plan, tmp_path / "comparison.json")
    read = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert len(read["verdicts"][0]["points"]) == 4
    assert read["verdicts"][0]["interval"] == [None, None]


def test_the_same_runs_give_the_same_numbers_again() -> None:
    plan, runs = plan_of(("host", "up"), 18), runs_of({"host": 0.0, "up": 0.004}, 18)
    assert as_dict(analyse(runs, plan), plan) == as_dict(analyse(runs[::-1], plan), plan)


def test_figures_are_drawn_for_every_block(tmp_path: Path) -> None:
    plan = plan_of(("host", "up"), blocks=("digits", "mnist1d"))
    runs = runs_of({"host": 0.0, "up": 0.05}, block="digits") + runs_of({"host": 0.0, "up": 0.03}, block="mnist1d")
    paths = draw(analyse(runs, plan), plan, tmp_path)
    assert [p.name for p in paths] == ["pairs.png", "cost-digits.png", "cost-mnist1d.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in paths)


def test_five_pairs_can_be_equivalent_and_the_note_says_only_what_they_cannot_be() -> None:
    result = analyse(runs_of({"host": 0.0, "up": 0.0}, 5, 0.0005), plan_of(("host", "up"), 5))
    assert result.verdicts[0].verdict == "equivalent"
    assert result.notes == ["With fewer than 6 pairs no arm can be called better, however clear the difference."]


def test_arms_that_differ_in_nothing_are_not_said_to_differ_without_effect() -> None:
    runs = runs_of({"host": 0.0}, 6)
    runs += [dataclasses.replace(run, arm="up") for run in runs]
    same = analyse(runs, plan_of(("host", "up"), 6, arms={"host": {}, "up": {}})).notes
    assert any("with the same seeds they are the same runs; compare.fresh_seeds gives" in note for note in same)
    assert not any("had no effect" in note for note in same)
    assert any(note.endswith("what differs had no effect.") for note in analyse(runs, plan_of(("host", "up"), 6)).notes)


def test_a_seed_without_a_partner_is_named_with_its_block() -> None:
    plan = plan_of(("host", "up"), 8, blocks=("digits", "mnist1d"))
    runs = [run for block in plan.blocks for run in runs_of({"host": 0.0, "up": 0.05}, 8, block=block)]
    runs = [run for run in runs if (run.arm, run.block, run.seed) not in (("up", "digits", 3), ("host", "mnist1d", 5))]
    notes = analyse(runs, plan).notes
    assert "Seeds [3] of up or host have no partner in digits and are left out, here and over all blocks." in notes
    assert "Seeds [5] of up or host have no partner in mnist1d and are left out, here and over all blocks." in notes
    alone = analyse(runs_of({"host": 0.0, "up": 0.0}, 8)[1:], plan_of(("host", "up"), 8)).notes
    assert "Seeds [0] of up or host have no partner and are left out." in alone


NAMES = ("grown", "scratch_macs", "random_places")


@pytest.mark.parametrize("names", [NAMES, ("optimizer.lr=0.001 grafting=linear", "optimizer.lr=0.003 grafting=adaptive"), ("a" * 70, "b")])
def test_names_of_arms_stay_whole_in_a_narrow_terminal_and_no_column_is_lost(names: tuple[str, ...]) -> None:
    out = StringIO()
    plan = plan_of(names, 10)
    show(analyse(runs_of({name: 0.05 * at for at, name in enumerate(names)}), plan), plan, Console(file=out, width=80))
    text = out.getvalue()
    tables = text.partition("•")[0].splitlines()
    assert max(len(line) for line in tables) <= 80
    cells = {cell.strip() for line in tables for cell in line.split("│")}
    if len(names[0]) < 70:
        assert {word for name in names for word in name.split()} <= {word for cell in cells for word in cell.split()}
    heads = {cell for line in tables if line.startswith("┃") for cell in line.replace("┃", " ").split()}
    assert {"runs", "failed", "MACs", "parameters", "fossils", "verdict", "interval", "p", "(better)"} <= heads
    assert "…" not in text.partition("against the")[0]


def test_long_names_are_broken_between_words_in_figures_and_the_text_is_as_wide_as_the_page_that_shows_it(tmp_path: Path) -> None:
    assert _lines("optimizer.lr=0.003 grafting=adaptive") == "optimizer.lr=0.003\ngrafting=adaptive"
    assert _lines("stability_narrow-and-more-of-it") == "stability_narrow-and-more-of-it"
    names = ("optimizer.lr=0.001 grafting=linear", "optimizer.lr=0.003 grafting=adaptive")
    write_results(analyse(runs_of(dict.fromkeys(names, 0.0)), plan_of(names)), plan_of(names), tmp_path, figures=False)
    assert max(map(len, (tmp_path / "comparison.txt").read_text(encoding="utf-8").splitlines())) <= 100


@pytest.mark.slow  # seconds of computing
def test_a_level_below_one_in_ten_thousand_can_be_reached_with_many_pairs_too() -> None:
    plan = plan_of(("host", "up", "down", "more"), 20, alpha=2e-4)
    result = analyse(runs_of({"host": 0.0, "up": 0.1, "down": -0.1, "more": 0.2}, 20), plan)
    assert [row.verdict for row in result.verdicts] == ["B better", "A better", "B better"]
    assert all(np.isfinite(row.interval).all() for row in result.verdicts)
    for changed in ({"alpha": 1e-5}, {"alpha": 5e-5, "ranking": True}):
        with pytest.raises(UserError, match=r"compare.alpha=.* p-values below .*; raise alpha or compare fewer arms"):
            plan_of(("host", "up", "down", "more"), 20, **changed)
    assert plan_of(("host", "up", "down", "more"), 15, alpha=1e-5).statement()[1].startswith("Too few pairs: below 20 ")


@pytest.mark.slow
def test_a_sequential_plan_states_the_power_of_the_looks() -> None:
    once, looked = (plan_of(("host", "up"), 20, sequential=sequential, spread=0.0).statement()[1] for sequential in (False, True))
    assert looked.startswith("20 pairs, looked at after 7, 13 or 20, find a difference of ")
    one_look, three_looks = (float(text.partition("difference of ")[2].split()[0]) for text in (once, looked))
    assert three_looks > one_look + 0.01


def test_the_plan_says_what_its_pairs_can_find() -> None:
    first, found, needed = plan_of(("host", "up"), 15).statement()
    assert first.startswith("accuracy (max), 1 arm against host, 15 pairs, 1 comparison at ")
    assert found.startswith("15 pairs find a difference of 0.00778 (0.78 × 0.01, the expected standard deviation")
    assert "needs 10 pairs" in needed
    assert "more than 1,000,000 pairs, so" in plan_of(("host", "up"), spread=1e4).statement()[2]
    assert "so this sweep has too few" in plan_of(("host", "a", "b", "c"), 8).statement()[2]
    assert "Too few pairs" in plan_of(("host", "up"), 5).statement()[1]


def test_without_a_spread_the_plan_says_in_the_metric_what_each_that_there_may_be_would_need() -> None:
    lines = plan_of(("host", "up"), 15, spread=0.0).statement()[2:]
    assert lines == [
        "How many pairs a difference of 0.01 needs depends on the standard deviation of the paired differences, which is not known:",
        "  if it is 0.01: 10 pairs; 15 find 0.0078",
        "  if it is 0.02: 34 pairs; 15 find 0.016",
        "  if it is 0.05: 199 pairs; 15 find 0.039",
    ]
    assert plan_of(("host", "up"), 5, spread=0.0).statement()[3] == "  if it is 0.01: 10 pairs"
    assert len(plan_of(("host", "up"), 15, spread=0.0, minimum_effect=0.0).statement()) == 2


def test_power_is_stated_from_the_differences_of_a_pilot(tmp_path: Path) -> None:
    names, heavy = ("host", "up"), generator("pilot").standard_t(2, 40) * 0.01
    runs = [Run(arm, seed, 0.9 + (arm == "up") * float(value)) for seed, value in enumerate(heavy) for arm in names]
    path = write_json(analyse(runs, plan_of(names, 40)), plan_of(names, 40), tmp_path / "comparison.json")

    def planned(pilot: Path | str, spread: float = 0.0) -> Plan:
        config, arms = CompareConfig(pilot=str(pilot), spread=spread), {name: {"arm": name} for name in names}
        return make_plan(config, arms=arms, seeds=range(10), blocks=[""], metric="accuracy", direction="max")

    plan = planned(path)
    assert plan.spread == pytest.approx(np.std(heavy)) and len(plan.noise) == 40
    assert "as the 40 of the pilot are spread" in plan.statement()[1]
    normal = float(planned("").statement()[1].split()[6])
    shaped = float(plan.statement()[1].partition("(")[2].split()[0])
    assert shaped < normal - 0.05  # heavy tails make a difference of so many standard deviations easier to find
    assert parse_plan(plan.text()) == plan and changes(plan, planned("", plan.spread)) == []
    few = analyse(runs[:28], plan_of(names, 14))
    for text, sentence in ((write_json(few, plan, tmp_path / "few.json"), "14 paired"), (tmp_path / "none.json", "is no comparison")):
        with pytest.raises(UserError, match=sentence):
            planned(text)


def test_a_saved_plan_comes_back_and_is_never_replaced(tmp_path: Path) -> None:
    plan = plan_of(("host", "up"))
    save_plan(plan, tmp_path)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path / "plan.json") == plan
    assert changes(plan, dataclasses.replace(plan, alpha=0.1, ranking=True)) == ["alpha"]
    with pytest.raises(UserError, match=r"another plan \(alpha differs\); .* folder of its own: hydra\.sweep\.dir="):
        save_plan(dataclasses.replace(plan, alpha=0.1), tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arms": {"host": {}}}, "at least two arms"),
        ({"reference": "nobody"}, "the arms are host, up"),
        ({"direction": "up"}, "max or min"),
        ({"seeds": (1, 1)}, "given once"),
    ],
)
def test_plans_that_cannot_be_judged_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(("host", "up"), **changed)


@pytest.mark.usefixtures("processes")
def test_planning_and_judging_a_sweep_leave_scipy_stats_alone_which_takes_longer_to_import_than_they_take() -> None:
    program = (
        "import sys; from tests.compare.results.test_analysis import analyse, plan_of, runs_of\n"
        "plan = plan_of(('a', 'b'), 15, sequential=True); plan.statement(); analyse(runs_of({'a': 0.5, 'b': 0.501}, 15), plan)\n"
        "sys.exit('scipy.stats' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
