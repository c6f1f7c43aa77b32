"""Says why a dropout of a module reached no captured graph, and what to do about it.

A dropout that Dynamo never hands over cannot be rewritten, and leaves no decision either. What
remains to ask is the module itself: its modes, its types, and the habits of torch (2.11 to 2.13)
that are known to keep a dropout out of the graphs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..core.decisions import Decision, Reason

_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_MOST_NAMED = 12
"""Paths listed in one note; the others are counted."""
_MOST_BREAKS = 3
"""Graph breaks quoted in one note."""

_HOST_CHECKS: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.Transformer: ("src_mask= or tgt_mask=", "src_is_causal= and tgt_is_causal="),
    nn.TransformerEncoder: ("mask=", "is_causal="),
    nn.TransformerDecoder: ("tgt_mask=", "tgt_is_causal="),
}
"""Modules that look at a mask on the host, unless other arguments say what it is."""


def explain_absence(
    fn_or_module: Callable[..., object],
    graphs_captured: int,
    decisions: Sequence[Decision],
    break_reasons: Sequence[str] = (),
) -> tuple[str, ...]:
    """Returns one note per cause that kept dropouts out of the captured graphs.

    Args:
        fn_or_module: What was compiled: a module, or a function, in which the modules are
            looked at that it closes over, names as globals, or finds in its ``self``.
        graphs_captured: Number of graphs that reached the backend.
        decisions: What was decided about the dropouts in them.
        break_reasons: Why Dynamo ended a graph or skipped a frame, in its own words: the keys
            of ``counters["graph_break"]`` and ``counters["unimplemented"]``.
    """
    roots = tuple(roots_of(fn_or_module))
    absence = _Absence(roots, graphs_captured, decisions, break_reasons)
    # The surest causes come first; what one has explained is none of the next one's business.
    absence.zero_rate()
    absence.eval_mode()
    absence.bare_compile()
    absence.causal_check()
    absence.rnn()
    absence.lost_path()
    absence.fused_attention()
    absence.called_by_owner()
    absence.not_captured()
    return tuple(absence.notes)


@dataclasses.dataclass(frozen=True)
class Root:
    """A module found in what was compiled."""

    path: str
    """Name by which the function knows it, ``""`` for the compiled module itself."""
    module: nn.Module

    def paths(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields every module below, shared ones once for each of their paths."""
        for path, module in self.module.named_modules(remove_duplicate=False):
            yield ".".join(filter(None, (self.path, path))), module

    def relative(self, path: str) -> str:
        """Returns a path without the name of the root, which decisions do not hold."""
        return path[len(self.path) :].lstrip(".")


@dataclasses.dataclass(eq=False)
class _Holder:
    """A module that drops something when it runs in training."""

    module: nn.Module
    p: float
    paths: list[str] = dataclasses.field(default_factory=list)
    """Where it is found; several where it is shared."""
    aliases: set[str] = dataclasses.field(default_factory=set)
    """What a decision about it may have for a path."""

    def under(self, path: str) -> bool:
        """Says whether the module or one above it has this path."""
        return not path or any(f"{own}.".startswith(f"{path}.") for own in self.paths)


