"""Numbers from the device that the engine reads without ever waiting for the device.

Everything posted during a step is copied asynchronously at its end, and read at the beginning of the next step, when the
device has long been busy with that step's forward and backward. On a CPU there is nothing to wait for: a number is read as it is posted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Read = Callable[[list[Tensor]], None]


class Readings:
    """``late`` says that numbers are read a step after they were posted: on every device but a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.late = device.type != "cpu"
        self._posted: list[tuple[list[Tensor], Read]] = []
        self._sent: list[tuple[list[torch.Size], Read]] = []
        self._there = torch.zeros(0)
        self._event: torch.cuda.Event | None = None

    def post(self, tensors: list[Tensor], read: Read) -> None:
        """Have ``read`` called with copies of these tensors on the CPU, float32: now or at the beginning of the next step."""
        detached = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
        if self.late:
            self._posted.append((detached, read))
        else:
            read(detached)

    def forget(self) -> None:
        """Read what was sent, and drop what was posted in this step: it is not to count."""
        self.arrive()
        self._posted = []

    def send(self) -> None:
        """End of a step: start the copy of everything posted."""
        if not self._posted:
            return
        self.arrive()  # nothing is lost where a step ended without having read
        parts = [tensor.reshape(-1).to(self.device, torch.float32) for tensors, _ in self._posted for tensor in tensors]
        flat = torch.cat(parts) if parts else torch.zeros(0)
        self._there = torch.empty(flat.shape, pin_memory=flat.is_cuda)
        self._there.copy_(flat, non_blocking=True)
        if flat.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._sent = [([tensor.shape for tensor in tensors], read) for tensors, read in self._posted]
        self._posted = []

    def arrive(self) -> None:
        """Read every number sent: at the beginning of a step, or wherever the last step's numbers are needed."""
        sent, self._sent = self._sent, []
        if not sent:
            return
        if self._event is not None:
            self._event.synchronize()
        sizes = [shape.numel() for shapes, _ in sent for shape in shapes]
        values = iter(torch.split(self._there, sizes) if sizes else ())
        for shapes, read in sent:
            read([next(values).view(shape) for shape in shapes])
