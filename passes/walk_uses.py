"""Walks from a dropped tensor to the products that read it and the sums that it is added in.

The walk goes in the order of the graph through everything but products, so that whatever it has
not reached when it comes to an op is no pointwise function of the dropped tensor. It ends at
products and at sums with such tensors, which keeps it short.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from .product_ops import Kind, Product
from .relation import is_tensor, shape_of, tensor_operands
from .summands import joins, summands_of
from .trace_origins import Made, Origins, is_shape_only, is_skip

aten = torch.ops.aten


class Use(enum.Flag):
    """What reads a tensor, maybe through ops that are no products."""

    NOTHING = 0
    WEIGHT = enum.auto()
    """A product with a weight."""
    CONVOLUTION = enum.auto()
    ACTIVATION = enum.auto()
    """A product with another activation."""
    RECURRENCE = enum.auto()
    AS_WEIGHT = enum.auto()
    """A product that has it in the place of its weight."""
    GATE = enum.auto()
    """An elementwise product with another activation."""


@dataclasses.dataclass
class Uses:
    """What a walk came to."""

    uses: Use = Use.NOTHING
    merges: list[fx.Node] = dataclasses.field(default_factory=list)
    """Where it is added to an activation that is no pointwise function of it."""
    convolved: list[fx.Node] = dataclasses.field(default_factory=list)
    """Inputs of the convolutions that read it."""


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What one mask drops."""

    carriers: frozenset[fx.Node]
    """The mask, and what is made of it alone."""
    products: tuple[fx.Node, ...]
    """The ops that multiply by it."""
    operands: tuple[fx.Node, ...]
    """What they multiply."""
    by_sample: bool
    """Whether the mask has one element for each sample, or one alone."""
    by_channel: bool
    """Whether it has one element for each channel of each sample, over several positions."""


