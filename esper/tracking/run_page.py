"""A run's page in MLflow: its description in Markdown, the numbers of its first sections, and the curves of a site's seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.messages import Metrics, Telemetry
from esper.report.number_format import count, short
from esper.telemetry_columns import COLUMNS
from esper.tracking.tracker import rows

Point = tuple[int, str, float]  # tick, name, value

MAIN = "0_main"  # MLflow's page sorts its sections by name
ENDS = ("fossilized", "culled", "cancelled", "rolled_back")
BLENDED = tuple(range(Stage.GRAFTING, Stage.FOSSILIZED + 1))
LEARNT = (int(Stage.TRAINING), *BLENDED)

STAGES_OF: dict[str, tuple[int, ...]] = {
    "alpha": BLENDED,
    "gain": BLENDED,
    "branch_rms_ratio": BLENDED,
    "variance": (int(Stage.DORMANT), *LEARNT),
    "near_zero": (int(Stage.DORMANT), *LEARNT),
}
"""The stages in which a column's mean is published, where they are not LEARNT; seeds that wait or rest are counted alone."""
WITHOUT_MEAN = ("stage", "age", "generation", "mean", "correlation", "grad_norm")
"""Columns whose mean over the seeds of a stage says little."""
MEANS = {column: STAGES_OF.get(column, LEARNT) for column in COLUMNS if column not in WITHOUT_MEAN}


def page_description(summary: Mapping[str, Any]) -> str:
    """Whether growing paid in one paragraph, and one table row a branch; ``summary`` may be empty (a run that was lost)."""
    if not summary:
        return "The run ended without a summary."
    kept = str((summary.get("kept") or {}).get("why", ""))
    parts = (_result(summary), kept and f"{kept[0].upper()}{kept[1:]}.", _grown(summary), _branches(summary.get("branches") or []))
    return "\n\n".join(filter(None, parts))


def _result(summary: Mapping[str, Any]) -> str:
    final = (summary.get("metrics") or {}).get("final") or {}
    name = str(summary.get("primary", "")).replace("validation/", "test/", 1)
    if final.get(name) is None:
        return f"{str(summary.get('status', '')).capitalize()} after {count(summary.get('steps'))} steps, before the final test."
    control = summary.get("control") or {}
    told = {when: values.get(name) for when, values in control.items() if values}
    others = [f"{short(value)} at the same {when.removeprefix('same_').replace('macs', 'MACs')}" for when, value in told.items()]
    against = f"; the host alone: {', '.join(others)}" if others else ""
    return f"**{name} {short(final[name])}**{against}."


def _grown(summary: Mapping[str, Any]) -> str:
    seeds, parameters = summary.get("seeds") or {}, summary.get("parameters") or {}
    if not seeds.get("germinated"):
        return "**Nothing germinated:** this run is its host alone."
    ends = ", ".join(f"{seeds[name]} {name.replace('_', ' ')}" for name in ENDS if seeds.get(name))
    size = f"parameters {count(parameters.get('before'))} → {count(parameters.get('after'))}"
    return f"{seeds['germinated']} branches germinated ({ends or 'none has ended'}); {size}."


def _branches(branches: list[Mapping[str, Any]]) -> str:
    if not branches:
        return ""
    lines = ["| site | seed | blueprint | strategy | ended | gain (bound) | parameters |", "|---|---|---|---|---|---|---|"]
    for branch in branches:
        seed = branch.get("seed", -1)
        path = [stage for stage, _ in branch.get("path", []) if stage != "DORMANT"]
        ended = path[-1].lower().replace("_", " ") if path else "–"
        gain = short(branch.get("gain"), 3)
        gain += f" (≥ {short(branch.get('gain_bound'), 3)})" if gain != "–" else ""
        cells = (branch.get("site"), seed if seed >= 0 else "block", branch.get("blueprint"), branch.get("strategy"))
        lines.append("| " + " | ".join(map(str, (*cells, ended, gain, count(branch.get("parameters"))))) + " |")
    return "\n".join(lines)


