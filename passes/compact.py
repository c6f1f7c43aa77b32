"""Rewrites a graph so that every tensor with a chosen fact is computed on its kept part only.

    %mask = ardd.dropout_mask(%x, ...)          %kept, %slot = ardd.draw_blocks(128, 64)
    %y = mul(%x, %mask)                    =>   %y = mul(%x_kept, 2.0)
    %z = mm(%y, %w)                             %z = mm(%y, index(%w, kept))

1. A tensor that is stored cut and wanted whole is expanded: legal where it is zero outside.
2. A tensor that is stored whole and wanted cut is gathered, once for all users of the same form.
3. An op keeps its place and its operands' order; only sizes change.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

from .emit import Emitter, fake_mode_of
from .facts import KeptAxis
from .kept_sets import KeptSet, draw, expand, gather
from .price_plan import Choice
from .relation import is_tensor, shape_of, tensor_operands
from .rules.layout import SQUEEZES, squeezed_dims
from .seed_masks import after_seeds
from .settle_layouts import settled_layouts
from .support import Form, Support, is_zero

aten = torch.ops.aten


def compact(
    graph: fx.Graph,
    support: Support,
    means: Mapping[fx.Node, float],
    chosen: Mapping[KeptAxis, Choice],
) -> None:
    """Rewrites the graph in place.

    Args:
        graph: the analysed graph.
        support: its facts.
        means: the mean of every mask.
        chosen: the dropouts that are structured; all other masks are left as they are.
    """
    with settled_layouts(graph):
        _Compactor(graph, support, means, chosen).run()


class _Compactor:
    def __init__(
        self,
        graph: fx.Graph,
        support: Support,
        means: Mapping[fx.Node, float],
        chosen: Mapping[KeptAxis, Choice],
    ) -> None:
        self._graph = graph
        self._support = support
        self._means = means
        self._chosen = chosen
        self._emit = Emitter(graph, fake_mode_of(graph))
        self._kept: dict[KeptAxis, KeptSet] = {}
        self._scales: dict[fx.Node, float] = {}
        self._stored: dict[fx.Node, fx.Node] = {}
        self._converted: dict[tuple[fx.Node, Form], fx.Node] = {}

    def run(self) -> None:
        nodes = list(self._graph.nodes)
        self._draw_all(nodes)
        for node in nodes:
            if node.op == "output":
                self._rewrite_output(node)
            elif node in self._support.masks:
                self._rewrite_mask(node)
            elif node.op == "call_function":
                self._rewrite_op(node)
        for node in reversed(nodes):
            if node in self._stored and not node.users:
                self._graph.erase_node(node)
        self._graph.eliminate_dead_code()

    def _draw_all(self, nodes: list[fx.Node]) -> None:
        """Draws every kept set first, in the order of the dropouts.

        The products before a dropout use its kept set as well.
        """
        start = after_seeds(self._graph)
        for mask in self._support.masks:
            for axis in self._support.masks[mask].values():
                if axis in self._chosen:
                    self._kept[axis] = draw(self._emit, start, mask, self._chosen[axis])

    def _rewrite_mask(self, mask: fx.Node) -> None:
        """A kept part of a mask is constant."""
        like = mask.args[0]
        assert isinstance(like, fx.Node)
        like = self._stored.get(like, like)  # only its symbolic sizes matter, which no form cuts
        form = self._support.form(mask, self._chosen)
        dim = next((dim for dim, axis in enumerate(form) if axis is not None), None)
        axis = None if dim is None else form[dim]
        if dim is None or axis is None:
            mask.args = (like, *mask.args[1:])
            return
        choice = self._chosen[axis]
        sizes = self._emit.sizes(mask, mask, like)
        sizes[dim] = choice.n_kept * choice.block
        value = mask.meta["val"]
        scale = float(self._means[mask] / choice.keep)
        constant = self._emit.op(
            mask, aten.full.default, sizes, scale, dtype=value.dtype, device=value.device
        )
        self._stored[mask] = constant
        self._scales[constant] = scale

    def _rewrite_op(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            if source in self._stored:
                new = self._emit.op(node, operator.getitem, self._stored[source], index)  # type: ignore[index]
                self._stored[node] = new
            return
        if node.target is aten.sym_size.int:  # a symbolic size, which no form cuts
            tensor, dim = node.args
            node.args = (self._stored.get(tensor, tensor), dim)  # type: ignore[arg-type]
            return
        wanted = self._support.operand_forms(node, self._chosen)
        operands = tensor_operands(node)
        cut = any(axis is not None for form in wanted for axis in form)
        if node in self._support.relations:
            cut = cut or any(axis is not None for form in self._output_forms(node) for axis in form)
        if not cut:
            if any(operand in self._stored for operand in operands):
                node.args, node.kwargs = self._with_operands(node, wanted)
            return
        args, kwargs = self._with_operands(node, wanted)
        relation = self._support.relations[node]
        if node.target is aten.mul.Tensor:
            args = self._scaled(node, args)
        if relation.sizes is not None:
            position, dims = relation.sizes
            form = self._support.dims_form(node, dims, self._chosen)
            args = (
                *args[:position],
                self._cut_sizes(args[position], form, node),
                *args[position + 1 :],
            )
        target: Any = node.target
        if target in SQUEEZES:  # a dimension that is cut to size 1 must stay
            target, args = aten.squeeze.dims, (args[0], squeezed_dims(node))
        if target in (aten.view.default, aten._unsafe_view.default):
            self._stored[node] = self._emit.view(node, *args)
        else:
            self._stored[node] = self._emit.op(node, target, *args, **kwargs)

    def _scaled(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiplies by the number that a kept part of a mask is, not by a tensor of it.

        A number keeps its precision where the tensor would be rounded to bf16.
        """
        for mask, x in (args, reversed(args)):
            if mask in self._scales and isinstance(x, fx.Node):
                same_type = mask.meta["val"].dtype == x.meta["val"].dtype
                if same_type and _broadcasts_to(shape_of(mask), shape_of(x)):
                    return (x, self._scales[mask])
        return args

    def _output_forms(self, node: fx.Node) -> list[Form]:
        return [
            self._support.dims_form(node, output.dims, self._chosen)
            for output in self._support.relations[node].outputs
            if output is not None
        ]

    def _with_operands(self, node: fx.Node, wanted: list[Form]) -> tuple[Any, Any]:
        """Returns the node's arguments with every tensor in its wanted form."""
        forms = iter(wanted)
        return fx.map_arg(
            (node.args, node.kwargs),
            lambda x: self._convert(x, next(forms), node) if is_tensor(x) else x,
        )

    def _cut_sizes(self, sizes: Any, form: Form, before: fx.Node) -> list[Any]:
        return [
            size if axis is None else self._cut_size(size, self._chosen[axis.scaled(1)], before)
            for size, axis in zip(sizes, form, strict=True)
        ]

    def _cut_size(self, size: Any, choice: Choice, before: fx.Node) -> Any:
        if not isinstance(size, fx.Node):
            return size if size == -1 else int(size * choice.keep)
        # Symbolic where a dimension of unknown size is merged with the one that is cut.
        kept = self._emit.op(before, operator.mul, size, choice.n_kept)
        return self._emit.op(before, operator.floordiv, kept, choice.n_blocks)

    def _convert(self, node: fx.Node, want: Form, before: fx.Node) -> fx.Node:
        stored = self._stored.get(node, node)
        have = self._support.form(node, self._chosen)
        if want == have:
            return stored
        if (node, want) not in self._converted:
            # What is an input stays in memory anyway, and to gather it again costs 1 % of a step
            # at batch 128: the gathered part of a weight is not worth its memory.
            again = _is_input(node)
            policy = self._emit.marked(CheckpointPolicy.MUST_RECOMPUTE)
            with policy if again else contextlib.nullcontext():
                self._converted[node, want] = self._change_form(node, stored, have, want, before)
        return self._converted[node, want]

    def _change_form(
        self, node: fx.Node, x: fx.Node, have: Form, want: Form, before: fx.Node
    ) -> fx.Node:
        zero = self._support.zero(node)
        changed = [d for d in range(len(want)) if have[d] != want[d]]
        if is_zero(node):
            sizes = self._cut_sizes(node.args[0], want, before)
            return self._emit.op(before, node.target, sizes, *node.args[1:], **node.kwargs)
        for dim in changed:  # gathers first: what follows has less to move
            axis = want[dim]
            if have[dim] is None and axis is not None:
                x = gather(self._emit, before, x, dim, axis, self._kept[axis.scaled(1)])
        for dim in changed:
            axis = have[dim]
            if axis is not None:
                assert axis in zero[dim], f"{node} is not zero outside {axis}"
                x = expand(self._emit, before, x, dim, axis, self._kept[axis.scaled(1)])
                wanted = want[dim]
                if wanted is not None:
                    x = gather(self._emit, before, x, dim, wanted, self._kept[wanted.scaled(1)])
        return x

    def _rewrite_output(self, output: fx.Node) -> None:
        def dense(node: fx.Node) -> fx.Node:
            if not is_tensor(node):
                return node
            return self._convert(node, (None,) * len(shape_of(node)), output)

        output.args = fx.map_arg(output.args, dense)


def _is_input(node: fx.Node) -> bool:
    """Returns whether the tensor is an input, or one that every group of rows reads."""
    source = node.args[0] if node.target is aten.expand.default else node
    return isinstance(source, fx.Node) and source.op == "placeholder"


def _broadcasts_to(
    shape: Sequence[int | torch.SymInt], whole: Sequence[int | torch.SymInt]
) -> bool:
    """Returns whether a product of the two shapes has the second one."""
    return len(shape) <= len(whole) and all(
        statically_known_true(a == b) or statically_known_true(a == 1)
        for a, b in zip(reversed(shape), reversed(whole), strict=False)
    )
