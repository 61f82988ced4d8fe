"""Does a hostile seed harm the host? Runs under random commands against their never-grown twins.

First the never-grown runs: every seed twice, with the same initial weights and another order of the data. The 99 % quantile
of what the one is worse than the other is what chance alone does. Then every seed once more with hostile blueprints under
random commands. Held out is the mean of validation and test accuracy. Writes ``results.csv`` and the README's table; with
``--first`` above 0, ``fresh.csv`` and the README's second table, of seeds that nothing was made with in mind; with another
``--host`` than the mlp, ``results-<host>.csv`` or ``fresh-<host>.csv`` and a table of its own, by the limit of that host's own twins.

Twin and grown run side by side are also what ``trainer.keep=better`` compares: which of the two it would leave, and how that one does,
is told from the same runs, with the very rule of the program. ``--again`` writes the tables from the CSV files, without a run.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from hostile import KINDS, HostileConv, HostileMLP, RandomPort  # noqa: E402

from esper.cli.compose import compose  # noqa: E402
from esper.errors import UserError  # noqa: E402
from esper.grafting import CONFIGS as STRATEGIES  # noqa: E402
from esper.randomness import generator  # noqa: E402
from esper.running.model_selection import worse_than_alone  # noqa: E402
from esper.trainer.trainer import Growth, Trainer  # noqa: E402

WORDS = ("trainer.steps=200", "trainer.batch_size=32", "lifecycle.judge_every=2%", "telemetry.every=20", "tracking=none")
HOSTS: dict[str, tuple[str, ...]] = {
    "mlp": (),
    "cnn": ("model=cnn", "trainer.batch_size=16"),
    "transformer": (
        *("task=text", "task.path={text}", "task.context=32", "task.held_out=0.02", "trainer.batch_size=8"),
        *("model=transformer", "model.width=32", "model.depth=2", "optimizer.lr=0.01"),
    ),
}
COUNTS = ("germinated", "fossilized", "culled", "rolled_back")
SAID = ("slow_harm", "host_returned")
MEASURED = ("accuracy", "loss", "primary")
"""``primary`` is the task's own metric on the validation set, turned so that larger is better: by it ``trainer.keep=better`` decides."""
FIELDS = ("arm", "seed", "kind", "strategy", *MEASURED, *COUNTS, *SAID, "rollbacks", "stopped")
Arms = dict[str, dict[int, dict[str, Any]]]
"""Runs by arm and seed."""
SHARE = 0.01
"""Of the differences between never-grown twins, the share beyond the limit."""


def one(config: Any, task: Any, seed: int, order: int, arm: str) -> dict[str, Any]:
    """One run: initial weights by ``seed``, data order by ``order``."""
    kind, strategy = KINDS[seed % len(KINDS)], sorted(STRATEGIES)[seed % len(STRATEGIES)]
    host = config.model.build(task, generator(seed, "host"))
    blueprint = (HostileConv if config.model.name == "cnn" else HostileMLP)(kind=kind, draws=seed)
    growth = Growth(config.sites, blueprint, config.lifecycle, STRATEGIES[strategy](), config.telemetry)
    port = RandomPort(seed, config.trainer.steps) if arm == "grown" else None
    cpu = torch.device("cpu")
    trainer = Trainer(host, task, config.trainer, config.optimizer, config.scheduler, growth, order, cpu, port)
    stopped = ""
    try:
        final = trainer.fit().final
    except UserError as error:
        stopped, final = str(error), {}
    nan = float("nan")
    values = {name: (final.get(f"validation/{name}", nan) + final.get(f"test/{name}", nan)) / 2 for name in ("accuracy", "loss")}
    sign = 1.0 if task.metrics[task.primary].direction == "max" else -1.0
    values["primary"] = sign * final.get(f"validation/{task.primary}", nan)
    counts = {name: trainer.grow.transitions.counts[name] for name in COUNTS}
    rollbacks = len(trainer.governor.anomalies) if trainer.governor else 0
    counts |= {name: 0 if port is None else port.said.get(name, 0) for name in SAID}
    grown = {"kind": kind, "strategy": strategy} if arm == "grown" else {"kind": "", "strategy": ""}
    return {"arm": arm, "seed": seed, **grown, **values, **counts, "rollbacks": rollbacks, "stopped": stopped}


