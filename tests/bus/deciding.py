"""A controller that decides the same at every tick, and what is said to it and heard of it."""

from __future__ import annotations

import time

import torch

from esper.messages import Decided, Germinate, RunEnded, Telemetry, TickEnded

COLUMNS = ("a", "b", "c")


class Germinator:
    """Decides to germinate seed ``tick`` at every tick, having counted the rows it was told."""

    def __init__(self, bus, run, wait_s=0.0, go_on=None):
        self.consumers = [bus.consumer(stream, run, "controller", "one") for stream in ("events", "telemetry")]
        self.producer = bus.producer("commands", run, "controller")
        self.rows = self.decided = 0
        self.wait_s, self.go_on = wait_s, go_on

    def step(self, tick):
        for consumer in self.consumers:
            found = consumer.read(1000)
            self.rows += sum(len(d.message.ticks) for d in found if isinstance(d.message, Telemetry))
            consumer.ack(found)
        self.producer.publish(Germinate(id=f"g{tick}", site="fc", seed=tick))
        self.producer.publish(Decided(id=f"d{tick}", tick=tick))

    def complaints(self):
        return []

    def serve(self):
        while True:
            for delivery in self.consumers[0].read(100, 0.5):
                self.consumers[0].ack([delivery])
                if isinstance(delivery.message, TickEnded):
                    time.sleep(self.wait_s)
                    if self.go_on is not None:
                        self.go_on.wait()
                    tick = delivery.message.tick
                    self.producer.publish(Germinate(id=f"g{tick}", site="fc", seed=tick))
                    self.producer.publish(Decided(id=f"d{tick}", tick=tick, epoch=delivery.message.epoch))
                    self.decided += 1
                if isinstance(delivery.message, RunEnded):
                    return


def rows(tick):
    return torch.full((4, 3), float(tick))


def messages(consumer, kind):
    found = []
    while got := consumer.read(1000, 0.05):
        consumer.ack(got)
        found += [delivery.message for delivery in got if isinstance(delivery.message, kind)]
    return found
