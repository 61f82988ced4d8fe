"""The exported model computes what the grown one does, and carries nothing of esper's machinery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import HOSTS, Loop, batch, build, germinate, same, short

from esper.blueprints import GLU, MLP, Affine, Block, Conv, LowRank
from esper.lifecycle import Stage
from esper.seeds.exported_modules import called
from esper.seeds.layer import SeedLayer

S = Stage
DENSE: list[Any] = [
    Affine(), Affine(receptive_field="layer"), LowRank(), LowRank(receptive_field="chunk"), MLP(), MLP(receptive_field="chunk"),
    GLU(), GLU(receptive_field="chunk"),
]  # fmt: skip
CONV: list[Any] = [Conv(), Conv(receptive_field="chunk")]
CASES = [(host, b) for host in ("mlp", "batch_norm", "cnn_group", "transformer") for b in DENSE]
CASES += [("cnn_group", b) for b in CONV] + [(h, Block(start=s)) for h in ("cnn_batch", "transformer") for s in ("copy", "fresh")]


def grown(host: str, blueprint: Any, steps: int = 0, **lifecycle: Any) -> Loop:
    loop = Loop(host, settings={"blueprint": blueprint, "lifecycle": short(**lifecycle)}, total=100)
    sites = loop.grow.registry.sites
    loop.port.script = {1: [germinate(sites[0].name)], 2: [germinate(sites[-1].name, sites[-1].geometry.seeds - 1)]}
    loop.until(S.GRAFTING)
    return loop.run(3)


@pytest.mark.parametrize(
    ("host", "blueprint"), CASES, ids=lambda v: v if isinstance(v, str) else f"{v.name}-{getattr(v, 'start', v.receptive_field)}"
)
def test_an_export_computes_the_same(host: str, blueprint: Any):
    loop = grown(host, blueprint, objective="reconstruction" if host == "mlp" else "shadow")
    plain = loop.grow.export()
    loop.model.eval()
    plain.eval()
    inputs = batch(host, 50)[0]
    assert any(bool(alpha > 0) for alpha in loop.grow.registry.branches.alpha)
    with torch.no_grad():
        torch.testing.assert_close(plain(inputs), loop.model(inputs), rtol=1e-4, atol=1e-5)
        with loop.grow.registry.without(loop.grow.registry.branches[0]):
            assert not torch.equal(plain(inputs), loop.model(inputs)), "what grew is in it"
    assert not any(isinstance(module, SeedLayer) for module in plain.modules())
    assert not any("seed_layer" in name for name in plain.state_dict())
    assert all(not m._forward_hooks for m in plain.modules())
    assert all(hook is called for m in plain.modules() for hook in m._forward_pre_hooks.values())
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (plain, loop.model))
    assert not mine & theirs, "nothing is shared with the original"


@pytest.mark.parametrize("host", list(HOSTS))
def test_an_export_of_a_host_that_grew_nothing_is_the_host(host: str):
    loop = Loop(host).run(2)
    plain = loop.grow.export()
    assert [type(module) for module in plain.modules()] == [type(module) for module in build(host).modules()]
    same(dict(plain.state_dict()), loop.host_state())


def test_exporting_leaves_the_original_as_it_was():
    def run(export: bool) -> Loop:
        loop = grown("mlp", "mlp")
        calls: list[str] = []
        loop.model.fc1.register_forward_hook(lambda *_: calls.append("user"))
        before = list(loop.model.fc1._forward_hooks), list(loop.model._forward_pre_hooks), list(dict(loop.model.named_modules()))
        if export:
            loop.grow.export()
        after = list(loop.model.fc1._forward_hooks), list(loop.model._forward_pre_hooks), list(dict(loop.model.named_modules()))
        assert before == after
        return loop.run(12)

    first, second = run(True), run(False)
    same(first.host_state(), second.host_state())
    assert first.port.stages() == second.port.stages()


def test_after_the_end_there_is_still_something_to_export():
    loop = grown("mlp", "mlp")
    loop.grow.close("FINISHED", {})
    assert not loop.model._forward_pre_hooks
    loop.model.eval()
    plain = loop.grow.export().eval()
    torch.testing.assert_close(plain(batch()[0]), loop.model(batch()[0]))
