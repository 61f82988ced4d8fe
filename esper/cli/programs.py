"""The programs behind the first word of the command line, loaded when they are called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.config import listing, nearest
from esper.errors import UserError


@dataclass(frozen=True)
class Program:
    """``module:function`` that takes the words after the program's name and returns the exit code."""

    target: str
    help: str

    def load(self) -> Callable[[Sequence[str]], int]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


PROGRAMS: dict[str, Program] = {
    "export": Program("esper.running.export:main", "a run's model for other programs: run=<folder> format=pt2|onnx|safetensors"),
    "compare": Program("esper.compare.command:main", "judge a finished sweep again, from the store alone: sweep=<id>"),
    "control": Program("esper.bus.programs.controller:main", "decide for a run with controller.process=external: control <run folder>"),
    "track": Program("esper.bus.programs.tracker:main", "write the story of a run with tracking.process=external: track <run folder>"),
    "bus": Program("esper.bus.programs.inspect:main", "what is on a run's bus: bus status|tail|dead-letters|flush <run folder>"),
    "check": Program("esper.cli.check:main", "train nothing: sites, stage schedule, estimated time and memory"),
}


def named(arguments: Sequence[str]) -> Program | None:
    """The program that the first word names; None when it is an override or an option.

    Raises:
        UserError: a word that is neither.
    """
    if not arguments:
        return None
    word = arguments[0]
    if word in PROGRAMS:
        return PROGRAMS[word]
    if word.isidentifier():
        first = f"{listing(PROGRAMS)}, or a setting such as seed=1"
        near = nearest(word, PROGRAMS) or "; esper --help lists all there is"
        raise UserError(f"esper has no program '{word}': the first word is {first}{near}.")
    return None
