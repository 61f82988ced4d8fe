"""Muon (Jordan et al. 2024) for matrices, AdamW for all other parameters, of a host and of what grows beside it.

Muon's step is momentum whose matrix is made nearly orthogonal. It is scaled so that its root mean square is that of AdamW's steps (Liu
et al. 2025, "Muon is scalable for LLM training"): one learning rate and weight decay serve both. Embeddings, the head, and vectors are
AdamW's, as in both papers. A convolution's filters are one matrix, a filter a row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from esper.engine.extra_passes import host_parameters
from esper.errors import UserError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as in torch.optim.Muon."""
ITERATIONS = 5
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
"""AdamW's beside Muon (Liu et al. 2025)."""

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_PACKED = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of each matrix, ``[A, m, n]`` in bfloat16: five Newton–Schulz steps, as in torch.optim.Muon."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def rate_scale(shape: Sequence[int]) -> float:
    """What the rate of a matrix is multiplied by, so that its steps are as large as AdamW's: ``0.2 √max(m, n)``."""
    return 0.2 * math.sqrt(max(shape[0], math.prod(shape[1:])))


def matrices_of(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that are matrices between layers: weights of linear layers, attention and ungrouped convolutions.

    Those of embeddings, norms and layers of other kinds are not, nor is a weight that an embedding shares.
    """
    found: dict[int, str] = {}
    others: set[int] = set()
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if _is_matrix(part, name, parameter):
                found.setdefault(id(parameter), f"{prefix}.{name}" if prefix else name)
            else:
                others.add(id(parameter))
    return frozenset(name for key, name in found.items() if key not in others)


def _is_matrix(part: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if type(part).__name__ == "Conv1D":  # a linear layer of transformers
        return name == "weight"
    return isinstance(part, _MATRICES) and name in _PACKED and parameter.dim() > 1 and getattr(part, "groups", 1) == 1


class MuonAdamW(torch.optim.Optimizer):
    """The steps of torch's Muon and torch's AdamW as one optimizer: group 0 holds the ``matrices``, group 1 the ``others``.

    Either may be empty. Its state is keyed by the parameters themselves, as every optimizer's, and a parameter may be added to either group
    while training.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = MOMENTUM
    ) -> None:
        if min(lr, weight_decay, momentum) < 0.0:
            raise UserError(f"Muon takes no negative numbers: lr={lr}, weight_decay={weight_decay}, momentum={momentum}.")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": BETAS}
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices(self.param_groups[0])
        self._step_others(self.param_groups[1])
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """The steps of torch.optim.Muon with ``match_rms_adamw``, all matrices of one shape at once: on a GPU launches are its cost."""
        alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[(parameter.flatten(1).shape, parameter.device, parameter.dtype)].append(parameter)
        momentum = group["momentum"]
        for (shape, _, dtype), parameters in alike.items():
            gradients = [parameter.grad.flatten(1) for parameter in parameters if parameter.grad is not None]
            moments = [self._momentum(parameter).flatten(1) for parameter in parameters]
            torch._foreach_lerp_(moments, gradients, 1.0 - momentum)
            directions = orthogonalised(torch.stack(torch._foreach_lerp(gradients, moments, momentum))).to(dtype)
            flat = [parameter.flatten(1) for parameter in parameters]
            torch._foreach_mul_(flat, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(flat, list(directions), alpha=-group["lr"] * rate_scale(shape))
            for matrix, parameter in zip(flat, parameters, strict=True):
                if matrix.data_ptr() != parameter.data_ptr():  # its memory is laid out in another order
                    parameter.copy_(matrix.view_as(parameter))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        held = self.state[parameter]
        if "momentum_buffer" not in held:
            held["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        found: Tensor = held["momentum_buffer"]
        return found

    def _step_others(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if parameters:
            adamw = torch.optim.AdamW(parameters, group["lr"], betas=group["betas"], weight_decay=group["weight_decay"])
            adamw.state = defaultdict(dict, {parameter: self.state[parameter] for parameter in parameters})
            adamw.step()


def muon_for(
    model: nn.Module, lr: float, weight_decay: float, momentum: float = MOMENTUM, outputs: int = 0, adamw: Sequence[str] = ()
) -> MuonAdamW:
    """``MuonAdamW`` for a host: matrices between its layers by Muon; embeddings, the head, vectors and ``adamw`` by AdamW.

    Args:
        outputs: what the host gives a sample; the head is the last matrix of so many rows. 0: there is none.
        adamw: names of further parameters for AdamW, with ``*`` and ``?`` as in file names.

    Raises:
        UserError: an entry of ``adamw`` names no parameter.
    """
    parameters, matrices = host_parameters(model), matrices_of(model)
    for pattern in adamw:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UserError(f"optimizer.adamw: '{pattern}' is no parameter of the model; it has {', '.join(parameters)}.")
    head = [name for name in parameters if name in matrices and parameters[name].shape[0] == outputs][-1:]
    chosen = [
        name for name in parameters if name in matrices and name not in head and not any(fnmatchcase(name, pattern) for pattern in adamw)
    ]
    others = [parameter for name, parameter in parameters.items() if name not in chosen]
    return MuonAdamW([parameters[name] for name in chosen], others, lr, weight_decay, momentum)
