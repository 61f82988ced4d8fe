"""``esper --help``, from the files under ``conf/`` alone: no heavy import."""

from __future__ import annotations

import textwrap

from esper.cli import conf
from esper.cli.programs import programs
from esper.config import PRESETS

ABOUT = "neural networks that grow while they train, and proof of whether growing paid"

USAGE = """\
usage: esper [overrides]            train one run (same as python -m esper)
       esper --multirun [overrides] sweep: model=mlp,cnn seed=0,1,2
       esper PROGRAM [arguments]    another program
       esper OPTION                 --version; --hydra-help; --shell-completion install=bash (or zsh, fish) to eval
"""

RECIPES = {
    "esper": "the default run",
    "esper check model=cnn": "look before training",
    "esper task=mnist1d seed=3 trainer.device=cpu": "another task, random seed and device",
    "esper model.width=16 lifecycle.training_min=5%": "any key of a group",
    "esper --multirun grafting=linear,drift seed=0,1,2": "six runs under outputs/sweeps",
    "esper --cfg job grafting=adaptive": "print the composed configuration and stop",
}


def text() -> str:
    """Everything ``--help`` prints."""
    chosen = conf.defaults()
    lines = [f"esper: {ABOUT}", "", USAGE, "Programs:"]
    lines += [f"  {name:<12} {program.help}" for name, program in programs().items()]
    lines += ["", "Groups (* is the default; esper --cfg job prints every key):"]
    for group, names in conf.groups().items():
        if group not in PRESETS:
            lines += _row(group, [f"{name}*" if name == chosen.get(group) else name for name in names])
    lines += ["", "Files that set several groups at once:"]
    for preset in PRESETS:
        lines += _row(preset, conf.options(preset) or ["none yet"])
    lines += ["", "Keys of their own:"]
    lines += [f"  {key:<12} {value!r} unless set" for key, value in conf.root_keys().items()]
    lines += ["", "Recipes:", *(f"  {command:<52} {what}" for command, what in RECIPES.items())]
    return "\n".join(lines)


def _row(name: str, words: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 100, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15)
