"""Traces where every tensor of a forward graph comes from: weights, data, products, streams.

One sweep. Two sets say how tensors hang together, each an integer with one bit for every source
(a product, an input, an embedding): ``direct`` are the sources that reach a tensor without a
product in between, ``below`` all that lie behind those. A sum is a *skip* if a direct source of one
operand is below the other: ``x + f(x)``. Two products of separate inputs give no such sum.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Collection, Sequence
from typing import Final

import torch
from torch import fx

from ..runtime.dropout_mask import dropout_mask
from .find_softmax import is_softmax
from .product_ops import Kind, Product, product_of
from .relation import is_tensor, shape_of
from .summands import summands_of
from .trace_channels import Channels, trace_channels

aten = torch.ops.aten


class Made(enum.Flag):
    """What the values of a tensor were made by, back to the last products."""

    NOTHING = 0
    INPUT = enum.auto()
    """Data, or parameters looked up by data."""
    PRODUCT = enum.auto()
    """A product with a weight, or of activations."""
    RECURRENCE = enum.auto()
    STREAM = enum.auto()
    """A sum of a tensor and something computed from it."""
    SOFTMAX = enum.auto()


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one tensor comes from."""

    of_weights: bool = False
    """Whether it depends on parameters."""
    of_data: bool = False
    """Whether it depends on inputs that are no parameters."""
    made: Made = Made.NOTHING
    direct: int = 0
    below: int = 0
    channels: Channels | None = None
    """Its dimension of channels where a convolution made it."""

    @property
    def computed(self) -> bool:
        """Whether a product lies behind it."""
        return bool(self.made & (Made.PRODUCT | Made.RECURRENCE))

    @property
    def is_activation(self) -> bool:
        """Whether it depends on data by way of parameters."""
        return self.of_data and (self.of_weights or self.computed)


def is_skip(one: Origin, other: Origin) -> bool:
    """Returns whether one of two tensors is computed, through a product, from the other.

    What both hold as it is does not count: ``x`` and ``x * gate(x)`` are no skip connection.
    """
    forth = one.direct & other.below & ~other.direct
    back = other.direct & one.below & ~one.direct
    return bool(forth or back)


