"""The search for a size: a first small model, settings of the optimizer, then growth for as long as it pays and the budget lasts."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.auto.attempts import DEAR, FAILED, FINISHED, LARGE, PRUNED, Attempt, Limits, Purse, attempt, tested
from esper.auto.config import MACS, AutoConfig, amount
from esper.auto.moves import (
    HOSTS,
    LARGER,
    LENGTH,
    TRAIN,
    Growth,
    growth_of,
    growth_space,
    growth_words,
    host_words,
    kinds_of,
    larger_host,
    scaled,
    settings_space,
)
from esper.auto.report import Report, show, write_report
from esper.auto.stopping import Stop, stopping
from esper.config import RootConfig
from esper.errors import UserError
from esper.export.saved_model import FOLDER as MODEL
from esper.search.config import SearchConfig
from esper.search.study import Study
from esper.tasks.base import Task

FIRST_STEPS = 100  # of the first model, and the fewest of any: fewer teach nothing about a setting
EPOCHS, LEAST_CAP = 30, 1000  # an attempt is no longer than so many epochs, or steps where those are fewer
TRIALS = (4, 12)  # of the optimizer's settings
MEAN_LENGTH = 0.5  # of the steps that an attempt may have, as it is drawn
ROUNDS = 8  # attempts that the rest of the budget is thought to last for
MISSES = 3  # attempts of every kind, all in a row, after which nothing pays any more
LOSS_FALL = 0.01  # share by which the loss must fall where the metric itself cannot tell
HEADS = 2  # attention heads of a growth
GROWN, DEARER = 2.0, 1.5  # what a step of a growth is thought to cost at first, and how many times that it may
ROOM = 0.95  # of what is left may be planned with: judging costs too
STATE = "auto.json"
BROKE, STOPPED, REFUSED = "it broke", "it was stopped", "it was refused"
FIRST, SETTINGS, GROW = "first", "settings", "grow"


@dataclass
class Auto:
    """One search for a size.

    Args:
        config: auto's own settings.
        given: the words of the runs.
        start: further words, of the first model.
        base: the configuration that these words make.
        task: the data, for the choice of the first model.
        folder: of everything.
    """

    config: AutoConfig
    given: list[str]
    start: list[str]
    base: RootConfig
    task: Task
    folder: Path
    console: Console
    attempts: list[Attempt] = field(default_factory=list)
    path: list[Attempt] = field(default_factory=list)
    ended: str = BROKE
    test: dict[str, float] = field(default_factory=dict)
    widened: int = 0

    def __post_init__(self) -> None:
        self.purse = Purse(amount(self.config.budget))
        self.model, self.host = self.base.model, self.start  # the best one's host, without what grew in it
        self.kinds = kinds_of(self.model.name)
        self.settings: dict[str, str] = {}
        self.weights = {TRAIN: 1.0, LARGER: GROWN**2}  # what a step of each kind costs, in steps of the model that it starts from
        self.misses = 0
        self.stop = Stop()
        metric = self.task.metrics[self.task.primary]
        self.direction, self.sign = metric.direction, 1.0 if metric.direction == "max" else -1.0

    @property
    def best(self) -> Attempt | None:
        """The best model so far."""
        return self.path[-1] if self.path else None

    def run(self) -> Report:
        """Search until the budget is spent or nothing pays any more. However it ends, the best model so far and the report are left.

        Raises:
            UserError: not even the first model could be trained.
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        try:
            with stopping() as self.stop:
                self._first()
                self._search_settings()
                self._grow()
                self.stop.check()
        except UserError:
            self.ended = REFUSED
            raise
        except KeyboardInterrupt as stop:
            self.ended = STOPPED
            stop.args = (str(self.folder),) if self.path else ()  # for the sentence that names the folder
            raise
        finally:
            report = self._leave()
        return report

    # --- the three phases ---

    def _first(self) -> None:
        """A first model as soon as there can be one; it also tells what a step costs."""
        one = self._attempt(FIRST, "the first model", [], FIRST_STEPS, {})
        if one.state == LARGE:
            smaller = f": {key_of(host_words(self.model)[0])}=…" if self.model.name in HOSTS else ""
            raise UserError(f"The first model has {one.why}; allow more parameters, or give a smaller model{smaller}.")
        if one.state == FAILED:
            raise UserError(one.why)
        if one.state != FINISHED:
            raise UserError(
                f"budget={self.config.budget} is spent before the first model has made {FIRST_STEPS} steps: {one.reached} of them took "
                f"{self._shown(self.purse.spent)}; give more."
            )
        self._keep(one)

    def _search_settings(self) -> None:
        """The optimizer's settings, by Optuna; trials that fall behind end early."""
        room, cost = self.config.search * self.purse.amount.value, self._step_cost(1.0)
        trials = max(TRIALS[0], min(TRIALS[1], int(room / (MEAN_LENGTH * self._cap() * cost))))
        most = self._fitting(room / trials / MEAN_LENGTH, 1.0)
        settings = SearchConfig(n_trials=trials, startup=max(3, trials // 3), prune_trials=2, seed=self.base.seed)
        study = Study(settings_space(self.given), settings, [self.direction])
        end = self.purse.spent + room
        for _ in range(trials):
            proposal = study.ask()
            steps = max(FIRST_STEPS, round(float(proposal.values[LENGTH]) * most))
            if self.purse.spent + steps * cost > min(end, self.purse.amount.value):
                return
            values = scaled(proposal.values, 1.0, self.given)
            falls = partial(study.report, proposal.number)
            one = self._attempt(SETTINGS, _told(values), [], steps, values, falls)
            if one.state == PRUNED:
                study.prune(proposal.number)
            else:
                study.finish(proposal.number, [one.quality])
            if self._improves(one, 0.0):
                self.settings = values
                self._keep(one)

    def _grow(self) -> None:
        """Go on from the best model in one of the ways that it bears, as Optuna proposes; what pays is kept."""
        study = self._growth_study()
        while True:
            best = self.best
            assert best is not None
            if self.misses >= len(self.kinds) * MISSES:
                self.ended = (
                    f"nothing pays any more: {self.misses} attempts in a row did not improve validation by {self.config.gain:.2g} of it"
                )
                return
            proposal = study.ask()
            growth = growth_of(proposal.values)
            weight = self.weights.get(growth.kind, GROWN)
            most = self._fitting(self.purse.left / ROUNDS / MEAN_LENGTH, weight)
            steps = max(FIRST_STEPS, round(growth.length * most))
            if ROOM * self.purse.left < steps * self._step_cost(weight):
                last = int(ROOM * self.purse.left / self._step_cost(1.0))
                if last < FIRST_STEPS or growth.kind == TRAIN:
                    self.ended = "the budget is spent"
                    return
                growth, steps = Growth(TRAIN, growth.factor, 1.0), min(last, self._cap())  # what no growth fits into
            one = self._grown(growth, steps, best)
            if one.state == LARGE or (
                one.state == FAILED and one.macs == 0.0
            ):  # this model, or the limit, does not bear it: nor will a later
                self.kinds.remove(growth.kind)
                self._tell(one)
                study = self._growth_study()
                continue
            self._learn_cost(growth.kind, one, best)
            study.finish(proposal.number, [self._gained(one)])
            if one.state == DEAR:  # now its cost is known: the same again, in as many steps as there is room for
                study.suggest({"grow": growth.kind, "factor": growth.factor, LENGTH: growth.length})
            if self._improves(one, self.config.gain):
                self._keep(one)
                self._follow(growth, one)
                self.misses = 0
            elif one.state != DEAR:
                self.misses += 1

    def _learn_cost(self, kind: str, one: Attempt, parent: Attempt) -> None:
        """Remember how many times its parent's step such a growth's step costs."""
        if one.reached and one.macs:
            self.weights[kind] = max(1.0, one.macs / one.reached / parent.macs_a_step)

    def _growth_study(self) -> Study:
        """Learns which ways to grow pay; every way is tried gently and in full before it chooses."""
        settings = SearchConfig(n_trials=10**6, startup=len(self.kinds) + 2, seed=self.base.seed)
        study = Study(growth_space(self.kinds), settings, ["max"])
        for factor in (0.5, 1.0):
            for kind in self.kinds if factor < 1 else self.kinds[:-1]:
                study.suggest({"grow": kind, "factor": factor, LENGTH: factor})
        return study

    def _grown(self, growth: Growth, steps: int, best: Attempt) -> Attempt:
        """An attempt that goes on from the best model, or begins anew with a host that is larger than it."""
        host = list(self.host)
        if growth.kind == LARGER:
            self.next, _ = larger_host(self.base.model, self.task, best.parameters)
            words = host_words(self.next)
            host = [*(word for word in host if key_of(word) != key_of(words[0])), *words]
        words = growth_words(growth, self.model, self.widened, HEADS)
        return self._attempt(GROW, growth.kind, words, steps, scaled(self.settings, growth.factor, self.given), None, best, host)

    def _follow(self, growth: Growth, one: Attempt) -> None:
        """What was kept is what the next attempts go on from."""
        self.widened += growth.kind == "width"
        if growth.kind == LARGER:
            self.model, self.host, self.widened = self.next, one.host, 0

    # --- one attempt ---

    def _attempt(
        self,
        phase: str,
        what: str,
        words: Sequence[str],
        steps: int,
        values: dict[str, str],
        falls: Any = None,
        parent: Attempt | None = None,
        host: Sequence[str] = (),
    ) -> Attempt:
        """Run and note one attempt; ``host`` are the words of its host, by default those of the best model's."""
        number = len(self.attempts)
        folder = self.folder / "attempts" / str(number)
        host = list(host or self.host)
        own = self._all_words(host)
        every = [*own, *words, *(f"{key}={text}" for key, text in values.items() if f"{key}={text}" not in own)]
        every += [f"trainer.steps={steps}", "trainer.checkpoint_every=", f"seed={(self.base.seed + number) % 2**32}"]
        every += [] if words else ["controller=none"]
        every += [] if parent is None or what == LARGER else [f"model.weights={parent.folder}"]
        most = math.inf if parent is None else DEARER * self.weights.get(what, GROWN) * steps * parent.macs_a_step
        limits = Limits(self.purse, self.config.max_parameters, most, self.stop, falls or (lambda step, value: False))
        self.stop.check()
        one = Attempt(number, phase, what, -1 if parent is None else parent.number, str(folder), values=dict(values), host=host)
        self.attempts.append(one)
        attempt(one, every, limits)
        return one

    def _all_words(self, host: Sequence[str]) -> list[str]:
        """The user's words with those of a host in the place of its own, and without the random seed."""
        keys = {"seed", *map(key_of, host)}
        return [*(word for word in self.given if key_of(word) not in keys), *host]

    def _keep(self, one: Attempt) -> None:
        one.kept = True
        self.path.append(one)
        self._tell(one)
        self._save()

    def _improves(self, one: Attempt, gain: float) -> bool:
        """Whether an attempt is better than the best; says what came of it where it is not.

        It is where the metric is better by more than ``gain`` of it. An accuracy on few samples cannot tell so little: within half its
        standard error the loss decides.
        """
        gained, best = self._gained(one), self.best
        assert best is not None
        alike = one.state == FINISHED and gained * abs(best.quality) > -self._noise(best.quality)
        better = gained > gain or (alike and one.loss < (1 - max(gain, LOSS_FALL)) * best.loss)
        if not better:
            self._tell(one)
            self._save()
        return better

    def _noise(self, quality: float) -> float:
        """Half the standard error of an accuracy on the rows that choose; 0 for other metrics."""
        if self.task.primary != "accuracy":
            return 0.0
        rows = len(self.task.validation) + len(self.task.judge)  # type: ignore[arg-type]
        return 0.5 * math.sqrt(max(0.0, quality * (1 - quality)) / rows)

    def _gained(self, one: Attempt) -> float:
        """The improvement over the best model so far, as a share of it; NaN where there is no number."""
        assert self.best is not None
        if one.state != FINISHED:
            return math.nan
        return self.sign * (one.quality - self.best.quality) / max(abs(self.best.quality), 1e-9)

    # --- what things cost ---

    def _step_cost(self, weight: float) -> float:
        """What a step of the best model costs in the budget's unit, times ``weight`` for what is to grow."""
        best = self.best
        assert best is not None
        paid = best.macs if self.purse.amount.unit == MACS else best.seconds
        return weight * best.fuller * paid / max(1, best.steps)

    def _cap(self) -> int:
        return max(LEAST_CAP, EPOCHS * int(self.base.trainer.steps_per_epoch(len(self.task.train))))  # type: ignore[arg-type]

    def _fitting(self, room: float, weight: float) -> int:
        """Steps that fit into so much of the budget, within what is useful."""
        return int(max(FIRST_STEPS, min(self._cap(), room / self._step_cost(weight))))

    def _shown(self, value: float) -> str:
        return f"{value:.3g} MACs" if self.purse.amount.unit == MACS else f"{value:.0f} s"

    # --- what is left ---

    def _tell(self, one: Attempt) -> None:
        done = min(1.0, self.purse.spent / self.purse.amount.value)
        size = "" if math.isnan(one.parameters) else f", {one.parameters:,.0f} parameters"
        came = f"{self.task.primary} {one.quality:.4g}{size}" if one.state == FINISHED else f"{one.state}: {one.why}"
        kept = ", kept" if one.kept else ""
        line = f"{one.number} {one.phase}, {one.what}: {came}{kept} ({done:.0%} of the budget)"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _report(self) -> Report:
        words = self._all_words(self.host)
        spent = self.purse.amount, self.purse.spent, self.ended
        return Report(self.task.primary, self.direction, *spent, self.attempts, self.path, words, self.test)

    def _save(self) -> None:
        """``auto.json``, replaced whole: after a kill it names the folder of the best model."""
        report = self._report()
        partial = self.folder / f".{STATE}"
        partial.write_text(json.dumps(report.plain() | {"config": asdict(self.config)}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / STATE)

    def _leave(self) -> Report:
        """The best model, its one look at the test set, the report and its figure; without a model nothing is left."""
        if self.best is None and self.ended != BROKE:
            shutil.rmtree(self.folder / "attempts", ignore_errors=True)
            if not self.config.to:
                self.folder.rmdir()
            return self._report()
        if self.best is not None:
            shutil.copytree(Path(self.best.folder) / MODEL, self.folder / MODEL, dirs_exist_ok=True)
            self.test = tested(self._all_words(self.host), self.task, self.folder / MODEL)
        report = self._report()
        self._save()
        if self.best is not None:
            write_report(report, self.folder)
            show(report, self.folder, self.console)
        return report


def key_of(word: str) -> str:
    """The setting that a word is for."""
    return word.partition("=")[0]


def _told(values: dict[str, str]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={text}" for key, text in values.items() if not key.endswith("branch_lr"))
