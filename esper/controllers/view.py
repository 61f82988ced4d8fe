"""A controller's view of a run, gathered from messages alone."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from esper.errors import UserError
from esper.lifecycle.duration import parse
from esper.lifecycle.stages import Stage
from esper.messages import Message, RunStarted, Transition

#: Site and seed number.
Seed = tuple[str, int]

#: Stages in which a seed has a branch that is not yet kept for good.
ACTIVE = range(Stage.GERMINATED, Stage.FOSSILIZED)
#: Stages that end a branch without keeping it.
LOST = (Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK)


class RunView:
    """Sites, length and stages of the run whose messages it hears.

    A site's dict may carry ``stages``, one number a seed, where a run goes on from a checkpoint; a seed of which
    nothing was heard is DORMANT.
    """

    def __init__(self) -> None:
        self.total_ticks = 0
        self.sites: dict[str, dict[str, Any]] = {}
        self.stages: dict[Seed, int] = {}

    @property
    def started(self) -> bool:
        """Whether RunStarted was heard."""
        return self.total_ticks > 0

    def observe(self, message: Message) -> None:
        """Take note of RunStarted and Transition."""
        if isinstance(message, RunStarted):
            self.total_ticks = message.total_ticks
            self.sites = {site["name"]: site for site in message.sites}
            for name, site in self.sites.items():
                for seed in range(site["seeds"]):
                    known = self.stages.get((name, seed), int(Stage.DORMANT))
                    self.stages[name, seed] = site["stages"][seed] if "stages" in site else known
        elif isinstance(message, Transition):
            self.stages[message.site, message.seed] = message.target

    def seeds(self, site: str = "*", stage: int | None = None) -> list[Seed]:
        """Seeds of the sites that match the glob, in the order of the sites, that are in ``stage`` (None: in any).

        Of DORMANT ones those that may germinate: a site at which growth is off has none, and where ``lifecycle.reseed`` lets a fossilized
        seed germinate again, it is among them.
        """
        return [
            (name, seed)
            for name, described in self.sites.items()
            if fnmatchcase(name, site)
            for seed in range(described["seeds"])
            if stage is None or self.stages[name, seed] == stage or (stage == Stage.DORMANT and self._reseeded(name, seed))
            if stage != Stage.DORMANT or described.get("growth", True)
        ]

    def _reseeded(self, site: str, seed: int) -> bool:
        return self.stages[site, seed] == Stage.FOSSILIZED and bool(self.sites[site].get("reseed", False))

    def matching(self, site: str) -> list[dict[str, Any]]:
        """The descriptions of the sites that the glob of ``controller.site`` matches; raises UserError when it matches none."""
        found = [described for name, described in self.sites.items() if fnmatchcase(name, site)]
        if not found:
            raise UserError(f"controller.site={site} matches no site; there are: {', '.join(self.sites) or 'none'}.")
        return found

    def active(self) -> list[Seed]:
        """Seeds whose branch is under way: GERMINATED to FINE_TUNING."""
        return [seed for seed, stage in self.stages.items() if stage in ACTIVE]

    @property
    def last_decision(self) -> int:
        """The last tick whose commands are still applied, at the next."""
        return self.total_ticks - 1

    def ticks(self, text: str) -> int:
        """A duration in ticks of this run; raises UserError for epochs, because no message contains their length."""
        check_duration(text)
        return parse(text).ticks(self.total_ticks, 0)

    def state(self) -> dict[str, Any]:
        """JSON-able; the sites come again with RunStarted."""
        return {"stages": [[*seed, stage] for seed, stage in self.stages.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.stages = {(site, seed): stage for site, seed, stage in state["stages"]}


def refuse_unfitting(sites: Iterable[dict[str, Any]], blueprint: str, where: str) -> None:
    """Raise UserError when ``blueprint`` (empty: the run's own) fits none of these sites; ``where`` names them in words."""
    sites = list(sites)
    if any((blueprint or site["blueprint"]) in site["blueprints"] for site in sites):
        return
    fitting = sorted({name for site in sites for name in site["blueprints"]})
    what = f"controller.blueprint={blueprint}" if blueprint else "The run's blueprint"
    raise UserError(f"{what} fits no site {where}; blueprints that do: {', '.join(fitting) or 'none'}.")


def check_times(germinate_at: str, until: str, started: RunStarted) -> None:
    """Raise UserError where the first decision or the first telemetry would come after the last germination."""
    total = started.total_ticks
    first, last = (parse(text).ticks(total, 0) for text in (germinate_at, until))
    last = min(last, total - 1)
    end = f"nothing germinates after tick {last} of {total} (controller.until={until}), so nothing ever would"
    if first > last:
        raise UserError(f"controller.germinate_at={germinate_at} is tick {first}, and {end}; give an earlier time, or a later until.")
    if (heard := min(site["telemetry_every"] for site in started.sites)) > last:
        raise UserError(f"The first telemetry comes at tick {heard} (telemetry.every), and {end}; lower telemetry.every.")


def check_duration(text: str) -> None:
    """Raise UserError unless ``text`` is a duration in steps or percent."""
    if parse(text).unit == "epoch":
        raise UserError(f"A controller cannot see epochs, so '{text}' tells it nothing; write for example 50step or 5%.")
