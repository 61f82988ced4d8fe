"""A run's page in MLflow: the description on top of it, in Markdown, and the numbers that its first sections show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.messages import Metrics
from esper.report.number_format import count, short
from esper.tracking.seed_averages import Point

MAIN = "0_main"  # MLflow's page sorts its sections by name
ENDS = ("fossilized", "culled", "cancelled", "rolled_back")


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
    """Its numbers: the deciding metric on the test set, and by how much that is better than the host alone."""
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
