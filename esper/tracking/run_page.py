"""What a run came to, in Markdown: the description that MLflow shows on top of the run's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.report.number_format import count, short

ENDS = ("fossilized", "culled", "cancelled", "rolled_back")


def description(summary: Mapping[str, Any]) -> str:
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
