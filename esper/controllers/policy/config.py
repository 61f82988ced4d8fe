"""The settings of ``controller=policy``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.controllers.view import check_duration
from esper.errors import UserError
from esper.processes import ControllerPlace
from esper.setting_fields import setting

if TYPE_CHECKING:
    from esper.controllers.policy.controller import PolicyController


@dataclass
class PolicyConfig(ControllerPlace):
    """The network's file, when it decides, the limits within which it does, and when it is believed no longer."""

    name: str = "policy"
    weights: str = setting("", help="the file that esper learn wrote")
    temperature: float = setting(1.0, low=0.0, high=10.0, help="spread of the choices; 0: always the likeliest")
    germinate_at: str = setting("10%", unit="duration", help="time of the first decision")
    every: str = setting("5%", unit="duration", help="time between two decisions")
    until: str = setting("50%", unit="duration", help="no germination after this: growing late does less")
    count: int = setting(2, low=1, high=1000, unit="actions", help="most germinations and stops of one decision")
    most: int = setting(0, low=0, unit="seeds", help="germinations of the whole run, at most; 0: no limit")
    max_active: int = setting(4, low=1, unit="seeds", help="most seeds between GERMINATED and FINE_TUNING at a time")
    max_parameters: int = setting(0, low=0, help="most parameters that all branches may add; 0: no limit")
    max_growth: float = setting(0.0, low=0.0, unit="hosts", help="the same as a multiple of the host's; 0: no limit")
    blueprints: list[str] = setting([], help="what may germinate; empty: all that the network knows and the run has")
    strategies: list[str] = setting([], help="how it may be blended in; empty: all that the network knows")
    objectives: list[str] = setting([], help="what it may learn from in TRAINING; empty: all that the network knows and the run can")
    rise: float = setting(0.5, low=0.0, help="nothing germinates while the validation loss is above its best by more than this share of it")
    ends: int = setting(8, low=1, high=10**6, unit="branches", help="the last branches by which its predictions are judged")
    tolerance: float = setting(3.0, low=0.0, help="times its error on unseen runs at which the heuristic takes over")
    embargo: str = setting("10%", unit="duration", help="how long a refused or culled seed rests, and all seeds after a rollback")

    def build(self, seed: int) -> PolicyController:
        """The controller; it draws from its own generator, a function of the run's random ``seed``.

        Raises:
            UserError: a duration in epochs, a word that the network does not know, a file that is missing or no policy's.
        """
        from esper.controllers.policy.controller import PolicyController
        from esper.controllers.policy.weights import read_file

        for text in (self.germinate_at, self.every, self.until, self.embargo):
            check_duration(text)
        policy = read_file(self.weights)
        known = policy.network.words
        for key, there in (("blueprints", known.blueprint), ("strategies", known.strategy), ("objectives", known.objective)):
            for name in getattr(self, key):
                if name not in there:
                    raise UserError(
                        f"controller.{key} names '{name}', of which controller.weights={self.weights} knows nothing; "
                        f"it knows {', '.join(there)}."
                    )
        return PolicyController(self, seed, policy)