class Origins:
    """The origins of a graph's forward nodes.

    Args:
        forward: the nodes that count, in order.
        parameters: the inputs that are parameters. If there are none, the last factor of a matrix
            product or convolution is taken for its weight where it comes from the inputs alone.
        states: inputs that the graph overwrites, such as running statistics: constants.
    """

    def __init__(
        self,
        forward: Sequence[fx.Node],
        parameters: Collection[fx.Node],
        states: Collection[fx.Node],
    ) -> None:
        self.products: dict[fx.Node, Product] = {}
        self._plain = not parameters
        self._of: dict[fx.Node, Origin] = {}
        self._sources = itertools.count()
        for node in forward:
            if node.op == "placeholder" and node in parameters:
                self._of[node] = Origin(of_weights=True)
            elif node.op == "placeholder" and is_tensor(node) and node not in states:
                self._of[node] = self._source(Origin(of_data=True), Made.INPUT)
            elif node.op == "call_function" and not is_shape_only(node):
                self._of[node] = self._computed(node)

    def __getitem__(self, node: fx.Node) -> Origin:
        """Returns the origin of a node; that of a constant for one that is not traced."""
        return self._of.get(node, _CONSTANT)

    def is_weight(self, product: Product, factor: fx.Node) -> bool:
        """Returns whether a factor is a weight.

        Data or a constant in the place of a weight counts if it multiplies an activation, as it is
        frozen then, or if the graph is that of a function of plain tensors.
        """
        if self._of_weights_alone(factor):
            return True
        if factor is not product.factors[-1] or product.kind not in _WEIGHT_LAST:
            return False
        plain = self._plain or any(self[x].is_activation for x in product.factors[:-1])
        return plain and not self[factor].is_activation

    def _of_weights_alone(self, node: fx.Node) -> bool:
        return self[node].of_weights and not self[node].of_data

    def mixes(self, product: Product) -> bool:
        """Returns whether it multiplies by what no parameter is in, such as an adjacency."""
        acts = self._activations(product)
        if product.kind in (Kind.RECURRENT, Kind.ATTENTION):
            return False
        return len(acts) > 1 and any(not self[act].is_activation for act in acts)

    def _activations(self, product: Product) -> list[fx.Node]:
        return [x for x in product.factors if not self.is_weight(product, x)]

    def _source(self, origin: Origin, made: Made) -> Origin:
        return dataclasses.replace(origin, made=made, direct=1 << next(self._sources))

    def _computed(self, node: fx.Node) -> Origin:
        product = product_of(node)
        if product is not None and product.candidates:
            weights = [x for x in product.factors if self._of_weights_alone(x)]
            product = product if len(weights) == 1 and weights[0] in product.candidates else None
        if product is None:
            return self._passed_on(node)
        self.products[node] = product
        origin = self._multiplied(node, product)
        if product.addend is not None and self[product.addend].of_data:
            origin = self._merged(node, [origin, self[product.addend]], adds=True)
        return origin

    def _multiplied(self, node: fx.Node, product: Product) -> Origin:
        acts = [self[act] for act in self._activations(product)]
        if not any(act.of_data for act in acts):
            of_weights = any(self[x].of_weights for x in product.factors)
            return Origin(of_weights, any(self[x].of_data for x in product.factors))
        if self.mixes(product):
            computed = [act for act in acts if act.is_activation]
            return self._merged(node, computed or acts, adds=False)
        made = Made.PRODUCT
        if product.kind is Kind.RECURRENT:
            made = Made.RECURRENCE
        elif len(acts) > 1:
            for act in acts:
                made |= act.made & (Made.INPUT | Made.STREAM)
        below = 0
        for act in acts:
            below |= act.direct | act.below
        origin = self._source(Origin(True, True, below=below), made)
        if product.kind is Kind.CONVOLUTION and len(shape_of(node)) > 2:
            origin = dataclasses.replace(origin, channels=(1, shape_of(node)[1]))
        return origin

    def _passed_on(self, node: fx.Node) -> Origin:
        operands = [x for x in node.all_input_nodes if self[x] is not _CONSTANT]
        numbers = [x for x in operands if not _is_integer(x)]
        if operands and not any(self[x].of_data for x in numbers):
            origin = self._merged(node, [self[x] for x in operands], adds=False)
            if not origin.of_data or not numbers:
                return origin
            return self._source(dataclasses.replace(origin, below=0), Made.INPUT)  # looked up
        used = [x for x in numbers if self[x].of_data]
        if any(self[x].computed for x in used):
            used = [x for x in used if self.is_activation_in(node, x) or self[x].computed]
        of_weights = any(self[x].of_weights for x in operands)
        origin = self._merged(node, [self[x] for x in used], adds=bool(summands_of(node)))
        origin = dataclasses.replace(
            origin,
            of_weights=origin.of_weights or of_weights,
            channels=trace_channels(node, {x: self[x].channels for x in used}),
        )
        if is_softmax(node):
            origin = dataclasses.replace(origin, made=origin.made | Made.SOFTMAX)
        return origin

    def is_activation_in(self, node: fx.Node, operand: fx.Node) -> bool:
        """Returns whether an operand brings data of its own to a pointwise op.

        What no product has made and is broadcast, such as the encoding of a position or a mask of
        attention, does not; nor do integers.
        """
        origin = self[operand]
        if not origin.of_data or _is_integer(operand):
            return False
        if not is_tensor(node) or origin.computed:
            return True
        if not summands_of(node):
            return origin.of_weights
        while operand.target is aten.expand.default:
            (operand, *_) = operand.all_input_nodes
        whole, part = shape_of(node), shape_of(operand)
        part = (1,) * (len(whole) - len(part)) + part
        return not any(_is_one(p) and not _is_one(w) for p, w in zip(part, whole, strict=False))

    def _merged(self, node: fx.Node, given: Sequence[Origin], *, adds: bool) -> Origin:
        made, direct, below = Made.NOTHING, 0, 0
        for origin in given:
            made, direct, below = made | origin.made, direct | origin.direct, below | origin.below
        adds = adds and len(given) > 1
        if adds and any(is_skip(a, b) for a, b in itertools.combinations(given, 2)):
            made |= Made.STREAM
        if adds or not all(origin.made & Made.SOFTMAX for origin in given):
            made &= ~Made.SOFTMAX
        of_weights = any(origin.of_weights for origin in given)
        of_data = any(origin.of_data for origin in given)
        return Origin(of_weights, of_data, made, direct, below)


def is_shape_only(node: fx.Node) -> bool:
    """Returns whether an op reads no values of its operands, only their shapes, or is no tensor."""
    if node.target is dropout_mask or isinstance(node.meta.get("val"), _NUMBERS):
        return True
    name = str(getattr(node.target, "__name__", "")).partition(".")[0]
    return name.endswith("_like") or name.startswith("new_")


def _is_integer(node: fx.Node) -> bool:
    return is_tensor(node) and not node.meta["val"].dtype.is_floating_point


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


_CONSTANT: Final = Origin()
_NUMBERS: Final = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_WEIGHT_LAST: Final = (Kind.MATRIX, Kind.CONVOLUTION)