class _Absence:
    """The dropouts not seen in any graph, and the notes on them, one cause after the other."""

    def __init__(
        self,
        roots: tuple[Root, ...],
        graphs_captured: int,
        decisions: Sequence[Decision],
        breaks: Sequence[str],
    ) -> None:
        self.roots = roots
        self.graphs_captured = graphs_captured
        self.decisions = decisions
        self.breaks = breaks
        self.notes: list[str] = []
        self.holders = _find_holders(roots)
        self.seen = {decision.module for decision in decisions}
        self.missing = [holder for holder in self.holders if not self._was_seen(holder)]

    def zero_rate(self) -> None:
        """p=0 is no dropout, in eager either."""
        zero = [holder for holder in self.missing if holder.p == 0]
        self._settle(zero, "p=0 drops nothing; set p above 0 if it should")

    def eval_mode(self) -> None:
        """A module in eval mode drops nothing, in eager either."""
        still = [holder for holder in self.missing if not holder.module.training]
        if all(root.module.training for root in self.roots):
            self._settle(still, "in eval mode nothing is dropped; call .train() on it")
        elif still:
            self._settle(still, "the model is in eval mode; call model.train()")
        elif not self.decisions:  # its dropouts are calls of functions, which no module shows
            self.notes.append("The model is in eval mode; call model.train().")

    def bare_compile(self) -> None:
        """``m.compile()`` compiles the frame of ``m.forward``, and torch skips its own files.

        Seen with every module of torch.nn on its own; a module with a ``forward`` of the
        user's is compiled, those of torch.nn inside it too.
        """
        for root in self.roots:
            kind = type(root.module)
            if not (kind.forward.__module__ or "").startswith("torch.nn.modules."):
                continue
            unexplained = self.graphs_captured == 0 and not self.breaks and not root.path
            probable = unexplained and _host_check(root.module) is None
            if root.module._compiled_call_impl is None and not probable:
                continue
            why = (
                f"nn.{kind.__name__}.compile() compiles nothing, because torch skips the files of "
                "torch.nn; write model = torch.compile(model) instead"
            )
            inside = [holder for holder in self.missing if holder.under(root.path)]
            if inside:
                self._settle(inside, why)
            else:
                self.notes.append(f"{why}.")

    def causal_check(self) -> None:
        """A stack of nn.Transformer compares its mask on the host, which ends the graph."""
        if self.breaks and not any("item()" in reason for reason in self.breaks):
            return
        for root in self.roots:
            for path, module in root.paths():
                check = _host_check(module)
                inside = [holder for holder in self.holders if holder.under(path)]
                if check is None or any(self._was_seen(holder) for holder in inside):
                    continue
                mask, flag = check
                self._settle(
                    [holder for holder in inside if holder in self.missing],
                    f"nn.{type(module).__name__} called with {mask} but without {flag} looks at "
                    f"the mask on the host, which ends the graph; pass {flag} too, True where "
                    "the mask is causal and else False",
                )

    def rnn(self) -> None:
        """Dynamo does not trace RNNs unless told, and gives up on the frame that calls one."""
        if torch._dynamo.config.allow_rnn:
            self._packed_rnn()
            return
        blamed = any("RNN" in reason for reason in self.breaks)
        if self.breaks and not blamed:
            return
        rnns = [
            f"nn.{type(module).__name__} ({path})" if path else f"nn.{type(module).__name__}"
            for root in self.roots
            for path, module in root.paths()
            if isinstance(module, nn.RNNBase)
        ]
        if not rnns:
            return
        why = (
            f"torch does not trace {' and '.join(dict.fromkeys(rnns))}, nor what follows it in the "
            "same function; use ardd.compile(model) in place of torch.compile, which traces it"
        )
        if self.missing:
            self._settle(self.missing, why)
        elif blamed:
            self.notes.append(f"{why[0].upper()}{why[1:]}.")

    def _packed_rnn(self) -> None:
        """The sizes of packed batches are data, which ends the graph: the RNN runs as in eager."""
        sizes = ("_local_scalar_dense", "pack_padded_sequence", "pad_packed_sequence")
        if any(name in reason for reason in self.breaks for name in sizes):
            self._settle(
                [holder for holder in self.missing if isinstance(holder.module, nn.RNNBase)],
                "torch does not trace RNNs of packed sequences, and runs them as without "
                "torch.compile; give them a padded batch",
            )

    def lost_path(self) -> None:
        """After a break torch calls a module by its place on the stack, not by its path."""
        known = {path for root in self.roots for path, _ in root.paths()}
        known |= {root.relative(path) for root in self.roots for path, _ in root.paths()}
        lost = sum(not d.module or d.module not in known for d in self.decisions)
        if self.breaks and lost >= len(self.missing):
            self._settle(
                self.missing,
                "maybe among the dropouts without a known module, because torch loses the path "
                f"of a module at a graph break{self._why_broken()}; remove the break to know",
            )

    def fused_attention(self) -> None:
        """Attention hands its rate to a kernel, and the module that holds it never runs."""
        fused = [d.module for d in self.decisions if d.reason is Reason.INSIDE_SDPA]
        inside = [
            holder
            for holder in self.missing
            if (self.graphs_captured and isinstance(holder.module, nn.MultiheadAttention))
            or any(path.rpartition(".")[0] in fused for path in holder.paths)
        ]
        self._settle(
            inside,
            "the dropout of attention weights is inside scaled_dot_product_attention (in "
            "nn.MultiheadAttention with need_weights=False) and runs as without ardd; it would not "
            "be structured written out either",
        )
        kind = "scaled_dot_product_attention"
        written_out = [d.module for d in self.decisions if d.kind == kind]
        self._settle(
            [
                holder
                for holder in self.missing
                if any(path.rpartition(".")[0] in written_out for path in holder.paths)
            ],
            f"its rate is an argument of {kind}, which has a row with the path of the module "
            "around it",
        )

    def called_by_owner(self) -> None:
        """A module may hold an nn.Dropout and call F.dropout with its rate, as transformers do."""
        rows = {(d.module, d.p) for d in self.decisions if d.module not in self._paths_of_holders()}
        self._settle(
            [
                holder
                for holder in self.missing
                if any((path.rpartition(".")[0], holder.p) in rows for path in holder.aliases)
            ],
            "not called itself; a dropout of its rate has a row with the path of the module around",
        )

    def _paths_of_holders(self) -> set[str]:
        return {path for holder in self.holders for path in holder.aliases}

    def not_captured(self) -> None:
        """The rest: the graphs broke, the module did not run, or nothing did."""
        if self.graphs_captured == 0 and (self.missing or not self.notes):
            why = (
                f"torch captured no graph{self._why_broken()}; call it outside "
                "torch.compiler.disable and modes such as FlopCounterMode, and see "
                "TORCH_LOGS=graph_breaks"
            )
        elif self.breaks and (self.missing or not (self.holders or self.decisions)):
            why = (
                f"torch ended a graph early{self._why_broken()}; change the line that "
                "torch.compile(..., fullgraph=True) points at"
            )
        elif self.missing:
            why = "not run in a captured graph; check that the call reaches it"
        elif self.holders or self.decisions or self.notes:
            return
        else:
            why = "no dropout with training=True and p above 0 was called; check both"
        if self.missing:
            self._settle(self.missing, why)
        else:
            self.notes.append(f"{why[0].upper()}{why[1:]}.")

    def _settle(self, holders: list[_Holder], why: str) -> None:
        """Notes why these are absent, so that later causes leave them alone."""
        if not holders:
            return
        names = [holder.paths[0] or "(the model)" for holder in holders]
        more = len(names) - _MOST_NAMED
        listed = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        self.notes.append(f"{listed}: {why}.")
        self.missing = [holder for holder in self.missing if holder not in holders]

    def _was_seen(self, holder: _Holder) -> bool:
        return not self.seen.isdisjoint(holder.aliases)

    def _why_broken(self) -> str:
        """Returns the first lines of the break reasons, in parentheses."""
        firsts = list(dict.fromkeys(" ".join(r.strip().split("\n")[:1]) for r in self.breaks))
        if not firsts:
            return ""
        more = len(firsts) - _MOST_BREAKS
        return f" ({'; '.join(firsts[:_MOST_BREAKS])}{f'; and {more} more' if more > 0 else ''})"


