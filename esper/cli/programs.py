"""The programs behind the first word of the command line, loaded when they are called.

Besides esper's own there are those that the user's ``esper.yaml`` names, each a function of an allowed package. Entry points of
installed packages would be simpler, but would let any package add a program without the user's decision.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from esper import user_code
from esper.config import did_you_mean, listing
from esper.errors import UserError

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Program:
    """``module:function`` that takes the words after the program's name and returns the exit code."""

    target: str
    help: str

    def load(self) -> Main:
        """The function."""
        module, function = self.target.split(":")
        main: Main = getattr(importlib.import_module(module), function)
        return main


@dataclass(frozen=True)
class OwnProgram(Program):
    """A program of the user's own, called ``name`` in ``esper.yaml``."""

    name: str

    def load(self) -> Main:
        """The function.

        Raises:
            UserError: as ``esper.user_code.locate``; a class, or an object that cannot be called.
        """
        key = f"programs.{self.name}"
        found: Any = user_code.locate(self.target, key)
        if isinstance(found, type) or not callable(found):
            kind = "class" if isinstance(found, type) else type(found).__name__
            raise UserError(f"{key}={self.target} is a {kind}; it must be a function that takes a list of words and returns the exit code.")
        main: Main = found
        return main


PROGRAMS: dict[str, Program] = {
    "list": Program("esper.inventory.list_command:main", "runs and sweeps with metric, status, cost and age: list status=failed newer=7d"),
    "show": Program("esper.inventory.show_command:main", "the end-of-run report, or a sweep's verdict, once more: show <run or sweep>"),
    "diff": Program("esper.inventory.diff_command:main", "configuration, environment and first difference of two runs: diff <run> <run>"),
    "watch": Program(
        "esper.watch.command:main", "seeds, gates, losses, alerts and time left of a run or sweep under way; --web: in a browser"
    ),
    "clean": Program("esper.inventory.clean_command:main", "what may go of the outputs and how much space that gives; asks first"),
    "export": Program("esper.cli.export:main", "a run's model for other programs: run=<folder> format=pt2|onnx|safetensors"),
    "compare": Program(
        "esper.compare.command:main", "judge a finished sweep again, or runs that any program made: sweep=<id>, or runs store=…"
    ),
    "control": Program("esper.bus.programs.controller:main", "decide for a run with controller.process=external: control <run folder>"),
    "track": Program("esper.bus.programs.tracker:main", "write the story of a run with tracking.process=external: track <run folder>"),
    "bus": Program("esper.bus.programs.inspect:main", "what is on a run's bus: bus status|tail|dead-letters|flush <run folder>"),
    "auto": Program("esper.auto.command:main", "a model of a size found by itself: budget=10min|1e13macs task=… [max_parameters=…]"),
    "learn": Program("esper.learn.command:main", "a policy for controller=policy from recorded runs: learn [runs …] to=<file>"),
    "check": Program("esper.cli.check:main", "train nothing: sites, stage schedule, estimated time and memory"),
}


def programs() -> dict[str, Program]:
    """esper's own programs and the user's, by name; nothing of them is imported.

    Raises:
        UserError: an ``esper.yaml`` that is not as it must be, or that gives a program the name of one of esper's own.
    """
    own = user_code.allowed().programs
    if taken := sorted(set(own) & set(PROGRAMS)):
        raise UserError(f"{user_code.FILE} calls a program {taken[0]}, and esper has one of that name; choose another.")
    return PROGRAMS | {name: OwnProgram(target, f"{target}, of {user_code.FILE}", name) for name, target in own.items()}


def named(arguments: Sequence[str]) -> Program | None:
    """The program that the first word names; None when it is an override or an option.

    Raises:
        UserError: a word that is neither.
    """
    if not arguments:
        return None
    word = arguments[0]
    known = programs()
    if word in known:
        return known[word]
    if word.isidentifier():
        first = f"{listing(known)}, or a setting such as seed=1"
        near = did_you_mean(word, known, otherwise="; esper --help lists all there is.")
        raise UserError(f"esper has no program '{word}': the first word is {first}{near}")
    return None
