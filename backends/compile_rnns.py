"""``ardd.compile``: torch.compile with this backend, for models with RNNs in them.

Torch traces RNNs only if ``torch._dynamo.config.allow_rnn`` is set, which is set here for the calls
of one model alone. Nothing that was compiled before is compiled anew for it, because no guard reads
it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch._dynamo import config
from torch._dynamo.eval_frame import OptimizedModule

from .dynamo import compile_graph, parse_options


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a user asked for."""

    options: Mapping[str, object] | None = None
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that compiles a module or a function when it is called."""
        owner = getattr(fn, "__self__", None)
        if isinstance(owner, nn.Module) and fn.__name__ == owner.__call__.__name__:
            fn = owner
        given: dict[str, Any] = {"fullgraph": self.fullgraph, "dynamic": self.dynamic}
        if self.options is not None:
            given["options"] = dict(self.options)
        if self.mode is not None:
            given["mode"] = self.mode
        compiled = torch.compile(in_own_frame(fn), backend=_compile_graph, **given)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = _allow_rnns()
            try:
                return compiled(*args, **kwargs)
            finally:
                _put_back(before)

        return call


def compile_with_rnns(
    model: Callable[..., Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., Any]:
    """Compiles a model, the RNNs in it too; see `ardd.compile`."""
    parse_options(options)
    recipe = Recipe(options, mode, dynamic, fullgraph)
    if isinstance(model, nn.Module):
        # It asks of its context only to be called with what it is to run.
        return OptimizedModule(model, cast("Any", recipe))
    call = functools.update_wrapper(recipe(model), model)
    call._ardd_recipe = recipe  # type: ignore[attr-defined]
    call._torchdynamo_orig_callable = model  # type: ignore[attr-defined]
    return call


def recipe_of(fn: object) -> Recipe | None:
    """Returns what `compile_with_rnns` was asked for, None where something else compiled."""
    found = getattr(fn, "dynamo_ctx" if isinstance(fn, OptimizedModule) else "_ardd_recipe", None)
    return found if isinstance(found, Recipe) else None


def in_own_frame(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls another, and whose code is no other function's.

    Dynamo keeps what it compiled with the code of a function, and there it also notes that it gave
    up on one: once a call without ``allow_rnn`` has met an RNN, it would never look at it again.
    """

    def call_model(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    own = types.FunctionType(
        call_model.__code__.replace(),
        call_model.__globals__,
        call_model.__name__,
        call_model.__defaults__,
        call_model.__closure__,
    )
    own.__kwdefaults__ = call_model.__kwdefaults__
    return own


# Torch 2.11 has one configuration for all threads, in which a call that ends must not take from
# another one what it set; later versions have one for each thread.
_SHARED: Final = not hasattr(torch.utils._config_module, "ContextVar")
_lock = threading.Lock()
_calls = 0
_before_all = False


def _allow_rnns() -> bool:
    """Sets ``allow_rnn``, and returns what it was. ``config.patch`` would take 60 us."""
    global _calls, _before_all
    with _lock:
        before: bool = config.allow_rnn
        if _SHARED:
            _before_all = before if _calls == 0 else _before_all
            _calls += 1
        config.allow_rnn = True
    return before


def _put_back(before: bool) -> None:
    global _calls
    with _lock:
        if _SHARED:
            _calls -= 1
            before = _calls > 0 or _before_all
        config.allow_rnn = before


def _compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Another name for the backend, so that no graph cut at an RNN is taken for one of ours."""
    return compile_graph(gm, example_inputs, options=options, mode=mode)


_compile_graph.__name__ = "ardd"  # in the messages of torch
_compile_graph.reset = compile_graph.reset  # type: ignore[attr-defined]
