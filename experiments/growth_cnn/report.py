"""Write the study of the grown CNN up: the gap that every way of growing recovers, and its share of the final net's MACs.

    python experiments/growth_cnn/report.py <folder of the sweep>

Writes findings.md, README.md, runs.csv, the results and figures beside itself, or into ``--out``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from esper.compare.statistics.estimates import gap_recovery

sys.path.append(str(Path(__file__).resolve().parents[1]))
from write_up import rows_of, write_up

GROWN = {"cnn_copy": "copies at 30 %", "cnn_zero_copy": "silenced copies at 30 %", "cnn_fresh": "new blocks at 30 %"}
GROWN |= {"cnn_late": "copies at 50 %", "cnn_deep_macs": "the final net from scratch, at the MACs of `cnn_copy`"}
Arms = dict[str, dict[int, dict[str, Any]]]
"""Arm → seed → row."""


def findings(arms: Arms) -> str:
    """The table of gap recovery, over the seeds that a way of growing shares with the small host and the final net."""
    lines = ["| | MACs of the final net | gap recovered | 95 % interval | pairs |", "|---|---|---|---|---|"]
    small, final = arms["cnn_small"], arms["cnn_deep"]
    for arm, name in GROWN.items():
        seeds = sorted(small.keys() & final.keys() & arms[arm].keys())
        if len(seeds) < 2:
            lines.append(f"| {name} | – | – | – | {len(seeds)} |")
            continue
        found = gap_recovery(*(np.array([one[seed]["test/accuracy"] for seed in seeds]) for one in (small, final, arms[arm])))
        share = np.mean([arms[arm][seed]["macs"] / final[seed]["macs"] for seed in seeds])
        low, high = found.value_interval
        told = f"{found.value:.0%} | {low:.0%} to {high:.0%}" if found.known else "not known: the gap may be nothing | –"
        lines.append(f"| {name} | {share:.0%} | {told} | {len(seeds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "question.md").exists():
        shutil.copy(Path(__file__).with_name("question.md"), given.out)
    arms: Arms = defaultdict(dict)
    for row in rows_of(given.sweep):
        if row["kind"] == "compared" and row["status"] == "FINISHED":
            arms[row["arm"]][int(row["seed"])] = row
    (given.out / "findings.md").write_text(findings(arms) + "\n")
    write_up(given.sweep, given.out)


if __name__ == "__main__":
    main()
