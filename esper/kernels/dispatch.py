"""The interface to the kernels: chooses the implementation for a site, runs it, and checks it against the reference at some ticks."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.errors import UserError
from esper.feature_flags import Flags, chosen_by_hash
from esper.kernels import reference, reference_branches
from esper.kernels.branch_kinds import KINDS
from esper.kernels.chunk_layout import as_rows
from esper.kernels.config import KernelConfig, refused
from esper.kernels.reference_branches import ReferenceBranches

MAX_CHUNK, MAX_HIDDEN = 128, 256
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Relative RMS that a canary accepts, ten times the tests' bound in float32 and the same in 16 bits."""

MISMATCH, FAILED = "kernel_mismatch", "kernel_failed"
"""Codes of the alerts with which a run goes back to torch for good: another answer than the reference's, or an exception."""

_log = logging.getLogger("esper.kernels")
_said: set[str] = set()


@dataclass(frozen=True)
class BranchesOutput:
    """The result of a site's branches: ``y`` like ``x``; ``live [S]`` = α, 0 where inactive or contained; ``power [S]`` = Σδ²;
    ``health [S, 4]`` or None."""

    y: Tensor
    live: Tensor
    power: Tensor
    health: Tensor | None


def unavailable_reason(device: torch.device | None = None) -> str:
    """Why the kernels cannot run here, or for a model on ``device``, in words; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "no CUDA GPU was found"
    return "the model is on the CPU" if device is not None and device.type == "cpu" else ""


class Kernels:
    """One a run, for a model on ``device``. ``alerts`` collects (code, text) for the engine to publish.

    The flag ``kernels`` says at which sites; after ``failures`` mismatches or exceptions everything takes torch to the end of the run.
    Raises :class:`UserError` where ``kernel=triton`` is asked for and cannot be had.
    """

    def __init__(self, config: KernelConfig, device: torch.device | None = None, flags: Flags | None = None) -> None:
        self.config = config
        self.flags = Flags() if flags is None else flags
        self.alerts: list[tuple[str, str]] = []
        self.canary_due = False
        self.suspended = False  # set while MACs are counted: the seed layers then take their groups' products
        why = unavailable_reason(device if config.name == "triton" else None)  # under auto the model may still be moved
        if config.name == "triton" and why:
            raise refused(why)
        self.available = config.name != "torch" and not why
        if config.name == "auto" and why and why not in _said:
            _said.add(why)
            _log.info("kernel=auto takes plain torch: %s.", why)

    def begin_tick(self, tick: int) -> None:
        """Say which tick it is; a fixed fraction of ticks, the same in every repetition, is checked."""
        self.canary_due = self.available and chosen_by_hash("canary", str(tick), self.config.canary)

    def usable_on(self, device: torch.device) -> bool:
        """Whether branches on this device are for the kernels at all: on a GPU, or where ``triton`` insists (the interpreter)."""
        return self.available and (device.type == "cuda" or self.config.name == "triton")

    def path(self, site: str, x: Tensor) -> str:
        """``"triton"`` or ``"torch"`` for this site and activation."""
        fits = x.dtype in TOLERANCE and x.numel() > 0 and (x.is_cuda or self.config.name == "triton")
        return "triton" if self.available and fits and self.flags.on("kernels", site) else "torch"

    def telemetry(self, site: str, x: Tensor, seeds: int, near_zero: float) -> Tensor:
        """Health ``[S, 4]`` of ``x [..., W]`` (see ``reference.telemetry``); reads ``x`` once and writes nothing like it."""
        if self.path(site, x) == "torch":
            return reference.telemetry(x, seeds, near_zero)
        from esper.kernels.telemetry import telemetry

        try:
            health = telemetry(x, seeds, near_zero)
        except Exception as error:
            self._contain(site, error)
            return reference.telemetry(x, seeds, near_zero)
        if not self.canary_due:
            return health
        expected = reference.telemetry(x.reshape(-1, x.shape[-1]), seeds, near_zero)
        return health if self._agree(site, "telemetry", health, expected, 1e-3) else expected

    def branches(
        self, site: str, x: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor],
        near_zero: float | None = None, objective: Tensor | None = None,
    ) -> BranchesOutput:  # fmt: skip
        """``y = x + α·δ(x)`` for ``x [..., W]``, with gradients for ``x`` and the parameters; telemetry of ``x`` if ``near_zero``.

        ``alpha`` float32 ``[S]``; ``route`` int32 ``[S, 3]`` = (bank or -1, slot, bits; 0: δ = net(x) - x, 1: frozen); ``kinds`` names the
        banks, comma-separated (``KINDS``), ``parameters`` their stacks one after another; for ``objective`` see
        ``reference_branches.backward``.
        """
        taken = self.path(site, x) if fits(x.shape[-1], alpha.shape[0], kinds, parameters) else "torch"
        if taken == "torch":
            return _by_reference(x, alpha, route, kinds, parameters, near_zero, objective)
        from esper.kernels.branches import branches

        try:
            y, live, power, health = branches(
                as_rows(x), alpha, route, objective, kinds, parameters, near_zero is not None, 0.0 if near_zero is None else near_zero
            )
        except Exception as error:
            self._contain(site, error)
            return _by_reference(x, alpha, route, kinds, parameters, near_zero, objective)
        output = BranchesOutput(y.view(x.shape), live, power, None if near_zero is None else health)
        if self.canary_due and not self._sound(site, x.detach(), output, alpha, route, kinds, parameters, near_zero, objective):
            return _by_reference(x, alpha, route, kinds, parameters, near_zero, objective)
        return output

    @torch.no_grad()
    def _sound(
        self, site: str, x: Tensor, output: BranchesOutput, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor],
        near_zero: float | None, objective: Tensor | None,
    ) -> bool:  # fmt: skip
        """Whether all results of the kernels here agree with the reference; backward too, for a gradient like ``y``."""
        from esper.kernels.branches import branches_backward

        expected = _by_reference(x, alpha, route, kinds, parameters, near_zero, objective)
        allowed = TOLERANCE[x.dtype]
        pairs = [("output", output.y, expected.y, allowed), ("containment", output.live, expected.live, 1e-6)]
        pairs.append(("power", output.power, expected.power, 2 * allowed))
        if output.health is not None and expected.health is not None:
            pairs.append(("telemetry", output.health, expected.health, 1e-3))
        arriving = expected.y.reshape(-1, x.shape[-1])
        dx, gradients, _ = branches_backward(as_rows(x), as_rows(arriving), expected.live, objective, route, kinds, parameters)
        wanted = _reference_gradients(x, arriving, expected.live, objective, route, kinds, parameters)
        pairs.append(("input gradient", dx.view(x.shape), wanted[0].view(x.shape), allowed))
        pairs += [(f"gradient {number}", *pair, allowed) for number, pair in enumerate(zip(gradients, wanted[1], strict=True))]
        return all(self._agree(site, what, found, right, tolerance) for what, found, right, tolerance in pairs)

    def _agree(self, site: str, what: str, found: Tensor, expected: Tensor, tolerance: float) -> bool:
        """Trip on a mismatch. Where both are not finite in the same places, the rest is compared."""
        found, expected = found.detach().double(), expected.detach().double()
        same = torch.equal(found.isfinite(), expected.isfinite())
        found, expected = (torch.where(t.isfinite(), t, 0.0) for t in (found, expected))
        far = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        if same and far <= tolerance:
            return True
        self.canary_due = False  # one mismatch a tick is enough
        self._fell_short(site, MISMATCH, f"kernel {what} at {site} is {far:.1e} from the reference (allowed {tolerance:.0e})")
        return False

    def _contain(self, site: str, error: Exception) -> None:
        """Note a kernel's exception, so that the reference answers; full memory and errors that the user can mend are raised."""
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise error
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self._fell_short(site, FAILED, f"a kernel at {site} raised {what}", error)

    def _fell_short(self, site: str, code: str, what: str, error: Exception | None = None) -> None:
        off = self.flags.fail("kernels", site)
        text = f"{what}; {'plain torch from here on' if off else 'this call has the answer of plain torch'}"
        if off or not self.flags.failed["kernels"][site] > 1:
            self.alerts.append((code, text))
        _log.error("%s", text, exc_info=error)


def _reference_gradients(
    x: Tensor, dy: Tensor, live: Tensor, objective: Tensor | None, route: Tensor, kinds: str, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return reference_branches.backward(x.reshape(-1, x.shape[-1]), dy, live, objective, route, kinds, list(parameters))


def fits(width: int, seeds: int, kinds: str, parameters: list[Tensor]) -> bool:
    """Whether chunks and hidden widths are within the kernels' limits; wider ones take the library's products."""
    chunk = -(-width // seeds)
    hidden = max((p.shape[2] for p in parameters if p.dim() == 3 and p.shape[1] == chunk), default=1)
    return chunk <= MAX_CHUNK and hidden <= MAX_HIDDEN and all(kind in KINDS for kind in kinds.split(","))


def _by_reference(
    x: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: Sequence[Tensor], near_zero: float | None, objective: Tensor | None
) -> BranchesOutput:
    """In the activation's own precision, as the kernels: autocast would make 16-bit products of float32 activations."""
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        arguments = (rows, alpha, route, objective, kinds, *parameters)
        y, live, power = ReferenceBranches.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not annotate it
    health = None if near_zero is None else reference.telemetry(rows, alpha.shape[0], near_zero)
    return BranchesOutput(y.view(x.shape), live, power, health)
