"""The README of the calibration, written from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

Row = Mapping[str, object]

TEXT = """# How often is the verdict of a sweep wrong?

**Question.** Take whole sweeps with two to six arms and 6–30 pairs. How often is one of identical arms called better? How often is an
arm that differs by exactly the margin called equivalent? Is a difference of the stated size found as often as the plan states, within
three points?

**Command.** `python experiments/calibration/run.py` ({sweeps:,} simulated sweeps per setting, {first} s on one core; then the second
part, which `--again` repeats alone: {second} s of processor time; {versions}). Every row is in
`results.csv`; this file is written by the same command. [Runs that are not paired, and several tasks at once](groups.md) have a page of
their own.

**How.** Runs of a pair share the effect of their seed. The noise of a run is added to it and is normal, heavy-tailed (Student's t,
3 degrees of freedom), skewed (lognormal) or that of accuracies near 1 on 360 test samples (ties, a ceiling). The
functions of `esper compare` decide the sweeps: paired sign-flip test against the first arm, Holm over the arms,
α = 0.05. An error is counted once per sweep, however many arms it has. To measure power, one arm differs by the
effect that the plan states for 80 % (in standard deviations of a paired difference), and the others do not differ.
{resolution}

## False "better" in percent, worst of 2–6 arms (limit 5)

{better}

## False "equivalent" in percent with all arms at the margin of one standard deviation, worst of 2–6 arms (limit 5)

{equivalent}

## Power in percent where 80 is stated, lowest–highest over 2–6 arms

{power}

Without a pilot the plan states the power for normal noise and says so; heavy tails give more power. The next table shows power minus
stated power, in points, when the plan states it from the differences of a pilot (`compare.pilot`; 20,000 of them here, so that the
pilot itself is no source of error):

{pilot}

A dash: so few pairs can find nothing after Holm, and the plan says so.

## Stopping early: false "better" in percent with three looks, worst of 2 and 4 arms (limit 5)

{sequential}

Power in percent where the plan states 80 for so many looks, lowest–highest over 2 and 4 arms:

{looked}

## Rates above 5 % again

With two arms there is one comparison, of which the test spends the whole 5 %: half of such settings must come out above 5 % by chance.
{again}

## Verdict

{verdict}
"""


def readme(rows: Sequence[Row], spent: Mapping[str, object]) -> str:
    """The whole text; ``rows`` are those of ``results.csv``, ``spent`` what ``cost.json`` holds."""
    sweeps = int(str(spent["sweeps"]))
    fixed = [r for r in rows if r["mode"] == "fixed"]
    looked = [r for r in rows if r["mode"] != "fixed"]
    error = 300 * sqrt(0.05 * 0.95 / sweeps)
    three = 300 * sqrt(0.16 / sweeps)
    return TEXT.format(
        **spent,
        again=_again(rows, sweeps),
        resolution=f"Three standard errors of a rate of 5 % are {error:.2f} points, of 80 % {three:.1f}.",
        better=_table(fixed, lambda found: f"{100 * max(_number(r, 'false_better') for r in found):.2f}"),
        equivalent=_table(fixed, lambda found: f"{100 * max(_number(r, 'false_equivalent') for r in found):.2f}"),
        power=_table(fixed, _powers),
        pilot=_table(fixed, _gaps),
        sequential=_table(looked, lambda found: f"{100 * max(_number(r, 'false_better') for r in found):.2f}"),
        looked=_table(looked, _powers),
        verdict=_verdict(fixed, looked, error),
    )


def _number(row: Row, column: str) -> float:
    return float(str(row[column]))


def _powers(found: Sequence[Row]) -> str:
    powers = [100 * _number(r, "power") for r in found if r["power"] != ""]
    return f"{min(powers):.1f}–{max(powers):.1f}" if powers else "–"


def _gaps(found: Sequence[Row]) -> str:
    gaps = [100 * (_number(r, "power") - _number(r, "pilot_power")) for r in found if r["power"] != ""]
    return f"{min(gaps):+.1f} to {max(gaps):+.1f}" if gaps else "–"


def _table(rows: Sequence[Row], cell: Callable[[Sequence[Row]], str]) -> str:
    noises = list(dict.fromkeys(str(r["noise"]) for r in rows))
    pairs = sorted({int(str(r["pairs"])) for r in rows})
    lines = ["| noise | " + " | ".join(f"{n} pairs" for n in pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for noise in noises:
        cells = [cell([r for r in rows if r["noise"] == noise and int(str(r["pairs"])) == n]) for n in pairs]
        lines.append(f"| {noise} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _above(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Rows and columns whose rate was above 5 % at first."""
    return [(r, c) for r in rows for c in ("false_better", "false_equivalent") if r.get(f"{c}_again") not in ("", None)]


