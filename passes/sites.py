"""The dropouts that a graph holds, and where in the user's program each comes from."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Final

import torch
from torch import fx

from ..core.decisions import Decision, Reason, Role

TORCH_DIR: Final = os.path.dirname(torch.__file__) + os.sep
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')
_REGISTRY: Final = re.compile(r"\._(?:modules|parameters|buffers)(?=\[)")
_ROOT: Final = re.compile(r"^[LG]\['[^']*'\](\.__closure__\[\d+\]\.cell_contents)?")
_BOUND: Final = re.compile(r"(?:[^.]+\.)?__self__\.")  # a bound method kept as an attribute
_KEY: Final = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


@dataclasses.dataclass(frozen=True)
class Site:
    """One dropout that has been marked."""

    index: int
    """Number of the dropout within its graph, in program order."""
    kind: str
    """What the user wrote: ``dropout``, ``dropout2d``, ``bernoulli``, ``rand_like``, ..."""
    p: float
    """Probability of a zero."""
    mean: float
    """Expectation of the mask: 1, or ``1 - p`` where the user's own code scales by 1/(1-p)."""
    module: str
    """Path of the module that holds it, ``""`` outside modules."""
    source: str
    """The user's line, ``file.py:12``."""
    of_weight: bool = False
    """Whether what is dropped is made of parameters and buffers alone (DropConnect)."""
    role: Role | None = None
    """What it does in its network, once that is known."""
    copies: bool = False
    """Whether it drops a batch that holds samples more than once, once that is known."""


def decide(
    site: Site, reason: Reason, *, taken: bool, shape: tuple[int | str, ...] = (), **more: Any
) -> Decision:
    """Returns the decision on a site; ``more`` are fields of `Decision`."""
    return Decision(
        site=site.index,
        kind=site.kind,
        module=site.module,
        source=site.source,
        shape=shape,
        p=site.p,
        taken=taken,
        reason=reason,
        role=site.role,
        **more,
    )


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module that ``node`` was traced in, such as ``enc.0.drop``.

    It is relative to the module or variable that the compiled code was entered through, and ``""``
    for a node outside modules.
    """
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def clean_path(path: str) -> str:
    """Returns the path of a module or parameter without Dynamo's spelling of it.

    ``L['self']._modules['enc'].layers[0]`` becomes ``enc.layers.0``.
    """
    path = _ROOT.sub("", _REGISTRY.sub("", path), count=1)
    return _BOUND.sub("", _KEY.sub(r".\1", path).lstrip("."))


def source_name(placeholder: fx.Node) -> str:
    """Returns Dynamo's name of what a graph input stands for, ``""`` where it has none."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in older versions of torch


def source_line(node: fx.Node) -> str:
    """Returns ``file.py:12``, the innermost line outside torch that ``node`` comes from."""
    frames: list[tuple[str, str]] = _FRAME.findall(node.stack_trace or "")
    for path, line in reversed(frames):
        if not path.startswith(TORCH_DIR):
            return f"{os.path.basename(path)}:{line}"
    return ""


def static_shape(value: torch.Tensor | None) -> tuple[int | str, ...]:
    """Returns the sizes of ``value``, symbolic ones as text, nothing where there is no value."""
    if value is None:
        return ()
    return tuple(size if type(size) is int else str(size) for size in value.shape)
