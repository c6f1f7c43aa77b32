"""The built-in cost model: a plain roofline with constants, the same on every rank."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from .cost_model import OpCost


@dataclasses.dataclass(frozen=True)
class Machine:
    """What bounds an op on one kind of device."""

    flops_per_s: float
    """Rate of a large fp32 product, of all threads together."""
    half_speedup: float
    """How much faster a product of bf16 or fp16 is."""
    bytes_per_s: float
    """Rate of a long copy, read and written bytes counted."""
    line_bytes: int
    """A gather of shorter runs moves this many bytes for each."""
    randoms_per_s: float
    """Random numbers of a fused Philox kernel."""
    launch_s: float
    """Time to start an op."""


# Two threads of a Zen 4 server core; gathers and masks as Inductor's C++ compiles them.
_CPU: Final = Machine(150e9, 1.0, 20e9, 64, 0.6e9, 2e-6)
# An H200: 4.3 TB/s copies and 790 TFLOP/s in bf16 were measured there, TF32 is off by default.
_CUDA: Final = Machine(50e12, 14.0, 4.0e12, 32, 2e12, 4e-6)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Time is what takes longer, computing or moving bytes, and a launch."""

    name: str = "roofline"
    version: str = "1"

    def seconds(self, op: OpCost, device: torch.device) -> float:
        """Returns the predicted time of one op, in seconds."""
        machine = _CPU if device.type == "cpu" else _CUDA
        if op.kind == "draw":
            return 5 * machine.launch_s
        if op.kind == "random":
            return op.hint(op.flops) / machine.randoms_per_s
        moved = op.hint(op.bytes) / machine.bytes_per_s
        if op.kind == "product":
            rate = machine.flops_per_s
            if op.dtype in (torch.bfloat16, torch.float16):
                rate *= machine.half_speedup
            return max(op.hint(op.flops) / rate, moved) + machine.launch_s
        waste = max(1.0, machine.line_bytes / max(op.run_bytes, 1))
        return moved * waste + machine.launch_s
