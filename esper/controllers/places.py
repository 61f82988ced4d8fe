"""The seeds of a run as arrays: which of them may germinate, among a hundred thousand and in a fraction of a millisecond."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper.controllers.view import Seed
from esper.lifecycle.stages import Stage
from esper.messages import Message, RunStarted, Transition


class Places:
    """Stages of all seeds, int8 ``[seeds]``, site after site; ``first`` ``[sites + 1]`` is where each site's seeds begin.

    A site's description may carry ``stages`` where a run goes on from a checkpoint; a seed of which nothing was heard is DORMANT.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.first = np.zeros(1, np.int64)
        self.stage = np.zeros(0, np.int8)
        self.grows = np.zeros(0, bool)
        self.reseeds = np.zeros(0, bool)
        self._number: dict[str, int] = {}
        self._heard: dict[Seed, int] = {}
        self.active: set[Seed] = set()

    def observe(self, message: Message) -> None:
        """Take note of RunStarted and Transition."""
        if isinstance(message, RunStarted):
            self.names = [site["name"] for site in message.sites]
            self._number = {name: number for number, name in enumerate(self.names)}
            self.first = np.concatenate([[0], np.cumsum([site["seeds"] for site in message.sites])]).astype(np.int64)
            self.stage = np.zeros(self.first[-1], np.int8)
            self.grows = np.repeat([site.get("growth", True) for site in message.sites], np.diff(self.first))
            self.reseeds = np.repeat([site.get("reseed", False) for site in message.sites], np.diff(self.first))
            for site in message.sites:
                for number, stage in enumerate(site.get("stages", ())):
                    self._note((site["name"], number), stage)
            for seed, stage in list(self._heard.items()):
                self._note(seed, stage)
        elif isinstance(message, Transition):
            self._note((message.site, message.seed), message.target)

    def _note(self, seed: Seed, stage: int) -> None:
        if stage == Stage.DORMANT:
            self._heard.pop(seed, None)
        else:
            self._heard[seed] = stage
        (self.active.add if Stage.GERMINATED <= stage < Stage.FOSSILIZED else self.active.discard)(seed)
        if seed[0] in self._number and seed[1] >= 0:
            self.stage[self.row(seed)] = stage

    def row(self, seed: Seed) -> int:
        """Position of a seed in the arrays."""
        return int(self.first[self._number[seed[0]]]) + seed[1]

    def seed(self, row: int) -> Seed:
        """The seed at a position."""
        number = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.names[number], row - int(self.first[number])

    def free(self, unavailable: list[Seed]) -> np.ndarray:
        """Which seeds may germinate, bool ``[seeds]``: DORMANT ones where growth is on, without those given.

        FOSSILIZED ones too, where ``lifecycle.reseed`` allows them another generation.
        """
        free: np.ndarray = ((self.stage == Stage.DORMANT) | ((self.stage == Stage.FOSSILIZED) & self.reseeds)) & self.grows
        free[[self.row(seed) for seed in unavailable]] = False
        return free

    def state(self) -> dict[str, Any]:
        """JSON-able: the seeds that are not DORMANT."""
        return {"stages": [[*seed, stage] for seed, stage in self._heard.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the sites come again with RunStarted."""
        for site, seed, stage in state["stages"]:
            self._note((site, seed), stage)