class Walker:
    """Walks over one graph.

    Args:
        forward: the nodes that count, in order.
        results: those that the program gets.
        origins: where they come from.
    """

    def __init__(
        self, forward: Sequence[fx.Node], results: Collection[fx.Node], origins: Origins
    ) -> None:
        self._order = {node: index for index, node in enumerate(forward)}
        self._origins = origins
        self._lasting: set[fx.Node] = set()
        for node in reversed(forward):
            returned = node in results and not _is_scalar(node)
            users = self.users(node)
            if returned or any(x in origins.products or x in self._lasting for x in users):
                self._lasting.add(node)

    def users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the nodes of the forward that read the values of a node."""
        return (x for x in node.users if x in self._order and not is_shape_only(x))

    def walk(self, dropped: Dropped, *, past_merges: bool = False) -> Uses:
        """Returns what reads the dropped tensor.

        Args:
            dropped: what the mask drops.
            past_merges: whether to go on where the tensor is added to others.
        """
        found = Uses()
        reached = set(dropped.carriers)
        waiting: list[tuple[int, fx.Node]] = []
        queued: set[fx.Node] = set()

        def go_on(node: fx.Node) -> None:
            for user in self.users(node):
                if user not in queued and user not in dropped.carriers:
                    queued.add(user)
                    heapq.heappush(waiting, (self._order[user], user))

        for carrier in dropped.carriers:
            go_on(carrier)
        while waiting:
            _, node = heapq.heappop(waiting)
            product = self._origins.products.get(node)
            ends = product is not None and self._multiplies(product, reached, found)
            if self._is_merge(node, product, reached):
                found.merges.append(node)
                ends = ends or not past_merges
            if node not in dropped.products and self._gates(node, reached):
                found.uses |= Use.GATE
            if not ends and not _is_scalar(node):
                reached.add(node)
                go_on(node)
        return found

    def _multiplies(self, product: Product, reached: Collection[fx.Node], found: Uses) -> bool:
        """Notes a product and returns whether the walk ends at it."""
        inside = [x for x in product.factors if x in reached]
        if not inside:
            return False
        if product.kind is Kind.RECURRENT:
            found.uses |= Use.RECURRENCE
            return True
        others = [x for x in product.factors if x not in inside]
        weights = [self._origins.is_weight(product, x) for x in inside]
        if all(weights) and product.kind is not Kind.ATTENTION:
            found.uses |= Use.AS_WEIGHT
        elif others and all(self._origins.is_weight(product, x) for x in others):
            is_convolution = product.kind is Kind.CONVOLUTION
            found.uses |= Use.CONVOLUTION if is_convolution else Use.WEIGHT
            found.convolved += inside if is_convolution else []
        elif self._origins.mixes(product):
            if not any(self._origins[x].made & Made.SOFTMAX for x in inside):
                return False
            found.uses |= Use.ACTIVATION
        else:
            found.uses |= Use.ACTIVATION
        return True

    def _is_merge(
        self, node: fx.Node, product: Product | None, reached: Collection[fx.Node]
    ) -> bool:
        if product is not None:
            return product.addend in reached and not any(x in reached for x in product.factors)
        groups = summands_of(node)
        inside = [x for group in groups if any(x in reached for x in group) for x in group]
        outside = [x for group in groups if not any(x in reached for x in group) for x in group]
        return any(self._counts(node, x, inside) for x in outside)

    def _counts(self, node: fx.Node, operand: fx.Node, inside: Sequence[fx.Node]) -> bool:
        """Returns whether an operand of a sum is an activation that the tensor is merged with."""
        if not self._origins.is_activation_in(node, operand):
            return False
        origin = self._origins[operand]
        related = any(is_skip(origin, self._origins[x]) for x in inside)
        if joins(node):
            return related  # side by side nothing is added, but in dense connections
        # What ends in a number of a loss, as the difference to a target does, is no stream.
        return related or node in self._lasting

    def _gates(self, node: fx.Node, reached: Collection[fx.Node]) -> bool:
        if node.target not in (aten.mul.Tensor, aten.div.Tensor):
            return False
        operands = tensor_operands(node)
        # Data alone is a mask, unless there are several numbers of it for each that it multiplies.
        spread = any(x in reached and shape_of(x) != shape_of(node) for x in operands)
        outside = [self._origins[x] for x in operands if x not in reached]
        return any(
            (x.is_activation or (spread and x.of_data)) and not x.made & Made.SOFTMAX
            for x in outside
        )


def find_dropped(mask: fx.Node, walker: Walker, origins: Origins) -> Dropped:
    """Returns what a mask drops: what it, or what is made of it alone, is multiplied by."""
    carriers = {mask: shape_of(mask)}
    products: dict[fx.Node, None] = {}
    operands: dict[fx.Node, None] = {}
    shapes = []
    waiting = [mask]
    while waiting:
        carrier = waiting.pop()
        for user in walker.users(carrier):
            others = [x for x in user.all_input_nodes if _has_values(x, origins)]
            if others:
                products[user] = None
                operands |= dict.fromkeys(others)
                shapes.append((carriers[carrier], shape_of(user)))
            elif user not in carriers and is_tensor(user):
                spread = user.target is aten.expand.default
                carriers[user] = carriers[carrier] if spread else shape_of(user)
                waiting.append(user)
    kept = [_kept_dims(mask_shape, shape) for mask_shape, shape in shapes]
    return Dropped(
        frozenset(carriers),
        tuple(products),
        tuple(operands),
        by_sample=bool(kept) and all(dims is not None and dims <= {0} for dims in kept),
        by_channel=bool(kept) and all(dims is not None and 1 in dims <= {0, 1} for dims in kept),
    )


def _kept_dims(
    mask: Sequence[int | torch.SymInt], whole: Sequence[int | torch.SymInt]
) -> set[int] | None:
    """Returns the dimensions a mask has elements of its own for, None if it is shared in none."""
    mask = (1,) * (len(whole) - len(mask)) + tuple(mask)
    pairs = [(_is_one(a), _is_one(b)) for a, b in zip(mask, whole, strict=True)]
    if not any(of_mask and not of_whole for of_mask, of_whole in pairs):
        return None
    return {dim for dim, (of_mask, _) in enumerate(pairs) if not of_mask}


def _has_values(node: fx.Node, origins: Origins) -> bool:
    return origins[node].of_data or origins[node].of_weights


def _is_scalar(node: fx.Node) -> bool:
    return is_tensor(node) and not shape_of(node)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
