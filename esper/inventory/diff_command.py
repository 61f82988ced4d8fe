"""``esper diff A B``: what two runs differ in, and where they part."""

from __future__ import annotations

from collections.abc import Sequence

from esper.compare.fingerprint import Difference, explain, same_bits
from esper.errors import UserError
from esper.inventory.find import read_targets, run_folder
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary

USAGE = """\
usage: esper diff <run> <run> [output=…] [uri=…]   what two runs differ in, and where they part

  Says which settings, data and parts of the environment differ; if the bits do too, the first tick at which a recorded metric does, the
  first seed and tick at which the telemetry does, and the first weights. A run that has not ended is compared as far as it came.
  A run is named by its folder, its name or its id, as esper list shows them.

Exit code 0 for the same bits, 1 for different ones, or where a run has not ended."""


def main(words: Sequence[str]) -> int:
    """Print the differences that ``explain`` finds."""
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    names, given = read_targets(words, "esper diff", 2)
    if len(names) != 2:
        raise UserError("esper diff takes two runs: esper diff <run> <run>, each a folder, a name or an id that esper list shows.")
    first, second = (run_folder(name, given, "esper diff") for name in names)
    differences = list(explain(first, second))
    if same_bits(first, second):
        print(f"same bits: {read_summary(first)['fingerprint']}")
        print("\n".join(f"  although the {one.kind} differs: {one.text}" for one in differences))
        return 0
    under_way = [str(folder) for folder in (first, second) if not (folder / SUMMARY).exists()]
    print(f"no end yet of {' and '.join(under_way)}; so far:" if under_way else "not the same bits")
    print("\n".join(_lines(differences)) or "  no difference", flush=True)
    return 1


def _lines(differences: Sequence[Difference]) -> list[str]:
    """A line a difference, below the name of its kind where there are several."""
    lines: list[str] = []
    for kind in dict.fromkeys(one.kind for one in differences):
        texts = [one.text for one in differences if one.kind == kind]
        lines += [f"  {kind}: {texts[0]}"] if len(texts) == 1 else [f"  {kind}:", *(f"    {text}" for text in texts)]
    return lines
