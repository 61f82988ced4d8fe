"""The report at the end of a run: the stages of every branch, and whether growing paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esper.report.number_format import count, duration, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BRANCH_COLUMNS = ("site", "seed", "blueprint", "strategy", "path (stage tick)", "gain (bound)", "parameters")
RIGHT = ("gain (bound)", "parameters")
WIDTH = 140  # where there is no terminal to ask


def print_report(summary: Mapping[str, Any], ui: str = "", console: Console | None = None) -> None:
    """Print the report of a Summary (see ``esper.report.summary_file``); ``ui`` is the command that opens the runs."""
    from rich.console import Console

    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
    if summary.get("branches"):
        console.print(_branches(summary["branches"]))
    _loudly(summary, console)
    for label, text in closing_lines(summary, ui):
        console.print(f"[bold]{label:<22}[/]", end=" ")
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _branches(branches: list[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Branches", title_justify="left", title_style="bold")
    for name in BRANCH_COLUMNS:
        table.add_column(name, overflow="fold" if name not in RIGHT else "ellipsis", justify="right" if name in RIGHT else "left")
    for row in branch_rows(branches):
        table.add_row(*row)
    return table


def branch_rows(branches: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a branch with the cells of BRANCH_COLUMNS."""
    rows = []
    for branch in branches:
        path = " → ".join(f"{_readable(stage)} {tick}" for stage, tick in branch.get("path", []))
        seed = branch.get("seed", -1)
        owner = str(seed) if seed >= 0 else f"block {branch.get('branch', '')}".strip()
        if branch.get("replaces", -1) >= 0:
            owner += f", for branch {branch['replaces']}"
        gain = short(branch.get("gain"), 3)
        if gain != "–":
            gain += f" (≥ {short(branch.get('gain_bound'), 3)})"
        names = [str(branch.get(name, "")) for name in ("blueprint", "strategy")]
        rows.append([str(branch.get("site", "")), owner, *names, path, gain, count(branch.get("parameters"))])
    return rows


def _readable(stage: str) -> str:
    return str(stage).lower().replace("_", " ")


UNDECIDED = ("GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")
"""Stages of branches that the forward pass adds and no gate has decided about; ``esper.lifecycle`` would bring torch."""


def _loudly(summary: Mapping[str, Any], console: Console) -> None:
    """When nothing grew or stayed: say so, with how near every gate was and why commands were refused."""
    from rich.table import Table

    seeds = summary.get("seeds") or {}
    germinated, kept = seeds.get("germinated", 0), seeds.get("fossilized", 0)
    if germinated and kept:
        return
    if not germinated:
        console.print("[bold red]NOTHING GERMINATED:[/] this run is its host alone.")
    elif still := sum(branch.get("stage") in UNDECIDED for branch in summary.get("branches") or []):
        console.print(f"[bold]NOTHING IS DECIDED:[/] {still} of {germinated} germinated are blended at the end and part of the model.")
    else:
        ends = ", ".join(f"{seeds.get(name, 0)} {_readable(name)}" for name in ("culled", "cancelled", "rolled_back"))
        console.print(f"[bold red]NOTHING WAS KEPT:[/] {germinated} germinated, 0 fossilized, {ends}.")
        console.print(why_not_alone(summary), markup=False, highlight=False)
    gates = Table(title="Gates: the value closest to opening", title_justify="left")
    for name in ("gate", "closest", "threshold", "passed"):
        gates.add_column(name, justify="left" if name == "gate" else "right")
    for name, gate in (summary.get("gates") or {}).items():
        passed = f"{int(gate.get('passed') or 0)}" + (f" of {gate['asked']}" if "asked" in gate else "")
        gates.add_row(name, short(gate.get("closest")), short(gate.get("threshold")), passed)
    console.print(gates if gates.row_count else "No gate was ever asked.")
    refusals = summary.get("refusals") or {}
    if not refusals:
        console.print("No command was refused.")
    for reason, times in sorted(refusals.items(), key=lambda item: (-item[1], item[0])):
        console.print(f"refused {times} ×: {reason}", markup=False, highlight=False)


