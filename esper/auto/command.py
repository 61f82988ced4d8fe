"""``esper auto task=… budget=10min|1e13macs``: a model of a size found by itself."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from esper.auto.config import AutoConfig, sorted_words
from esper.config import or_list
from esper.errors import UserError

if TYPE_CHECKING:
    from esper.auto.auto import Auto

USAGE = """\
usage: esper auto budget=10min|1e13macs [task=… model=… key=value …]

  budget          what may be spent: a time (90s, 10min, 2h), or MACs of training (1e13macs): then no result depends on the clock
  max_parameters  most parameters of the model; none: no limit
  gain            smallest improvement on validation, as a share of the best, for which a growth is kept (0.001)
  search          part of the budget that finds the optimizer's settings (0.3)
  to              folder of everything; none: one under outputs/auto

Every other word is a setting of its runs, as in task=folder task.path=photos, task=table task.path=data.csv task.target=column, seed=3,
model=cnn. auto decides how long each run lasts, what grows and when. Ctrl-C keeps the best model so far."""


def main(words: Sequence[str]) -> int:
    """Search for a size; exit code 0.

    Raises:
        UserError: words that are not accepted, or data that cannot be learnt; before anything is trained.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the best model so far and the report were written.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    prepared(words, Console()).run()
    return 0


def prepared(words: Sequence[str], console: Console) -> Auto:
    """The search that these words ask for, with its data read, its settings checked and its folder made.

    Raises:
        UserError: words that are not accepted, or data that cannot be learnt.
    """
    config, given = sorted_words(words)
    from esper.auto.auto import Auto
    from esper.auto.moves import start_words
    from esper.cli.compose import compose
    from esper.cli.overrides import parse

    for word in given:
        if parse([word])[0].is_sweep_override():
            key = word.partition("=")[0]
            raise UserError(f"{word} gives {key} several values, and esper auto makes no sweep: {or_list(word)}give one.")
    given += [] if any(word.startswith("tracking=") for word in given) else ["tracking=none"]
    base = compose([*given, "controller=none"])
    task = base.task.build()
    start = start_words(task, given)
    base = compose([*given, *start, "controller=none"])
    folder = _folder(config, base.output)
    return Auto(config, given, start, base, task, folder, console)


def _folder(config: AutoConfig, output: str) -> Path:
    """A new folder for everything."""
    now = datetime.now()
    made = Path(config.to) if config.to else Path(output) / "auto" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{secrets.token_hex(3)}"
    folder = made.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({str(error.strerror).lower()}); give another: to=….") from None
    if taken:
        raise UserError(f"to={made} has files in it already; give a new folder.")
    return folder
