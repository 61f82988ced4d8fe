"""A view in the terminal: a page that is drawn again and again, or, where there is no terminal, a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from esper.report.number_format import duration, short
from esper.watch.views import ENDED, View

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY_S = 0.5  # between two looks
PLAIN_S = 10.0  # without a terminal: a line this often
MOST_ROWS = 16  # seeds, or jobs, that fit a page
BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}
Snapshot = dict[str, Any]


def watch(
    view: View, once: bool, every_s: float = EVERY_S, console: Console | None = None, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Draw the view until it is over; returns 0 if it FINISHED, else 1. With ``once`` it is drawn once, and the code is 0."""
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    view.update()
    shown = view.snapshot()
    if once:
        console.print(page(shown, console.width))
        return 0
    if not console.is_terminal:
        return _plain(view, every_s, sleep)
    with Live(page(shown, console.width), console=console, auto_refresh=False) as live:
        while True:
            live.update(page(shown, console.width), refresh=True)
            if shown["status"] in ENDED:
                return 0 if shown["status"] == "FINISHED" else 1
            sleep(every_s)
            view.update()
            shown = view.snapshot()


def _plain(view: View, every_s: float, sleep: Callable[[float], None]) -> int:
    """Lines for a pipe or a log: the progress every ten seconds, alerts and transitions as they come."""
    known: list[Any] = []
    said = -PLAIN_S
    while True:
        shown = view.snapshot()
        news = [one for one in [*shown.get("transitions", []), *shown["alerts"]][::-1] if one not in known]
        known = (known + news)[-1000:]
        for one in sorted(news, key=lambda one: one["tick"]):
            print(_sentence(one), flush=True)
        over = shown["status"] in ENDED
        if over or time.monotonic() - said >= PLAIN_S:
            said = time.monotonic()
            print(line(shown), flush=True)
        if over:
            return 0 if shown["status"] == "FINISHED" else 1
        sleep(every_s)
        view.update()


def _sentence(one: Snapshot) -> str:
    if "level" in one:
        return f"{one['level']} (tick {one['tick']}): {one['text']}"
    return f"tick {one['tick']}: {_owner(one)} {_word(one['source'])} → {_word(one['target'])} ({one['cause']})"


def line(shown: Snapshot) -> str:
    """The view in one line."""
    if shown["kind"] == "sweep":
        failed = f", {shown['failed']} failed" if shown["failed"] else ""
        verdict = f" · {shown['verdict']}" if shown["verdict"] else ""
        return f"{shown['status']} {shown['done']}/{shown['jobs']} jobs{failed} · {duration(shown['left_s'])} left{verdict}"
    stages = ", ".join(f"{count} {stage}" for stage, count in shown["stages"].items())
    parts = [f"{shown['status']} {shown['tick']}/{shown['total'] or '?'}", f"train loss {short(shown['loss'])}"]
    parts += [f"{shown['metric']} {short(shown['value'])}"] + ([f"seeds: {stages}"] if stages else [])
    return " · ".join([*parts, f"{short(shown['steps_per_second'], 3)} steps/s", f"{duration(shown['left_s'])} left"])