def why_not_alone(summary: Mapping[str, Any]) -> str:
    """Of a run that kept nothing: why its host is not, or is, the host alone, in one sentence."""
    spans = [span for branch in summary.get("branches") or [] if (span := _blended(branch.get("path", []), summary.get("ticks", 0)))]
    if not spans:
        return "No branch was ever blended in, so this host learned as the host alone does."
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    which = "one branch was" if len(spans) == 1 else f"{len(spans)} branches were"
    return (
        f"This host still differs from the host alone: {which} blended in between ticks {first} and {last}, and while a branch is, the "
        "host learns with it in place; taking it away does not undo that."
    )


def _blended(path: Sequence[Sequence[Any]], end: int) -> tuple[int, int] | None:
    """The ticks from and to which a branch added to its host; None for one that never did."""
    ticks = {str(stage): int(tick) for stage, tick in path}
    if "GRAFTING" not in ticks:
        return None
    return ticks["GRAFTING"], min((tick for stage, tick in ticks.items() if stage in ("CULLED", "ROLLED_BACK")), default=end)


def closing_lines(summary: Mapping[str, Any], ui: str = "") -> list[tuple[str, str]]:
    """The lines behind the tables, each a label and a text."""
    metrics = (summary.get("metrics") or {}).get("final") or {}
    control = summary.get("control") or {}
    seconds, parameters = summary.get("seconds") or {}, summary.get("parameters") or {}
    lines = [("status", str(summary.get("status", "")))] if summary.get("status") else []
    kept, grown = summary.get("kept") or {}, summary.get("grown") or {}
    lines.append(("kept", str(kept.get("why", ""))))
    lines.append(("result", _values(_tested(metrics))))
    lines.append(("as grown", _values(_tested(grown["metrics"]["final"])) if grown else ""))
    for key, label in (("same_steps", "host alone, same steps"), ("same_macs", "host alone, same MACs")):
        if key in control:
            lines.append((label, _values(_tested(control[key] or {}))))
    lines += [
        ("training MACs", count(summary.get("macs"))),
        ("parameters", f"{count(parameters.get('before'))} → {count(parameters.get('after'))}"),
        ("ranks", _ranks(summary.get("branches") or [])),
        ("time", _time(seconds)),
        ("compiling", _compiling(summary.get("compiler") or {})),
        ("bits", _bits(summary.get("environment") or {})),
        ("output", str(summary.get("output", ""))),
        ("trace", f"{summary['trace']} (open it in Perfetto or chrome://tracing)" if summary.get("trace") else ""),
        ("see it in MLflow", ui),
    ]
    return [(label, text) for label, text in lines if text]


def _ranks(branches: Sequence[Mapping[str, Any]]) -> str:
    """The ranks that grew on each layer (``blueprint=lora``)."""
    found: dict[str, int] = {}
    for branch in branches:
        if branch.get("ranks"):
            found[branch["site"]] = found.get(branch["site"], 0) + branch["ranks"]
    return ", ".join(f"{site} {number}" for site, number in found.items())


def _bits(environment: Mapping[str, Any]) -> str:
    """A sentence where the promise that a run repeats was given up."""
    return "trainer.deterministic=false: another run of this config may have others" if environment.get("deterministic") is False else ""


def _tested(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics of the test set; all metrics where there are none."""
    return {name: value for name, value in metrics.items() if name.startswith("test/")} or metrics


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in sorted(values.items())) or "not measured"


def _compiling(compiler: Mapping[str, Any]) -> str:
    graphs = int(compiler.get("graphs", 0))
    if not graphs:
        return ""
    return f"{duration(compiler['seconds'])} for {graphs} {'graph' if graphs == 1 else 'graphs'}, part of the time in the step loop"


def _time(seconds: Mapping[str, float]) -> str:
    total = seconds.get("total")
    if not total:
        return ""
    share = (seconds.get("shadow", 0.0) + seconds.get("judge", 0.0)) / total
    return f"{duration(total)} in the step loop, {share:.0%} of it on shadow forwards and judging"
