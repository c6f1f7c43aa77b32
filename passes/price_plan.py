"""Adds up what the ops that a dropout touches cost, for any choice of kept sets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import sympy
import torch
from torch import fx

from ..runtime.draw_rows import kept_in_all
from .cost_model import CostModel, OpCost, price
from .facts import KeptAxis
from .feature_dims import is_product
from .relation import is_tensor, shape_of, tensor_operands
from .row_plans import RowPlans
from .support import Form, Support, axes_in, is_zero


@dataclasses.dataclass(frozen=True)
class Choice:
    """A dropout that is structured: which dimension, in which blocks, how many stay."""

    axis: KeptAxis
    """The dimension of the mask, with ``inner`` 1."""
    block: int
    """Features per block."""
    n_blocks: int
    """Blocks in the dimension."""
    n_kept: int
    """Blocks that stay."""
    pattern: str = "block"
    """Which op draws them."""
    rows: RowPlans | None = None
    """With the pattern "row", the periods of every plan; the counts are then those of all plans."""
    counts: tuple[int, ...] = ()
    """With the pattern "row", the groups of each period in the plan that is compiled."""

    def in_plan(self, plan: int) -> Choice:
        """Returns the choice as one plan has it: itself, but with the pattern "row"."""
        if self.rows is None:
            return self
        counts = self.rows.counts[plan]
        n_kept = kept_in_all(self.n_blocks, counts)
        return dataclasses.replace(self, n_kept=n_kept, counts=counts)

    @property
    def keep(self) -> Fraction:
        """Share of the features that stay."""
        return Fraction(self.n_kept, self.n_blocks)

    @property
    def p_used(self) -> float:
        """Drop rate in effect."""
        return float(1 - self.keep) if self.rows is None else self.rows.rate


Chosen = Mapping[KeptAxis, Choice]


class PlanPricer:
    """Prices choices over one graph.

    Args:
        support: the facts of the graph.
        model: prices single ops.
        device: runs the graph.
    """

    def __init__(self, support: Support, model: CostModel, device: torch.device) -> None:
        self._support = support
        self._model = model
        self._device = device
        self._prices: dict[OpCost, float] = {}
        self._hints = _size_hints(support)
        self._touched = _touched(support)

    def touched_by(self, axis: KeptAxis) -> list[fx.Node]:
        """Returns the ops that dropping the dimension changes, and its mask."""
        return self._touched.get(axis, [])

    def seconds(self, nodes: Iterable[fx.Node], chosen: Chosen) -> float:
        """Returns the predicted time of some ops with their conversions."""
        total = 0.0
        tensors: dict[fx.Node, None] = {}
        for node in nodes:
            if node in self._support.masks:
                total += self._mask_seconds(node, chosen)
                tensors[node] = None
                continue
            relation = self._support.relations[node]
            if is_product(relation):
                total += self._price(self._product(node, chosen))
            tensors.update(dict.fromkeys(tensor_operands(node)))
            if is_tensor(node):
                tensors[node] = None
            else:
                tensors.update(dict.fromkeys(user for user in node.users if is_tensor(user)))
        return total + sum(self._conversion_seconds(tensor, chosen) for tensor in tensors)

    def flops(self, nodes: Iterable[fx.Node], chosen: Chosen) -> int:
        """Returns the FLOPs of the products among some ops, at the example batch."""
        products = (
            self._product(node, chosen)
            for node in nodes
            if node in self._support.relations and is_product(self._support.relations[node])
        )
        return sum(round(op.hint(op.flops)) for op in products)

    def _mask_seconds(self, mask: fx.Node, chosen: Chosen) -> float:
        if any(axis in chosen for axis in self._support.masks[mask].values()):
            return self._price(self._op("draw", mask, (), 0))
        shape = self._sizes(mask, (None,) * len(shape_of(mask)), chosen)
        return self._price(self._op("random", mask, shape, 0))

    def _product(self, node: fx.Node, chosen: Chosen) -> OpCost:
        support = self._support
        relation = support.relations[node]
        operands = tensor_operands(node)
        label_sizes: dict[int, sympy.Expr] = {}
        moved = sympy.Integer(0)
        for operand, dims, form in zip(
            operands, relation.operands, support.operand_forms(node, chosen), strict=True
        ):
            sizes = self._sizes(operand, form, chosen)
            moved += math.prod(sizes) * operand.meta["val"].element_size()
            for factors, size in zip(dims, sizes, strict=True):
                if len(factors) == 1:
                    label_sizes[factors[0].label] = size
        values = node.meta["val"]
        values = (
            [values] if isinstance(values, torch.Tensor) else [v for v in values if v is not None]
        )
        out_bytes = sum(_expr(v.numel()) * v.element_size() for v in values)
        flops = _expr(relation.product_flops) * math.prod(label_sizes.values())
        flops += _expr(relation.fixed_flops)
        return OpCost(
            "product",
            str(node.target),
            tuple(label_sizes[label] for label in sorted(label_sizes)),
            flops,
            moved + out_bytes,
            0,
            operands[0].meta["val"].dtype,
            self._hints,
        )

    def _conversion_seconds(self, tensor: fx.Node, chosen: Chosen) -> float:
        if is_zero(tensor) or tensor in self._support.masks:
            return 0.0
        have = self._support.form(tensor, chosen)
        total = 0.0
        for want in self.wanted_forms(tensor, chosen):
            if want != have:
                total += self._price(self._conversion(tensor, have, want, chosen))
        return total

    def _conversion(self, tensor: fx.Node, have: Form, want: Form, chosen: Chosen) -> OpCost:
        kind = "gather" if _cuts(have, want) else "expand"
        sizes = self._sizes(tensor, _finer(have, want), chosen)
        return self._op(kind, tensor, sizes, _run(tensor, have, want, chosen))

    def wanted_forms(self, tensor: fx.Node, chosen: Chosen) -> set[Form]:
        """Returns the forms that the users of a tensor want it in."""
        dense: Form = (None,) * len(shape_of(tensor))
        forms: set[Form] = set()
        for user in tensor.users:
            if user.target is torch.ops.aten.sym_size.int or user in self._support.masks:
                continue
            if user not in self._support.relations:
                forms.add(dense)
                continue
            operands = zip(
                tensor_operands(user), self._support.operand_forms(user, chosen), strict=True
            )
            forms.update(form for operand, form in operands if operand is tensor)
        return forms

    def _op(self, kind: str, node: fx.Node, sizes: tuple[sympy.Expr, ...], run: int) -> OpCost:
        elements = math.prod(sizes, start=sympy.Integer(1))
        value = node.meta["val"]
        return OpCost(
            kind,  # type: ignore[arg-type]
            str(node.target),
            sizes,
            elements,
            2 * elements * value.element_size(),
            run,
            value.dtype,
            self._hints,
        )

    def _sizes(self, node: fx.Node, form: Form, chosen: Chosen) -> tuple[sympy.Expr, ...]:
        return tuple(
            _expr(size) if axis is None else _expr(size) * _keep(axis, chosen)
            for size, axis in zip(shape_of(node), form, strict=True)
        )

    def _price(self, op: OpCost) -> float:
        if op not in self._prices:
            self._prices[op] = price(self._model, op, self._device)
        return self._prices[op]


def _keep(axis: KeptAxis, chosen: Chosen) -> sympy.Expr:
    keep = chosen[axis.scaled(1)].keep
    return sympy.Rational(keep.numerator, keep.denominator)


def _touched(support: Support) -> dict[KeptAxis, list[fx.Node]]:
    """Returns the ops that have a label with the axis, and the masks, for every axis."""
    touched: dict[KeptAxis, list[fx.Node]] = {}
    for node in support.relations:
        for axis in axes_in(support.labels(node).values()):
            touched.setdefault(axis, []).append(node)
    for mask, axes in support.masks.items():
        for axis in axes.values():
            touched.setdefault(axis, []).append(mask)
    return touched


def _cuts(have: Form, want: Form) -> bool:
    return any(w is not None and h is None for h, w in zip(have, want, strict=True))


def _finer(have: Form, want: Form) -> Form:
    """The form whose size bounds the work: the result of a gather, the result of an expand."""
    return (
        want
        if _cuts(have, want)
        else tuple(h if h == w else w for h, w in zip(have, want, strict=True))
    )


def _run(tensor: fx.Node, have: Form, want: Form, chosen: Chosen) -> int:
    """Returns the consecutive bytes that one block of a conversion covers."""
    value = tensor.meta["val"]
    runs = []
    for dim, (h, w) in enumerate(zip(have, want, strict=True)):
        axis = None if h == w else (w or h)
        if axis is not None:
            stride = value.stride(dim)
            span = stride if isinstance(stride, int) else 1
            runs.append(chosen[axis.scaled(1)].block * axis.inner * span * value.element_size())
    return min(runs, default=0)


def _expr(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _size_hints(support: Support) -> dict[sympy.Symbol, int]:
    """Returns the example's value of every size symbol."""
    hints: dict[sympy.Symbol, int] = {}
    nodes = {*support.relations, *support.masks}
    for node in list(nodes):
        nodes.update(tensor_operands(node))
    for node in nodes:
        values = node.meta["val"]
        for value in [values] if isinstance(values, torch.Tensor) else values:
            for size in () if value is None else value.shape:
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols - hints.keys():
                        hints[symbol] = _hint_of(size, symbol)
    return hints


def _hint_of(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    shape_env = size.node.shape_env
    # torch 2.11 has the older of the two names.
    names = ("backed_var_to_val", "var_to_val")
    known = getattr(shape_env, next(name for name in names if hasattr(shape_env, name)))
    return int(known.get(symbol, 8192))  # an unbacked size has no example: take it for large
