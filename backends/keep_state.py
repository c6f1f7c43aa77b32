"""Runs a module as if it had not been run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def keep_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back random generators, buffers, and the compiled calls that modules have.

    Inside, modules that ``.compile()`` was called on run uncompiled.
    """
    every = [inner for module in modules for inner in module.modules()]
    compiled = {inner: call for inner in every if (call := inner._compiled_call_impl) is not None}
    buffers = [
        (inner, name, buffer, buffer.detach().clone())
        for inner in every
        for name, buffer in inner._buffers.items()
        if buffer is not None
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    state = random.getstate()
    with torch.random.fork_rng(devices):
        for inner in compiled:
            inner._compiled_call_impl = None
        try:
            yield
        finally:
            for inner, call in compiled.items():
                inner._compiled_call_impl = call
            for inner, name, buffer, value in buffers:
                inner._buffers[name] = buffer
                _put_back(buffer, value)
            random.setstate(state)


def _put_back(buffer: Tensor, value: Tensor) -> None:
    # A write that changes nothing would still make a backward that is due refuse the buffer. Its
    # version does not say whether it was written to: batch norm leaves that alone.
    if not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)
