"""Works around a failure of Inductor's C++ code generator on kernels that decode saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor.codegen.cpp import CppScheduling


@contextlib.contextmanager
def optional_loop_split() -> Iterator[None]:
    """Compiles without an optimisation where that fails.

    ``try_loop_split`` splits the loops of a fused kernel that reads one value for every few
    elements, as the scales of groups are. It asserts that all parts of the kernel loop over the
    same sizes, which parts in another order of memory do not (torch 2.11 to 2.13). Nothing is
    changed before that assertion, and the kernel is right without the split.
    """
    split = CppScheduling.try_loop_split

    def try_loop_split(self: CppScheduling, nodes: list[Any]) -> Any:
        try:
            return split(self, nodes)
        except AssertionError:
            return nodes

    with mock.patch.object(CppScheduling, "try_loop_split", try_loop_split):
        yield