def main(arguments: list[str]) -> int:
    """Run, write, report; 1 when a grown run is worse than chance explains more often than chance explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--host", choices=tuple(HOSTS), default="mlp")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the CSV files and the README")
    parser.add_argument("--again", action="store_true", help="no runs: the table once more from the CSV file")
    options = parser.parse_args(arguments)
    mark = ("fresh" if options.first else "results") + ("" if options.host == "mlp" else f"-{options.host}")
    path, words = options.folder / f"{mark}.csv", (*WORDS, *HOSTS[options.host])
    if not options.again:
        write(measure(options), path)
    return report(read(path), mark, words, options.folder)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All the runs."""
    torch.set_num_threads(1)
    config, task = prepared(WORDS, options.host)
    rows = []
    for arm, shift in (("twin", 0), ("other order", 1_000_000), ("grown", 0)):
        for number in range(options.runs):
            seed = options.first + number
            rows.append(one(config, task, seed, seed + shift, arm))
            if number % 20 == 19:
                print(f"{arm}: {number + 1} of {options.runs}", file=sys.stderr, flush=True)
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Every run in a line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **{name: f"{row[name]:.5f}" for name in MEASURED}} for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """What ``write`` wrote; without ``primary`` where it is of before that was measured."""
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row.update({name: float(row[name]) for name in MEASURED if name in row})
        row.update({name: int(row[name]) for name in ("seed", "rollbacks", *COUNTS, *SAID)})
    return rows


def prepared(words: Iterable[str], host: str) -> tuple[Any, Any]:
    """The configuration of a host's runs and their data."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(_language(), encoding="utf-8")
        config = compose([*words, *(word.replace("{text}", str(text)) for word in HOSTS[host])])
        return config, config.task.build()


def _language() -> str:
    """Twelve words of eight letters, drawn at random: a small network learns something of them in few steps."""
    lot = random.Random(0)
    words = ["".join(lot.choice("abcdefgh") for _ in range(lot.randrange(2, 5))) for _ in range(12)]
    return " ".join(lot.choice(words) for _ in range(60_000))


def at_least(count: int, runs: int, share: float) -> float:
    """Probability that ``count`` or more of ``runs`` independent ones lie beyond what each passes with probability ``share`` (binomial)."""
    return math.fsum(math.comb(runs, k) * share**k * (1.0 - share) ** (runs - k) for k in range(count, runs + 1))


def harm(run: dict[str, Any], twin: dict[str, Any], name: str) -> float:
    """What ``run`` is worse than its twin by accuracy or by loss."""
    return float(twin[name] - run[name]) if name == "accuracy" else float(run[name] - twin[name])


def limit_of(arms: Arms, name: str) -> float:
    """What chance alone makes a run worse than its twin by at most: a quantile of never-grown twins' differences, either way round."""
    chance = torch.tensor([harm(arms["other order"][seed], twin, name) for seed, twin in arms["twin"].items()]).double()
    return float(torch.quantile(torch.cat([chance, -chance]), 1.0 - SHARE))


def beyond(runs: dict[int, dict[str, Any]], arms: Arms, name: str) -> list[int]:
    """The seeds whose run is worse than its twin by more than chance explains, or by no number."""
    limit = limit_of(arms, name)
    return [seed for seed, run in runs.items() if not harm(run, arms["twin"][seed], name) <= limit]


def better(arms: Arms) -> dict[int, dict[str, Any]]:
    """What ``trainer.keep=better`` leaves of each pair; a run that was stopped leaves nothing else in its place."""
    return {
        seed: arms["twin"][seed] if not run["stopped"] and worse_than_alone(run["primary"], arms["twin"][seed]["primary"], "max") else run
        for seed, run in arms["grown"].items()
    }


