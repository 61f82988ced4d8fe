"""A controller of one's own: it hears every message of a run and answers each tick with commands."""

from esper.messages import Germinate, RunStarted, Transition


class Gardener:
    """Germinates one seed every ``every`` ticks, site after site, and stops at the first fossil."""

    def __init__(self, every: int = 20, most: int = 3) -> None:
        self.every, self.most = every, most
        self.sites: list[str] = []
        self.sent, self.done = 0, False

    def observe(self, message) -> None:
        if isinstance(message, RunStarted):
            self.sites = [site["name"] for site in message.sites]
        if isinstance(message, Transition) and message.target == 7:  # FOSSILIZED
            self.done = True

    def decide(self, tick: int) -> list:
        if self.done or tick % self.every or self.sent == self.most:
            return []
        self.sent += 1
        return [Germinate(id=f"gardener-{tick}", site=self.sites[self.sent % len(self.sites)], seed=self.sent // len(self.sites))]

    def state(self) -> dict:
        return {"sites": self.sites, "sent": self.sent, "done": self.done}

    def load_state(self, state: dict) -> None:
        self.sites, self.sent, self.done = state["sites"], state["sent"], state["done"]
