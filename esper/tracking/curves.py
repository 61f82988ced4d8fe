"""What trackers with curves show of a run beside MLflow: every metric, and means over the seeds of each site and stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from esper.extras import import_extra
from esper.messages import Alert, Message, Metrics, RunStarted, Telemetry
from esper.tracking.run_page import Point, SeedAverages


class Curves:
    """Turns messages into points, with the same names as in MLflow (``docs/tracking.md``)."""

    def __init__(self, points: int) -> None:
        self._averages = SeedAverages(points)
        self._alerts: Counter[str] = Counter()
        self.tick = 0

    def points(self, messages: Sequence[Message]) -> list[Point]:
        """The points of a batch of messages; ``tick`` is then the last tick that any of them is of."""
        found: list[Point] = []
        for message in messages:
            match message:
                case Metrics():
                    found += [(message.tick, name, value) for name, value in message.values.items()]
                case Telemetry():
                    found += self._averages.points(message)
                case RunStarted():
                    self._averages.set_length(message.total_ticks, message.tick)
                case Alert():
                    self._alerts[message.level] += 1
                    found.append((message.tick, f"alerts/{message.level}", float(self._alerts[message.level])))
            self.tick = max(self.tick, getattr(message, "tick", 0))
        return found


def import_now(module: str, option: str, figures: bool) -> None:
    """Import what the end of a run needs: the ``module`` of a tracker's library, which is an extra, and Matplotlib for ``figures``.

    Raises:
        UserError: the library is not installed, or cannot be imported.
    """
    import_extra(module, f"tracking={option}", f"esper-grow[{option}]", package=option)
    if figures:
        import matplotlib.figure  # noqa: F401
