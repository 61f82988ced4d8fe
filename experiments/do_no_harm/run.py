"""Does a hostile seed harm the host? Runs under random commands against their never-grown twins.

First the never-grown runs: every seed twice, with the same initial weights and another order of the data. The 99 % quantile
of what the one is worse than the other is what chance alone does. Then every seed once more with hostile blueprints under
random commands. Held out is the mean of validation and test accuracy. Writes ``results.csv`` and the README's table; with
``--first`` above 0, ``fresh.csv`` and the README's second table, of seeds that nothing was made with in mind; with another
``--host`` than the mlp, ``results-<host>.csv`` or ``fresh-<host>.csv`` and a table of its own, by the limit of that host's own twins.
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
from esper.training.trainer import Growth, Trainer  # noqa: E402

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
FIELDS = ("arm", "seed", "kind", "strategy", "accuracy", "loss", *COUNTS, *SAID, "rollbacks", "stopped")
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
    counts = {name: trainer.grow.life.counts[name] for name in COUNTS}
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
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, task = prepared(WORDS, options.host)
    rows = []
    for arm, shift in (("twin", 0), ("other order", 1_000_000), ("grown", 0)):
        for number in range(options.runs):
            seed = options.first + number
            rows.append(one(config, task, seed, seed + shift, arm))
            if number % 20 == 19:
                print(f"{arm}: {number + 1} of {options.runs}", file=sys.stderr, flush=True)
    mark = ("fresh" if options.first else "results") + ("" if options.host == "mlp" else f"-{options.host}")
    with (HERE / f"{mark}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "accuracy": f"{row['accuracy']:.5f}", "loss": f"{row['loss']:.5f}"} for row in rows)
    return report(rows, mark, (*WORDS, *HOSTS[options.host]))


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


def report(rows: list[dict[str, Any]], mark: str, words: Iterable[str]) -> int:
    """Put the numbers into the README between the marks ``mark`` and ``end``; one that it has not yet is put at its end."""
    by_arm = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ("twin", "other order", "grown")}
    seeds = sorted(by_arm["twin"])
    chance = torch.tensor([by_arm["twin"][s]["accuracy"] - by_arm["other order"][s]["accuracy"] for s in seeds]).double()
    limit = float(torch.quantile(torch.cat([chance, -chance]), 1.0 - SHARE))
    worse = {s: by_arm["twin"][s]["accuracy"] - by_arm["grown"][s]["accuracy"] for s in seeds}
    over = [s for s in seeds if not worse[s] <= limit]
    likely = at_least(len(over), len(seeds), SHARE)
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]}, {' '.join(words)}; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.",
        "",
        f"By chance alone a run is worse than its twin by at most {limit:.4f} (99 % quantile of the {2 * len(seeds)} differences).",
        f"Grown runs worse than their never-grown twin by more than that: **{len(over)} of {len(seeds)}**. "
        f"By chance alone {SHARE * len(seeds):.0f} would be expected, and {len(over)} or more have probability {likely:.3g} (binomial).",
        "",
        "| kind | runs | germinated | kept | culled | rolled back | of these for slow harm | host returned | governor's rollbacks "
        "| stopped | worse by: median | 90 % | largest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(kind, [by_arm["grown"][s] for s in seeds if by_arm["grown"][s]["kind"] == kind], worse) for kind in KINDS),
        _line("all", list(by_arm["grown"].values()), worse),
    ]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    if f"<!-- {mark} -->\n" not in readme:
        readme += f"\n## {mark}\n\n<!-- {mark} -->\n<!-- end -->\n"
    before, _, rest = readme.partition(f"<!-- {mark} -->\n")
    after = rest.partition("<!-- end -->")[2]
    (HERE / "README.md").write_text(before + f"<!-- {mark} -->\n" + "\n".join(lines) + "\n<!-- end -->" + after, encoding="utf-8")
    print("\n".join(lines))
    return 1 if len(over) > SHARE * len(seeds) else 0


def _line(kind: str, runs: list[dict[str, Any]], worse: dict[int, float]) -> str:
    values = torch.tensor([worse[run["seed"]] for run in runs]).double()
    sums = [sum(run[name] for run in runs) for name in (*COUNTS, *SAID, "rollbacks")]
    quantiles: Iterable[float] = (float(values.nanquantile(q)) for q in (0.5, 0.9, 1.0))
    cells = [kind, len(runs), *sums, sum(bool(run["stopped"]) for run in runs), *(f"{value:+.4f}" for value in quantiles)]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