def _again(rows: Sequence[Row], sweeps: int) -> str:
    found = _above(rows)
    rates = [100 * _number(row, f"{column}_again") for row, column in found]
    if not rates:
        return "None was."
    error = 300 * sqrt(0.05 * 0.95 / (10 * sweeps))
    return (
        f"All {len(rates)} that did were simulated again on {10 * sweeps:,} fresh sweeps each: {min(rates):.2f} to {max(rates):.2f} %,\n"
        f"{sum(rates) / len(rates):.2f} % in the mean, where three standard errors of one are {error:.2f} points. That the test itself\n"
        "rejects in no more than α of all sign patterns of any data is no matter of simulation: `test_sequential.py` and\n"
        "`test_sign_flip.py` in `tests/compare/statistics` count the patterns."
    )


def _verdict(fixed: Sequence[Row], looked: Sequence[Row], error: float) -> str:
    def said(name: str, rows: Sequence[Row], column: str) -> str:
        first = 100 * max(_number(r, column) for r in rows)
        again = [100 * _number(r, f"{c}_again") for r, c in _above(rows) if c == column]
        worst = max(again) if again else first
        word = "holds" if worst <= 5 else ("holds within the error of the simulation" if worst <= 5 + error / sqrt(10) else "DOES NOT HOLD")
        more = f"; {worst:.2f} % on the fresh sweeps" if again else ""
        return f"- {name} ≤ 5 %: {word} (worst of {len(rows)} settings {first:.2f} %{more})."

    return "\n".join(
        [
            said('False "better"', fixed, "false_better"),
            said('False "equivalent" at the margin', fixed, "false_equivalent"),
            said('False "better" with early stopping', looked, "false_better"),
            _off("Power stated for normal noise", fixed, "stated_power"),
            _off("Power stated for normal noise, with early stopping", looked, "stated_power"),
            _off("Power stated from a pilot's differences", fixed, "pilot_power"),
        ]
    )


POINTS = 3.0  # how far power may be from the stated


def _off(name: str, rows: Sequence[Row], column: str) -> str:
    """How many settings have the stated power within three points, and by noise which have not, with power minus stated power."""
    gaps = [(r, 100 * (_number(r, "power") - _number(r, column))) for r in rows if r["power"] != ""]
    missed = [(r, gap) for r, gap in gaps if abs(gap) > POINTS]
    lines = [f"- {name}: power within {POINTS:g} points of it in {len(gaps) - len(missed)} of {len(gaps)} settings."]
    for noise in dict.fromkeys(str(r["noise"]) for r, _ in missed):
        found = [(r, gap) for r, gap in missed if r["noise"] == noise]
        kept = [r for r, gap in gaps if r["noise"] == noise and abs(gap) <= POINTS]
        low, high = min(gap for _, gap in found), max(gap for _, gap in found)
        where = f"in all but {_named(kept)}" if len(kept) < len(found) else f"at {_named([r for r, _ in found])}"
        lines.append(f"  - Beyond, {noise} noise: {where if kept else 'in all'}, by {low:+.1f} to {high:+.1f} points.")
    return "\n".join(lines)


def _named(rows: Sequence[Row]) -> str:
    return ", ".join(f"{r['pairs']} pairs with {r['arms']} arms" for r in rows)