def report(rows: list[dict[str, Any]], mark: str, words: Iterable[str], folder: Path | None = None) -> int:
    """Put the numbers into the README between the marks ``mark`` and ``end``; one that it has not yet is put at its end."""
    arms = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ("twin", "other order", "grown")}
    seeds = sorted(arms["twin"])
    worse = {seed: harm(arms["grown"][seed], arms["twin"][seed], "accuracy") for seed in seeds}
    over = beyond(arms["grown"], arms, "accuracy")
    likely = at_least(len(over), len(seeds), SHARE)
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]}, {' '.join(words)}; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.",
        "",
        f"By chance alone a run is worse than its twin by at most {limit_of(arms, 'accuracy'):.4f} (99 % quantile of the {2 * len(seeds)} "
        "differences).",
        f"Grown runs worse than their never-grown twin by more than that: **{len(over)} of {len(seeds)}**. "
        f"By chance alone {SHARE * len(seeds):.0f} would be expected, and {len(over)} or more have probability {likely:.3g} (binomial).",
        "",
        *_both(arms),
        "",
        "| kind | runs | germinated | kept | culled | rolled back | of these for slow harm | host returned | governor's rollbacks "
        "| stopped | worse by: median | 90 % | largest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(kind, [arms["grown"][s] for s in seeds if arms["grown"][s]["kind"] == kind], worse) for kind in KINDS),
        _line("all", list(arms["grown"].values()), worse),
    ]
    _put(folder or HERE, mark, lines)
    print("\n".join(lines))
    return 1 if len(over) > SHARE * len(seeds) else 0


def _both(arms: Arms) -> list[str]:
    """A row for what was trained, and one for what ``trainer.keep=better`` leaves of the same runs."""
    limits = {name: limit_of(arms, name) for name in ("accuracy", "loss")}
    told = ", ".join(f"{name} {limit:.4f}" for name, limit in limits.items())
    lines = [f"| beyond the limit ({told}) | by accuracy | by loss | never-grown host kept |", "|---|---|---|---|"]
    cases: list[tuple[str, dict[int, dict[str, Any]]]] = [("as trained", arms["grown"])]
    measured = all("primary" in run for run in arms["grown"].values())
    cases += [("with `trainer.keep=better`", better(arms))] if measured else []
    for name, runs in cases:
        counts = [f"{len(beyond(runs, arms, by))} of {len(runs)}" for by in limits]
        lines.append(f"| {name} | {' | '.join(counts)} | {sum(run['arm'] == 'twin' for run in runs.values())} |")
    if not measured:
        lines.append("| with `trainer.keep=better` | not measured | not measured | – |")
    return lines


def _put(folder: Path, mark: str, lines: list[str]) -> None:
    path = folder / "README.md"
    readme = path.read_text(encoding="utf-8") if path.exists() else ""
    if f"<!-- {mark} -->\n" not in readme:
        readme += f"\n## {mark}\n\n<!-- {mark} -->\n<!-- end -->\n"
    before, _, rest = readme.partition(f"<!-- {mark} -->\n")
    after = rest.partition("<!-- end -->")[2]
    path.write_text(before + f"<!-- {mark} -->\n" + "\n".join(lines) + "\n<!-- end -->" + after, encoding="utf-8")


def _line(kind: str, runs: list[dict[str, Any]], worse: dict[int, float]) -> str:
    values = torch.tensor([worse[run["seed"]] for run in runs]).double()
    sums = [sum(run[name] for run in runs) for name in (*COUNTS, *SAID, "rollbacks")]
    quantiles: Iterable[float] = (float(values.nanquantile(q)) for q in (0.5, 0.9, 1.0))
    cells = [kind, len(runs), *sums, sum(bool(run["stopped"]) for run in runs), *(f"{value:+.4f}" for value in quantiles)]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