def final_values(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """``final/…`` and ``best/…`` metrics and the counts of seeds, as the interface shows only last values."""
    found = []
    for moment in ("final", "best"):
        values = (summary.get("metrics") or {}).get(moment) or {}
        found += [(f"{moment}/{name}", float(value)) for name, value in values.items() if value is not None]
    replaced = ((summary.get("grown") or {}).get("metrics") or {}).get("final") or {}
    found += [(f"final/as_grown/{name}", float(value)) for name, value in replaced.items() if value is not None]
    found += [(f"final/seeds/{name}", float(count)) for name, count in (summary.get("seeds") or {}).items()]
    for when, values in (summary.get("control") or {}).items():
        tested = {name.removeprefix("test/"): value for name, value in values.items() if name.startswith("test/")}
        found += [(f"final/host_alone/{name}_{when}", float(value)) for name, value in tested.items() if value is not None]
    return found


def main_points(message: Metrics, primary: str) -> list[Point]:
    """The curves of the section that stands first on the run's page: the deciding metric and the parameters."""
    shown = {primary: primary, "params/total": "parameters"}
    return [(message.tick, _main(shown[name]), value) for name, value in message.values.items() if name in shown]


def main_values(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of the first section: the deciding metric on the test set, and its advantage over the host alone."""
    name = str(summary.get("primary", "")).replace("validation/", "test/", 1)
    final = ((summary.get("metrics") or {}).get("final") or {}).get(name)
    if final is None:
        return []
    sign = -1.0 if summary.get("direction") == "min" else 1.0
    alone = {when: values.get(name) for when, values in (summary.get("control") or {}).items() if values}
    gains = [(_main(f"better_than_host_{when}"), sign * (final - value)) for when, value in alone.items() if value is not None]
    return [(_main(name), float(final)), *gains]


def _main(name: str) -> str:
    return f"{MAIN}/{name.replace('/', '_')}"


class SeedAverages:
    """``sites/<site>/seeds_<stage>`` and, of the columns in ``MEANS``, ``…/<column>_<stage>``, at most ``points`` times a run.

    One prefix a site, because MLflow's page has a section for every prefix.

    A stage that was ever seen at a site keeps being counted, so that its curve comes down to zero. Means run over the
    seeds in the stage at that tick whose value is finite: a gain that was not judged yet, for example, is left out.
    """

    def __init__(self, points: int) -> None:
        self._points = points
        self._stride = 1
        self._known: dict[str, set[int]] = {}
        self._next: dict[str, int] = {}
        self._first = 0

    def set_length(self, total_ticks: int, since: int = 0) -> None:
        """Spread the points over a run of this length; of a run resumed after tick ``since``, those before were given."""
        self._stride = max(1, math.ceil(total_ticks / self._points))
        self._first = since - since % self._stride + self._stride if since else 0

    def go_on(self, said: dict[str, tuple[int, set[int]]]) -> None:
        """Continue after an earlier session; by site, the tick of its last points and the stages that it had seen."""
        for site, (tick, stages) in said.items():
            self._next[site] = tick - tick % self._stride + self._stride
            self._known[site] = set(stages)

    def points(self, message: Telemetry) -> list[Point]:
        """The points of one message that are due."""
        found: list[Point] = []
        values = rows(message)
        for tick, block in zip(message.ticks, values, strict=True):
            if tick >= self._next.get(message.site, self._first):
                self._next[message.site] = tick - tick % self._stride + self._stride
                found += self._of_tick(message, tick, block)
        return found

    def _of_tick(self, message: Telemetry, tick: int, block: np.ndarray) -> list[Point]:
        column = {name: block[:, index] for index, name in enumerate(message.columns)}
        stage = column["stage"].astype(np.int64)
        counts = np.bincount(stage, minlength=len(Stage))
        known = self._known.setdefault(message.site, set())
        known.update(np.flatnonzero(counts).tolist())
        found: list[Point] = []
        for code in sorted(known):
            where, word = f"sites/{message.site}", Stage(code).name.lower()
            found.append((tick, f"{where}/seeds_{word}", float(counts[code])))
            members = stage == code
            for name in (name for name, stages in MEANS.items() if code in stages and name in column):
                values = column[name][members]
                values = values[np.isfinite(values)]
                if len(values):
                    found.append((tick, f"{where}/{name}_{word}", float(values.mean())))
        return found