def _host_check(module: nn.Module) -> tuple[str, str] | None:
    return next((v for kind, v in _HOST_CHECKS.items() if isinstance(module, kind)), None)


def _find_holders(roots: tuple[Root, ...]) -> list[_Holder]:
    """Returns the modules that hold a drop rate, each once, in the order of the first path."""
    holders: dict[int, _Holder] = {}
    for root in roots:
        for path, module in root.paths():
            p = _rate(module)
            if p is None:
                continue
            holder = holders.setdefault(id(module), _Holder(module, p))
            holder.paths.append(path)
            holder.aliases |= {path, root.relative(path)}
    return list(holders.values())


def _rate(module: nn.Module) -> float | None:
    """Returns the drop rate of a module of torch, None where it has none."""
    if isinstance(module, _DROPOUTS):
        return module.p
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout or None  # 0 is the default there, and nothing to explain
    if isinstance(module, nn.RNNBase) and module.num_layers > 1:
        return module.dropout or None
    return None


def roots_of(fn_or_module: Callable[..., object]) -> Iterator[Root]:
    """Yields the modules that a callable is, is bound to, closes over or names as globals."""
    target: object = fn_or_module
    while isinstance(target, functools.partial):
        target = target.func
    if not isinstance(target, nn.Module) and callable(target):
        target = inspect.unwrap(target)  # torch.compile(f) wraps f
    if isinstance(target, types.MethodType):
        owner = target.__self__
        names = {} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {}))
        target = owner if isinstance(owner, nn.Module) else target.__func__
    else:
        names = {}
    if isinstance(target, nn.Module):
        # torch.compile(m) is a module around m.
        yield Root("", getattr(target, "_orig_mod", target))
        return
    if isinstance(target, types.FunctionType):
        used = inspect.getclosurevars(target)
        names |= dict(used.globals) | dict(used.nonlocals)
    yield from (Root(k, v) for k, v in names.items() if isinstance(v, nn.Module))
