"""Can seeds mend a damaged net, and at what price beside fine-tuning, LoRA and training anew?

python experiments/mend/run.py            # the whole study: tuning.csv, runs.csv, comparison/, the figure, the README
python experiments/mend/run.py --quick --out try
python experiments/mend/run.py --again    # verdicts, figure and README once more from the files
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from second_training import WIDTH, accuracy, digits, network, second_training, train, trained_host  # noqa: E402
from small_study import RATES, Study  # noqa: E402
from study_runs import Row  # noqa: E402

from esper.randomness import generator  # noqa: E402

UNITS = 8


@torch.no_grad()
def cut(net: nn.Sequential) -> nn.Sequential:
    """The second hidden layer keeps its four units with the longest outgoing weights."""
    kept = net[4].weight.norm(dim=0).topk(4).indices
    small = nn.Sequential(net[0], nn.ReLU(), nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 10))
    small[2].weight.copy_(net[2].weight[kept])
    small[2].bias.copy_(net[2].bias[kept])
    small[4].weight.copy_(net[4].weight[:, kept])
    small[4].bias.copy_(net[4].bias)
    return small


@torch.no_grad()
def dead(net: nn.Sequential) -> nn.Sequential:
    """Seven of eight units of either hidden layer never fire, and so get no gradient."""
    for layer in (net[0], net[2]):
        silent = torch.arange(WIDTH) % 8 != 0
        layer.weight[silent] = 0.0
        layer.bias[silent] = -1.0
    return net


@torch.no_grad()
def quantized(net: nn.Sequential) -> nn.Sequential:
    """Every weight is −1, 0 or 1 times one number a layer (Li & Liu 2016)."""
    for layer in (net[0], net[2], net[4]):
        large = layer.weight.abs() > 0.7 * layer.weight.abs().mean()
        layer.weight.copy_(layer.weight.sign() * large * layer.weight.abs()[large].mean())
    return net


DAMAGES: dict[str, Callable[[nn.Sequential], nn.Sequential]] = {"cut": cut, "dead": dead, "quantized": quantized}
ARMS = ("seeds", "judged", "lora", "fine_tune", "retrain", "nothing")


def one(given: Row) -> Row:
    """A host is trained, damaged, and trained again for fewer steps."""
    settings: dict[str, Any] = given["settings"]
    data, seed, steps = digits(given["seed"]), given["seed"], given["steps"]
    host = trained_host(data.train, 2 * steps, seed)
    whole = accuracy(host, data.test)
    if given["arm"] == "retrain":
        net, added = network(generator(seed + 1, "host")), 0
        train(net, data.train, steps, settings["lr"], seed)
    else:
        damaged = DAMAGES[given["block"]](host)
        net, added = second_training(given["arm"], damaged, data, settings["lr"], UNITS, steps, seed)
    trained = sum(parameter.numel() for parameter in net.parameters()) if given["arm"] in ("fine_tune", "retrain") else added
    names = {"accuracy": accuracy(net, data.test), "judge": accuracy(net, data.judge)}
    return {**names, "before_damage": whole, "added": added, "trained": trained}


STUDY = Study(
    folder=HERE,
    one=one,
    arms=ARMS,
    untuned=("nothing",),
    blocks=tuple(DAMAGES),
    metrics={"accuracy": "max"},
    costs=("added", "trained"),
    reference="fine_tune",
    effect=0.01,
    rates=(*RATES, 0.1),
)

if __name__ == "__main__":
    sys.exit(STUDY.main(sys.argv[1:]))
