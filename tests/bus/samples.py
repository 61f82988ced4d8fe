"""One message of every kind, fixed for good: their bytes of every schema version are kept in ``data/``."""

from __future__ import annotations

from esper import messages as m
from esper.bus.codec import Envelope

SELECT = m.Selector(site="fc*", seeds=[1, 2], stage=3, where=[m.Predicate("gain", ">", 0.5)])
BODIES = [
    m.Telemetry(site="fc1", ticks=[1, 2], seeds=1, columns=["a", "b"], codec="raw", data=bytes(range(16))),
    m.RunStarted(tick=0, total_ticks=100, sites=[{"name": "fc1", "seeds": 4}]),
    m.RunEnded(tick=100, status="FINISHED", summary={"accuracy": 0.5}),
    m.Transition(tick=3, site="fc1", seed=1, branch=2, source=1, target=2, cause="slot", generation=1, blueprint="mlp"),
    m.GateResult(tick=4, site="fc1", seed=1, branch=2, gate="gain", value=0.1, threshold=0.0, passed=True, look=1),
    m.Alert(tick=5, level="warning", code="nan", text="not finite", site="fc1", seed=1),
    m.Checkpoint(tick=6, path="checkpoints/6", digest="00"),
    m.Metrics(tick=7, values={"train/loss": 1.5}),
    m.Report(tick=8, command_id="c", stages={"DORMANT": 4}, branches=[{"gain": 0.1}]),
    m.TickEnded(tick=9, epoch=2),
    m.Germinate(id="g", deadline=10, priority=1, site="fc1", seed=3, blueprint="mlp", strategy="linear"),
    m.SetStage(id="s", select=SELECT, target=3),
    m.Cancel(id="x", select=SELECT),
    m.ChangeStrategy(id="t", select=SELECT, strategy="drift"),
    m.PauseGrafting(id="p", select=SELECT),
    m.ResumeGrafting(id="r", select=SELECT),
    m.ApplyTogether(id="a", commands=[m.Germinate(id="a1", site="fc1", seed=0), m.Cancel(id="a2", select=SELECT)]),
    m.EmergencyStop(id="e", reason="smoke"),
    m.RequestReport(id="q"),
    m.Decided(id="d", tick=9, epoch=2),
    m.ClaimCheck(digest="0" * 64, size=5),
    m.Acknowledgement(command_id="g", status="applied", reason="", tick=10),
    m.ApplyEach(id="b", commands=[m.Germinate(id="b1", site="fc1", seed=0), m.Cancel(id="b2", select=SELECT)]),
    m.ReplaceBranch(id="r", site="fc1", seed=1, blueprint="mlp", start="fresh"),
    m.Proposal(group="fc*", tick=11, commands=[m.Germinate(id="p1", site="fc1", seed=0, objective="shadow", why={"expected": 0.5})]),
]
ENVELOPES = [
    Envelope("run", "main", 2, number, 1.5e9 + number, ("controller/1-1",) if number % 2 else (), body)
    for number, body in enumerate(BODIES, start=1)
]
