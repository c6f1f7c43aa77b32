"""Sets dropouts to one of a few rates, so that a schedule of rates compiles few graphs.

Torch compiles the rate of a dropout as a constant and guards on its value: every new value is a
new graph. Once a function has ``torch._dynamo.config.recompile_limit`` of them, torch compiles no
more, and runs it uncompiled with every other value (2.11 to 2.13; ``specialize_float`` does not
change it, because ``F.dropout`` compares its rate with numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from ..core.errors import RateError
from ..passes.plan_groups import HIGH_RATE

GRAPHS_A_LEVEL: Final = 2
"""One for training and one for evaluation, which is compiled for a rate although it drops nothing:
``F.dropout`` looks at it before it looks at ``training``."""
SPARE_GRAPHS: Final = 2
"""The same for a batch of another size, once: from then on torch compiles for any size."""

Selection = str | Iterable[str] | Callable[[str, nn.Module], bool]


def set_rate(
    model: nn.Module,
    p: float,
    *,
    levels: int | Sequence[float] = 16,
    modules: Selection | None = None,
) -> float:
    """Sets the rate of every dropout of a model to the level nearest to ``p``.

    That is ``p`` of torch's dropout modules, ``dropout`` of its RNNs with more than one layer, and
    every attribute of any module that is a float and has ``dropout`` in its name, such as that of
    `nn.MultiheadAttention`. Dropouts that are off are set too.

    A level becomes a graph when it is first used, and torch keeps it. Where groups of dropouts
    are set to rates of their own, every combination becomes one. With up to two graphs a level and
    two for other batch sizes, 16 levels need ``torch.compile(..., recompile_limit=34)``.

    Args:
        model: compiled or not.
        p: the rate wanted, from 0 to below 1.
        levels: the rates to choose from, or their number n for the multiples of 1/n below 1.
        modules: which modules, with those inside of them: a name or names as
            `nn.Module.named_modules` gives them, or a function that is given a name and a module.
            None stands for all.

    Returns:
        The rate that was set. The lower one if two levels are equally near.

    Raises:
        RateError: an argument has a value that it cannot have, nothing was found to set, or there
            are more levels than torch compiles graphs.
    """
    if not _is_rate(p):
        raise RateError.bad_rate(p)
    rate = min(_levels(levels, _limit(model)), key=lambda level: (abs(level - p), level))
    found = [(m, name) for m in _selected(model, modules) for name in _rates_of(m)]
    if not found:
        raise RateError.no_dropout("the model" if modules is None else f"modules={modules!r}")
    for module, name in found:
        setattr(module, name, rate)
    return rate


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < 1


def _levels(given: int | Sequence[float], limit: int) -> list[float]:
    if type(given) is int and given >= 2:
        levels = [step / given for step in range(given)]
    elif isinstance(given, Sequence) and given and all(map(_is_rate, given)):
        levels = sorted({float(level) for level in given})
    else:
        raise RateError.bad_levels(given)
    # Above that rate the batches that groups divide have a graph of their own.
    high = sum(level > HIGH_RATE for level in levels)
    needed = GRAPHS_A_LEVEL * len(levels) + high + SPARE_GRAPHS
    if needed > limit:
        most = (limit - SPARE_GRAPHS) // (GRAPHS_A_LEVEL + bool(high))
        raise RateError.too_many_levels(len(levels), needed, limit, most)
    return levels


def _limit(model: nn.Module) -> int:
    """Returns how many graphs torch compiles of a function, as far as the model can tell."""
    config = torch._dynamo.config
    limits = [config.accumulated_recompile_limit]
    compiled = [own for module in model.modules() for own in _compiled_by(module)]
    for callback in compiled or [None]:
        own = getattr(callback, "_recompile_limit", None)  # torch.compile(recompile_limit=)
        limits.append(config.recompile_limit if own is None else own)
    return min(limits)


def _compiled_by(module: nn.Module) -> Iterator[Any]:
    """Yields what compiles the module: of ``torch.compile(module)``, and ``module.compile()``."""
    context: Any = getattr(module, "dynamo_ctx", None)
    callback = getattr(context, "callback", None)  # ardd.compile has a context of its own
    if callback is not None:
        yield callback
    cells = getattr(module._compiled_call_impl, "__closure__", None) or ()
    contents = [cell.cell_contents for cell in cells]
    yield from (x for x in contents if hasattr(x, "_torchdynamo_orig_backend"))


def _selected(model: nn.Module, modules: Selection | None) -> Iterator[nn.Module]:
    paths: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        # A compiled module holds the original one: both are known by one name.
        paths[".".join(part for part in path.split(".") if part != "_orig_mod")] = module
    if modules is None:
        yield from paths.values()
        return
    if callable(modules):
        chosen = {path for path, module in paths.items() if modules(path, module)}
    else:
        chosen = {modules} if isinstance(modules, str) else set(modules)
    for name in sorted(chosen):
        if name not in paths:
            raise RateError.unknown_module(name, paths)
    for path, module in paths.items():
        if any(name in ("", path) or path.startswith(f"{name}.") for name in chosen):
            yield module


def _rates_of(module: nn.Module) -> list[str]:
    """Returns the names of the attributes of a module that are rates."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return ["p"]
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return []  # nothing to drop in between
    kinds = (int, float) if isinstance(module, nn.MultiheadAttention) else (float,)
    return [
        name
        for name, value in vars(module).items()
        if "dropout" in name and type(value) in kinds and 0 <= value <= 1
    ]
