"""Policies for tests: networks with weights set by hand, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from esper.controllers.policy import PolicyConfig
from esper.controllers.policy.network import PolicyNetwork, Words
from esper.controllers.policy.weights import packed, write
from esper.randomness import generator

WORDS = Words(("affine", "mlp"), ("drift", "linear"), ("shadow",))
LEARNT = {"runs": 2.0, "decisions": 20.0, "error": 0.02, "rent": 0.02, "trend": 0.5}
#: Decides five ticks in, every five ticks of a hundred.
SETTINGS: dict[str, Any] = {"germinate_at": "5%", "every": "5%", "until": "90%", "embargo": "1%"}


def network(wants: tuple[float, float, float] = (0.0, 0.0, 0.0), predicts: float | None = None, words: Words = WORDS) -> PolicyNetwork:
    """Weights by lot; ``wants`` are added to the scores of the three kinds, ``predicts`` is what a germination promises."""
    made = PolicyNetwork(words, 8, generator(0, "test"))
    with torch.no_grad():
        made.kinds[2].bias += torch.tensor(wants)  # type: ignore[index, operator]
        if predicts is not None:
            made.gain[2].weight.zero_()  # type: ignore[operator, union-attr]
            made.gain[2].bias.fill_(predicts)  # type: ignore[operator, union-attr]
    return made


def saved(folder: Path, net: PolicyNetwork | None = None, **learnt: float) -> str:
    """The file of a network."""
    path = folder / "policy.safetensors"
    write(packed(net or network(), LEARNT | learnt), path)
    return str(path)


def policy(weights: str, seed: int = 0, **settings: Any) -> Any:
    """The controller of a file."""
    return PolicyConfig(**(SETTINGS | {"weights": weights} | settings)).build(seed)
