"""Runs one of several compiled graphs, drawn in every call: the plans of a row pattern."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import preserve_rng_state
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

Compile = Callable[[Sequence[Any], int], Callable[..., Any]]
"""Compiles the program for example inputs and the number of a plan."""


class PlanSwitch:
    """Draws a plan in every call, each as likely as any other, and runs its compiled graph.

    Torch's default CPU generator draws it, before any mask is drawn. A run that begins from a saved
    state repeats the plans; so does activation checkpointing, which restores the state before it
    calls again. Backward belongs to the graph that ran forward.

    Args:
        same: for each plan, the first one whose graph is the same.
        compiled: that of plan 0.
        compile_later: compiles a plan when it is drawn for the first time.
    """

    def __init__(
        self,
        same: Sequence[int],
        compiled: Callable[..., Any],
        compile_later: Callable[[int], Callable[..., Any]],
    ) -> None:
        self._same = same
        self._compiled = {0: compiled}
        self._compile_later = compile_later
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        """Calls the graph of a plan."""
        if TracingContext.try_get() is not None:  # torch asks what results look like
            return self._compiled[0](*args)
        with _disable_current_modes():
            plan = self._same[int(torch.randint(len(self._same), (), device="cpu"))]
        if plan not in self._compiled:
            with self._lock:
                if plan not in self._compiled:  # another thread may have been faster
                    self._compiled[plan] = self._compile_later(plan)
        return self._compiled[plan](*args)


def switch_plans(
    same: Sequence[int], compiled: Callable[..., Any], inputs: Sequence[Any], compile_: Compile
) -> Callable[..., Any]:
    """Returns what draws plans, inside of the compile of plan 0.

    Plans are compiled at their first use, for inputs like those of this compile: Dynamo's guards
    hold for every call. Where a size is symbolic, more guards may come up, which have to be known
    now: all plans are compiled at once.

    Args:
        same: for each plan, the first one whose graph is the same.
        compiled: plan 0.
        inputs: example inputs.
        compile_: compiles a plan.
    """
    if len(set(same)) == 1:
        return compiled
    context = TracingContext.try_get()
    likenesses = _static_likenesses(inputs, context.fake_mode if context else None)
    if context is None or likenesses is None:
        now = {plan: compile_(inputs, plan) for plan in sorted(set(same)) if plan != 0}
        return PlanSwitch(same, compiled, now.__getitem__)
    fake_mode, state = context.fake_mode, _State()

    def compile_later(plan: int) -> Callable[..., Any]:
        own = TracingContext(fake_mode)  # the guards of the first compile are settled
        with _disable_current_modes(), preserve_rng_state(), state.restored(), tracing(own):
            return compile_(likenesses, plan)

    return PlanSwitch(same, compiled, compile_later)


def _static_likenesses(
    inputs: Sequence[Any], fake_mode: FakeTensorMode | None
) -> list[FakeTensor] | None:
    """Returns inputs without their values, None where one has no plain tensor of fixed sizes."""
    found: list[FakeTensor] = []
    if fake_mode is None:
        return None
    for x in inputs:
        if not isinstance(x, FakeTensor) and type(x) not in (Tensor, torch.nn.Parameter):
            return None
        fake = x if isinstance(x, FakeTensor) else fake_mode.from_tensor(x, static_shapes=True)
        sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
        if not all(type(size) is int for size in sizes):
            return None
        found.append(fake)
    return found


class _State:
    """What of torch's state a compiled graph depends on, as it is now."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = {device: _autocast(device) for device in ("cpu", "cuda")}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled() != self._inference:
                stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, (enabled, dtype) in self._autocast.items():
                if _autocast(device) != (enabled, dtype):
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            yield


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