def page(shown: Snapshot, width: int) -> RenderableType:
    """The view as a page."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(shown["name"], style="bold"), Text(line(shown))]
    if shown["kind"] == "sweep":
        parts.append(_jobs(shown))
    else:
        parts += [_bar(shown, width), *_curves(shown, width), _seeds(shown)]
        parts += [table for table in (_gates(shown), _moves(shown)) if table is not None]
    for alert in shown["alerts"][:5]:
        parts.append(Text(f"{alert['level']} (tick {alert['tick']}): {alert['text']}", style=COLOURS.get(alert["level"], "")))
    heard = f", last heard {shown['heard_s']:.0f} s ago" if shown.get("heard_s", 0) > PLAIN_S and shown["status"] not in ENDED else ""
    parts.append(Text(f"{shown['place']}{heard}", style="dim"))
    if shown["problem"]:
        parts.append(Text(shown["problem"], style="red"))
    return Group(*parts)


def _bar(shown: Snapshot, width: int) -> RenderableType:
    from rich.text import Text

    whole = min(width, 80) - 1
    done = whole * min(1.0, shown["tick"] / shown["total"]) if shown["total"] else 0.0
    return Text("━" * int(done), style="green").append("─" * (whole - int(done)), style="dim")


def _curves(shown: Snapshot, width: int) -> list[RenderableType]:
    from rich.text import Text

    names = sorted(shown["curves"], key=lambda name: (name != "train/loss", name))
    pad = max(map(len, names), default=0)
    found: list[RenderableType] = []
    for name in names:
        values = [value for _, value in shown["curves"][name] if value is not None]
        if values:
            text = f"{name:<{pad}}  {sparkline(values, max(8, min(60, width - pad - 30)))}  {short(values[0])} → {short(values[-1])}"
            found.append(Text(text, no_wrap=True))
    return found


def sparkline(values: list[float], width: int) -> str:
    """The values as ``width`` bars at most, each the last of its share."""
    shown = values if len(values) <= width else [values[(at + 1) * len(values) // width - 1] for at in range(width)]
    low, high = min(shown), max(shown)
    return "".join(BARS[int((value - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for value in shown)


def _seeds(shown: Snapshot) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not shown["seeds"]:
        return Text("no seed is awake", style="dim")
    table = Table(box=None, pad_edge=False)
    for name in ("site", "seed", "stage", "blueprint"):
        table.add_column(name)
    for name in ("age", "alpha", "gain"):
        table.add_column(name, justify="right")
    for one in shown["seeds"][:MOST_ROWS]:
        cells = (Text(one["site"]), _number(one["seed"]), _word(one["stage"]), Text(one["blueprint"]))
        table.add_row(*cells, short(one["age"]), short(one["alpha"], 3), short(one["gain"], 3))
    left = len(shown["seeds"]) - MOST_ROWS + shown["more_seeds"]
    if left > 0:
        table.add_row(f"and {left} more")
    return table


def _gates(shown: Snapshot) -> RenderableType | None:
    from rich.table import Table

    if not shown["gates"]:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("gate")
    for name in ("passed", "last", "closest", "threshold"):
        table.add_column(name, justify="right")
    for gate in shown["gates"]:
        values = (short(gate[name], 3) for name in ("value", "closest", "threshold"))
        table.add_row(gate["gate"], f"{gate['passed']} of {gate['asked']}", *values)
    return table


def _moves(shown: Snapshot) -> RenderableType | None:
    from rich.text import Text

    moves = [_sentence(one) for one in shown["transitions"][:6]]
    return Text("\n".join(moves), style="dim") if moves else None


def _jobs(shown: Snapshot) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("job", "status"):
        table.add_column(name)
    for name in ("step", "train loss", "metric", "seeds", "left"):
        table.add_column(name, justify="left" if name in ("metric", "seeds") else "right")
    for one in shown["runs"][:MOST_ROWS]:
        stages = ", ".join(f"{count} {stage}" for stage, count in one["stages"].items())
        step = f"{one['tick']}/{one['total'] or '?'}" if "tick" in one else ""
        metric = f"{one['metric']} {short(one['value'])}" if one["value"] is not None else ""
        loss, left = (short(one["loss"]), duration(one["left_s"])) if "tick" in one else ("", "")
        table.add_row(Text(one["name"]), one["status"], step, loss, metric, stages, left)
    if len(shown["runs"]) > MOST_ROWS:
        table.add_row(f"and {len(shown['runs']) - MOST_ROWS} more")
    return table


def _owner(one: Snapshot) -> str:
    return f"{one['site']} seed {one['seed']}" if one["seed"] >= 0 else f"{one['site']} block"


def _number(seed: int) -> str:
    return str(seed) if seed >= 0 else "block"


def _word(stage: str) -> str:
    return stage.lower().replace("_", " ")
