"""Saves are encoded by what backward uses them for, or left alone for a reason that is named."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor, fx, nn
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx  # noqa: F401  # some decompositions need it
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import ardd
from ardd.core.options import Options
from ardd.core.saves import SavedTensor, SaveReason
from ardd.passes import recompute_saves
from ardd.passes.classify_saves import never_negative, uses_of
from ardd.passes.compress_saves import CompressSaves, SavesResult
from ardd.passes.cut_graphs import Cut, bytes_of, root_of
from ardd.passes.merge_views import merge_views
from ardd.passes.recompute_saves import chain_of, recompute
from ardd.passes.save_layout import row_layout
from ardd.passes.smooth_uses import ErrorGrowth

from .tracing import trace

aten = torch.ops.aten
EAGER: dict[str, Any] = {"target": "eager", "pattern": "random", "strict": True}


def traced(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Traces a function to the ops that Inductor keeps, as the graphs of a cut have them."""
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


# ---- uses --------------------------------------------------------------------------------


def uses(
    fn: Callable[..., Any], saved: Tensor, *others: Tensor, grads: tuple[int, ...] = ()
) -> Any:
    """Returns the uses of the first input; the results numbered by ``grads`` are of parameters."""
    gm = traced(fn, saved, *(other.clone() for other in others))  # each a tensor of its own
    results: Any = gm.graph.output_node().args[0]
    results = results if isinstance(results, (tuple, list)) else (results,)
    first = gm.graph.find_nodes(op="placeholder")[0]
    return uses_of(first, {results[i] for i in grads}, ErrorGrowth(()))


X, G, W = torch.randn(8, 16), torch.randn(8, 4), torch.randn(16, 16)


def softmax_again(x: Tensor, g: Tensor) -> Tensor:
    return (x - x.detach().amax(-1, keepdim=True)).exp() * 2


@pytest.mark.parametrize(
    ("fn", "others", "expected"),
    [
        (lambda x, g: (g.t() @ x,), (G,), ("weight gradient",)),
        (lambda x, g: (x.t() @ g,), (G,), ("weight gradient",)),
        (lambda x, g: ((x.t() @ g).sum(0) * 0.5,), (G,), ("weight gradient",)),
        (lambda x, g: ((x.double().t() @ g.double()).float().view(4, 16),), (G,), None),
        (lambda x, g: ((x.t() @ g).relu(),), (G,), ("attention",)),
        (lambda x, g: ((x.t() @ g) * g.sum(),), (G,), ("attention",)),
        (lambda x, g: (torch.addmm(x, x.detach(), g),), (W,), None),
        (lambda x, g: (torch.where(x <= 0, 0.0, g),), (X,), ("sign",)),
        (lambda x, g: (torch.where(x.view(16, 8).t() > 1, 0.0, 1.0),), (X,), ("sign",)),
        (lambda x, g: (x * g,), (X,), ("pointwise",)),
        (lambda x, g: (x * g + x.sum(),), (X,), ("pointwise", "sum")),
        (lambda x, g: (torch.where(x <= 0, 0.0, g), g.t() @ x), (X,), ("sign", "weight gradient")),
        (lambda x, g: (x.cumsum(0),), (X,), ("cumsum",)),
        (softmax_again, (X,), None),
    ],
)
def test_uses(fn: Callable[..., Any], others: tuple[Tensor, ...], expected: Any) -> None:
    found = uses(fn, X, *others, grads=(0,) if expected != ("sign", "weight gradient") else (1,))
    if expected is not None:
        assert found == expected
    else:
        assert found


def test_types_are_uses() -> None:
    """A mask is used as a mask and an index as an index, whatever reads it."""
    assert uses(lambda m, g: m * g, X > 0, X) == ("mask",)
    assert uses(lambda i, g: g.gather(0, i), torch.zeros(8, 16, dtype=torch.int64), X) == ("index",)


def test_a_conversion_is_seen_through() -> None:
    fn: Any = lambda x, g: (x.double().t() @ g.double()).float()  # noqa: E731
    assert uses(fn, X, G, grads=(0,)) == ("weight gradient",)


def test_a_gradient_that_goes_on_is_no_weight_gradient() -> None:
    """Its error would reach what comes before in the program."""
    both: Any = lambda x, g: (x.t() @ g, (x.t() @ g).sum(0))  # noqa: E731
    assert uses(both, X, G, grads=(0, 1)) == ("weight gradient",)
    assert uses(both, X, G, grads=(0,)) == ("attention", "weight gradient")
    assert uses(lambda x, g: x.t() @ g, X, G) == ("attention",)


def test_what_is_exponentiated_is_sensitive() -> None:
    """``exp(x - max)``: an error of x is a factor of the result."""
    assert uses(lambda x, top: (x - top).exp(), X, X.amax(1, keepdim=True)) == ("softmax",)
    assert uses(lambda x, top: (x - top).sin(), X, X.amax(1, keepdim=True)) == ("pointwise",)
    assert uses(lambda x, top: (top - x).exp(), X, X.amax(1, keepdim=True)) == ("pointwise",)
    assert uses(lambda x, other: (x - other).exp(), X, X) == ("pointwise",)


def conv_backward(g: Tensor, x: Tensor, w: Tensor) -> Any:
    return aten.convolution_backward(
        *(g, x, w, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    )


def test_convolutions() -> None:
    """The input of one is an operand of its weight gradient, the weight is not."""
    x, w, g = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 8, 8)

    def of_input(x: Tensor, g: Tensor, w: Tensor) -> Any:
        return conv_backward(g, x, w)

    assert uses(of_input, x, g, w, grads=(1,)) == ("weight gradient",)
    assert uses(of_input, x, g, w) == ("convolution_backward",)  # the weight is computed
    assert uses(lambda w, g, x: conv_backward(g, x, w), w, g, x) == ("convolution_backward",)
    assert uses(conv_backward, g, x, w) == ("convolution_backward",)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.relu(), True),
        (lambda x: x.relu().view(16, 8).t().double(), True),
        (lambda x: x.relu() * 3 * x.sigmoid(), True),
        (lambda x: x.relu() * -3, False),
        (lambda x: x.relu() * x, False),
        (lambda x: x.relu() + 1, False),  # not proved
        (lambda x: x, False),
        (lambda x: F.pad(x.relu(), (1, 1)), True),
        (lambda x: (x > 0) * 2.0, True),
        (lambda x: F.max_pool2d(x[None, None], 2), False),
        (lambda x: x.exp() / 2, True),
        (lambda x: x.sin(), False),
    ],
)
def test_never_negative(fn: Callable[[Tensor], Tensor], expected: bool) -> None:
    (result,) = traced(fn, X).graph.output_node().args
    assert never_negative(result) == expected
    assert not (expected and (fn(X) < 0).any())


# ---- rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("sliced", [False, True])
def test_rows_of_permuted_tensors(order: tuple[int, ...], sliced: bool) -> None:
    """A row is what lies together in memory, and the tensor comes back with its strides."""
    x = torch.randn(4, 5, 80 if sliced else 40)
    x = (x[..., ::2] if sliced else x).permute(order)
    layout = row_layout(x, 1, 1)
    assert layout is not None
    rows = layout.to_rows(x)
    assert rows.is_contiguous()
    assert layout.row == rows.shape[-1] == 40
    back = layout.from_rows(rows)
    assert torch.equal(back, x)
    dense = torch.randn(4, 5, 40).permute(order)
    assert back.stride() == dense.stride()
    assert sliced or rows.data_ptr() == x.data_ptr(), "a copy where none is needed"


def test_rows_of_channels_last() -> None:
    x = torch.randn(2, 64, 6, 7).to(memory_format=torch.channels_last)
    layout = row_layout(x, 1, 1)
    assert layout is not None
    assert layout.tail == (64,)
    assert layout.to_rows(x).shape == (2, 6, 7, 64)
    assert layout.from_rows(layout.to_rows(x)).stride() == x.stride()


@pytest.mark.parametrize(
    ("shape", "shortest", "multiple", "row"),
    [
        ((8, 64), 64, 64, 64),
        ((8, 4, 16), 64, 64, 64),
        ((8, 4, 8), 64, 64, 256),
        ((3, 5), 64, 64, 15),
        ((6, 96), 64, 64, 576),  # 96 is no multiple of 64, 6 * 96 is
        ((5, 96), 64, 64, 96),  # neither is, and the shorter is better
        ((1, 1, 7), 1, 1, 7),
        ((7,), 64, 64, 7),
    ],
)
def test_short_rows_take_in_more(
    shape: tuple[int, ...], shortest: int, multiple: int, row: int
) -> None:
    x = torch.randn(shape)
    layout = row_layout(x, shortest, multiple)
    assert layout is not None
    assert layout.row == row
    assert torch.equal(layout.from_rows(layout.to_rows(x)), x)


@pytest.mark.parametrize(
    "x", [torch.randn(1, 5).expand(4, 5), torch.randn(4, 1).expand(4, 5), torch.tensor(1.0)]
)
def test_no_rows(x: Tensor) -> None:
    """Elements that share memory, or none to make a row of."""
    assert row_layout(x, 1, 1) is None


def test_rows_of_symbolic_sizes() -> None:
    """A row has a fixed length: it takes in no dimension that may differ, and starts with none."""
    gm = trace(
        lambda x, y: (x + 1, y.t() + 1), torch.randn(6, 40), torch.randn(40, 7), dynamic=True
    )
    x, y = (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
    assert row_layout(x, 1, 1) is None
    half = x.new_empty(x.shape[0], 40)
    layout = row_layout(half, 64, 64)
    assert layout is not None
    assert layout.row == 40
    assert row_layout(x.new_empty(40, x.shape[0]), 1, 1) is None
    turned = row_layout(y.new_empty(y.shape[0], 40).t(), 1, 1)
    assert turned is not None
    assert (turned.order, turned.row) == ((1, 0), 40)


# ---- graphs of a cut ---------------------------------------------------------------------


def graphs_of(
    fn: Callable[..., Any],
    *inputs: Tensor,
    change: Callable[[Cut], object] = lambda cut: None,
    save_all: bool = False,
    rounded: bool = False,
) -> Cut:
    """Cuts a function, lets ``change`` rewrite the two graphs, and proves the gradients by them.

    Args:
        fn: a function.
        *inputs: what it is called with.
        change: what is done to the cut.
        save_all: whether forward saves whatever backward reads, not what is best.
        rounded: whether the gradients may be those of rounded saves.
    """
    cuts: list[Cut] = []

    def partition(joint: fx.GraphModule, args: Any, **kwargs: Any) -> Any:
        how = default_partition if save_all else min_cut_rematerialization_partition
        forward, backward = how(joint, args, **kwargs)
        cut = Cut(forward, backward, kwargs["num_fwd_outputs"])
        change(cut)
        cut.tidy()
        cuts.append(cut)
        return forward, backward

    def run(gm: fx.GraphModule, args: Any) -> Any:
        return make_boxed_func(gm.forward)

    table = select_decomp_table()
    compiled = aot_function(fn, run, run, partition_fn=partition, decompositions=table)
    leaves = [x for x in inputs if x.requires_grad]
    got, expected = compiled(*inputs), fn(*inputs)
    got, expected = (y if isinstance(y, tuple) else (y,) for y in (got, expected))
    for y, y_expected in zip(got, expected, strict=True):
        torch.testing.assert_close(y, y_expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad([y.sum() for y in got], leaves)
    for a, b in zip(grads, torch.autograd.grad([y.sum() for y in expected], leaves), strict=True):
        if rounded:
            assert (a - b).norm() <= 0.4 * b.norm()
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    (cut,) = cuts
    return cut


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def names(cut: Cut) -> list[str]:
    return [str(node.target) for node, _ in cut.saves() if node.op != "placeholder"]


def node_of(cut: Cut, target: Any) -> fx.Node:
    found: fx.Node = cut.forward.graph.find_nodes(op="call_function", target=target)[0]
    return found


def test_chain_of_pointwise_ops() -> None:
    """The ops between a save and the sources, in order, conversions and views among them."""
    graph = traced(lambda x: (x.sin().double() * 2).view(16, 8).exp(), X).graph
    nodes = list(graph.nodes)
    assert chain_of(nodes[-2], {nodes[0]}) == nodes[1:-1]
    assert chain_of(nodes[-2], {nodes[-2], nodes[2]}) == nodes[3:-1]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x @ x.t()).exp(),
        lambda x: x.sum(0).exp(),
        lambda x: torch.rand_like(x).exp(),
        lambda x: F.dropout(x, 0.5) + 1,
        lambda x: x.cumsum(0),
    ],
)
def test_no_chain_of_other_ops(fn: Callable[[Tensor], Tensor]) -> None:
    """A product or a sum costs too much, and a draw would be another."""
    nodes = list(traced(fn, X).graph.nodes)
    assert chain_of(nodes[-2], {nodes[0]}) is None


def test_no_chain_without_its_sources() -> None:
    nodes = list(traced(lambda x, y: x.exp() + y, X, X).graph.nodes)
    assert chain_of(nodes[-2], {nodes[0]}) is None
    assert chain_of(nodes[-2], {nodes[0], nodes[1]}) == nodes[2:-1]


def test_no_long_chain() -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(recompute_saves.MOST_OPS + 2):
            x = x.sin()
        return x

    nodes = list(traced(long, X).graph.nodes)
    assert chain_of(nodes[-2], {nodes[0]}) is None
    assert chain_of(nodes[-10], {nodes[-20]}) == nodes[-19:-9]


def test_recomputed_saves() -> None:
    """The gradients are the same, and backward has the ops of the chain."""

    def change(cut: Cut) -> None:
        save, sources = node_of(cut, aten.exp.default), {n for n, _ in cut.saves()}
        sources |= set(cut.forward.graph.find_nodes(op="placeholder"))
        chain = chain_of(save, sources)
        assert chain is not None
        assert save in {node for node, _ in cut.saves()}
        recompute(cut, save, chain)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return x.sin().exp() @ w

    cut = graphs_of(fn, leaf(8, 16), leaf(16, 4), change=change, save_all=True)
    assert "aten.exp.default" not in names(cut)
    assert cut.backward.graph.find_nodes(op="call_function", target=aten.exp.default)


HALVES = {
    "slices": lambda h: (h[:, :16], h[:, 16:]),
    "chunks": lambda h: h.chunk(2, 1),
    "unbound": lambda h: h.view(-1, 2, 16).unbind(1),
    "turned": lambda h: (h[:, :16].t(), h[:, 16:].t()),
}


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_views_are_merged(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Halves of a product are saved as one, and backward takes it apart."""
    merged: list[fx.Node] = []

    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b = halves(x @ w)
        return a.sin() * b.cos()

    def change(cut: Cut) -> None:
        before = cut.saved_bytes()
        merged.extend(merge_views(cut, set()))
        cut.tidy()
        assert cut.saved_bytes() == before

    cut = graphs_of(fn, leaf(8, 16), leaf(16, 32), change=change, save_all=True)
    views = [node for node in merged if root_of(node).target is aten.mm.default]
    assert len(views) == 2
    assert "aten.mm.default" in names(cut)
    assert not {"<built-in function getitem>", "aten.slice.Tensor"} & set(names(cut))


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_views_are_encoded_once(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """The tensor is quantised, and its views are taken from it."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b = halves(x @ w)
        return a.sin() * b.cos()

    results: list[SavesResult] = []

    def change(cut: Cut) -> None:
        results.append(CompressSaves(Options(saves="int8")).apply(cut))

    graphs_of(fn, leaf(64, 16), leaf(16, 32), change=change, save_all=True, rounded=True)
    (product,) = (save for save in results[0].saves if "mm" in save.op and save.bytes_before)
    assert (product.encoding, product.bytes_after) == ("int8", 64 * 32 + 64 * 32 // 64 * 4)


@pytest.mark.parametrize("kind", ["a single view", "a part", "kept", "an input"])
def test_views_that_are_not_merged(kind: str) -> None:
    """One view alone, views of less than the whole, and of what is kept anyway."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = x if kind == "an input" else x @ w
        if kind == "a single view":
            return h.t().sin()
        if kind == "a part":
            return h[:2].sin() * h[2:4].cos()
        a, b = h.chunk(2, 0)
        return a.sin() * b.cos() + w.sum()

    def change(cut: Cut) -> None:
        printed = str(cut.forward.graph), str(cut.backward.graph)
        kept = {root_of(node) for node, _ in cut.saves()} if kind == "kept" else set()
        assert merge_views(cut, kept) == []
        assert printed == (str(cut.forward.graph), str(cut.backward.graph))

    graphs_of(fn, leaf(8, 8), leaf(8, 8), change=change, save_all=True)


def test_saved_bytes() -> None:
    """Two views count once, inputs and parameters nothing."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b = (x @ w).chunk(2, 1)
        return a.sin() * b.cos()

    cut = graphs_of(fn, leaf(8, 16), leaf(16, 32), save_all=True)
    roots = {root_of(node) for node, _ in cut.saves()}
    made = [root for root in roots if root.op != "placeholder"]
    assert aten.mm.default in {root.target for root in made}
    assert cut.saved_bytes() == sum(bytes_of(root) for root in made)
    assert sum(bytes_of(node) for node, _ in cut.saves()) > cut.saved_bytes()


def compressed(
    fn: Callable[..., Any], *inputs: Tensor, save_all: bool = False, **options: Any
) -> Any:
    """Returns the result of the pass on a cut, having run both graphs; only for exact ones."""
    results: list[SavesResult] = []

    def change(cut: Cut) -> None:
        results.append(CompressSaves(Options(**options)).apply(cut))

    graphs_of(fn, *inputs, change=change, save_all=save_all)
    return results[0]


def test_saves_off_touches_nothing() -> None:
    def change(cut: Cut) -> None:
        printed = str(cut.forward.graph), str(cut.backward.graph)
        result = CompressSaves(Options(saves="off")).apply(cut)
        assert not result.modified
        assert result.saves == ()
        assert result.bytes_before == result.bytes_after == cut.saved_bytes()
        assert printed == (str(cut.forward.graph), str(cut.backward.graph))

    graphs_of(lambda x: x.relu().exp(), leaf(64, 64), change=change)


def test_nothing_to_encode_touches_nothing() -> None:
    """``modified=False`` means the graphs as they were."""

    def change(cut: Cut) -> None:
        printed = str(cut.forward.graph), str(cut.backward.graph)
        result = CompressSaves().apply(cut)
        assert not result.modified
        assert printed == (str(cut.forward.graph), str(cut.backward.graph))

    graphs_of(lambda x, w: (x @ w).exp() @ w, leaf(64, 64), leaf(64, 64), change=change)


# ---- every reason ------------------------------------------------------------------------


def explained(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> ardd.Report:
    torch._dynamo.reset()  # or a shape of another call would be taken for one that differs
    report = ardd.explain(fn, *inputs, options=EAGER | options)
    (graph,) = report.graphs
    assert graph.failure is None
    assert graph.saved_bytes_before is not None
    assert graph.saved_bytes_after is not None
    assert graph.saved_bytes_after <= graph.saved_bytes_before
    assert graph.saved_bytes_after == sum(save.bytes_after for save in graph.saves)
    assert all(save.bytes_after <= save.bytes_before for save in graph.saves)
    for save in graph.saves:
        untouched = save.reason not in (
            *(SaveReason.ENCODED, SaveReason.RECOMPUTED, SaveReason.SAME_STORAGE),
        )
        assert untouched == (save.encoding == "as is" and save.reason != SaveReason.SAME_STORAGE)
        assert save.exact or save.reason in (SaveReason.ENCODED, SaveReason.RECOMPUTED)
    return report


def save_of(report: ardd.Report, op: str) -> SavedTensor:
    (found,) = (save for save in report.saves if op in save.op)
    return found


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))


class Gate(nn.Module):
    """Keeps what a comparison of products says: a mask that is cheaper to save than to compute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x @ self.weight > 0, x, 0.0)


def test_encoded() -> None:
    """Encoded by what backward uses them for: a mask is one bit."""
    report = explained(nn.Sequential(Gate(64), nn.Linear(64, 8)), leaf(32, 64))
    mask = next(save for save in report.saves if save.uses == ("mask",))
    assert (mask.reason, mask.encoding, mask.exact) == (SaveReason.ENCODED, "1 bit", True)
    assert (mask.bytes_before, mask.bytes_after) == (32 * 64, 32 * 64 // 8)
    assert mask.module == "0"
    assert mask.dtype == "bool"
    assert mask.shape == (32, 64)


@pytest.mark.parametrize(
    ("fn", "size", "encoding"),
    [
        (lambda x: x.sort(1).values, 300, "int16"),
        (lambda x: x.sort(1).values, 200, "uint8"),
        (lambda x: x.topk(20, 1).values, 300, "int16"),
        (lambda x: x.topk(100, 1).values, 256, "uint8"),
        (lambda x: x.max(1).values, 256, "uint8"),
        (lambda x: x.min(1, keepdim=True).values, 257, "int16"),
    ],
)
def test_indices_are_narrowed(fn: Callable[..., Any], size: int, encoding: str) -> None:
    """Indices of a known bound are saved in the smallest type that holds them."""
    report = explained(fn, leaf(64, size))
    (index,) = (save for save in report.saves if save.uses == ("index",))
    assert (index.reason, index.encoding, index.exact) == (SaveReason.ENCODED, encoding, True)


def test_a_sign_alone_is_one_bit() -> None:
    """A tensor that is only compared is saved as the result of comparing."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.relu(x @ w) * 2

    results: list[SavesResult] = []

    def change(cut: Cut) -> None:
        results.append(CompressSaves().apply(cut))

    graphs_of(fn, leaf(64, 16), leaf(16, 64), change=change, save_all=True)
    saved = next(s for s in results[0].saves if s.uses and set(s.uses) <= {"sign", "mask"})
    assert (saved.encoding, saved.reason) == ("1 bit", SaveReason.ENCODED)
    assert saved.bytes_after == 64 * 64 // 8


def test_relu_keeps_its_sign_apart() -> None:
    """The mask of a ReLU stays exact where its values lose something."""
    relu = save_of(explained(mlp(), torch.randn(32, 16), saves="nm"), "relu")
    assert relu.uses == ("sign", "weight gradient")
    assert (relu.encoding, relu.reason, relu.exact) == ("nm 4:16, 1 bit", SaveReason.ENCODED, False)
    # 4 of 16 values of 4 bytes, 4 bits each for the index, and a bit for the sign of all.
    assert relu.bytes_after == 32 * (16 * 4 + 16 // 2 + 64 // 8)


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        ({"saves": "nm"}, "nm 4:16, 1 bit"),
        ({"saves": "nm", "save_density": 0.5}, "nm 8:16, 1 bit"),
        ({"saves": "nm", "save_density": 0.01}, "nm 1:16, 1 bit"),
        ({"saves": "nm", "save_bits": 16}, "nm 4:16, bf16, 1 bit"),
        ({"saves": "nm", "save_bits": 8}, "nm 4:16, int8, 1 bit"),
        ({"saves": "topk"}, "top 64, 1 bit"),
        ({"saves": "topk", "save_bits": 4}, "top 64, int4, 1 bit"),
        ({"saves": "rows"}, "rows 16:64, 1 bit"),
        ({"saves": "rows", "save_density": 0.001}, "rows 1:64, 1 bit"),
        ({"saves": "sampled_rows"}, "sampled rows 16:64, 1 bit"),
        ({"saves": "int8"}, "int8 + sign"),
        ({"saves": "int4"}, "int4 + sign"),
        ({"saves": "mixed"}, "int8 + sign"),
        ({"saves": "mixed", "save_bits": 4}, "int4 + sign"),
    ],
)
def test_families(options: dict[str, Any], encoding: str) -> None:
    relu = save_of(explained(mlp(256), torch.randn(64, 16), **options), "relu")
    assert (relu.encoding, relu.reason) == (encoding, SaveReason.ENCODED)


def test_recomputed() -> None:
    """Computed again from other saves by pointwise ops: GELU and dropout, from what they read."""
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8))
    report = explained(model, torch.randn(32, 16), saves="mixed")
    product = save_of(report, "mul")
    assert (product.reason, product.encoding) == (SaveReason.RECOMPUTED, "recomputed")
    assert (product.exact, product.bytes_after) == (False, 0)  # from what is rounded
    assert "rand" not in report.backward


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_same_storage(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """A view of another save is taken from it, not saved twice."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b = halves(x @ w)
        return a.sin() * b.cos()

    result = compressed(fn, leaf(16, 16), leaf(16, 32), save_all=True)
    rows = [save for save in result.saves if save.reason is SaveReason.SAME_STORAGE]
    assert len(rows) == 2
    assert all((row.bytes_before, row.bytes_after) == (0, 0) for row in rows)
    assert any("mm" in save.op and save.bytes_before for save in result.saves)


@pytest.mark.parametrize("saves", ["exact", "int4"])
def test_no_bytes(saves: str) -> None:
    """An input, a parameter or a view of one is kept anyway, and never encoded."""
    report = explained(mlp(), torch.randn(32, 16), saves=saves)
    inputs = [save for save in report.saves if save.op.startswith("primals")]
    assert len(inputs) == 2
    assert {save.reason for save in inputs} == {SaveReason.NO_BYTES}
    assert all((s.bytes_before, s.bytes_after, s.encoding) == (0, 0, "as is") for s in inputs)


@pytest.mark.parametrize("saves", ["exact", "int4", "mixed"])
def test_user_output(saves: str) -> None:
    """What the program returns is kept anyway, and never encoded, nor a view of it."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x.relu()
        return h @ w, h.t()

    report = explained(fn, leaf(64, 64), leaf(64, 64), saves=saves)
    relu = save_of(report, "relu")
    assert (relu.reason, relu.encoding) == (SaveReason.USER_OUTPUT, "as is")
    assert report.saved_bytes_after == 0


def test_small() -> None:
    """Too small to be worth it."""
    report = explained(nn.Sequential(Gate(8), nn.Linear(8, 8)), leaf(4, 8))
    mask = next(save for save in report.saves if save.uses == ("mask",))
    assert (mask.reason, mask.encoding, mask.bytes_after) == (SaveReason.SMALL, "as is", 32)


def test_use_of_statistics() -> None:
    """Statistics of a norm are few bytes that whole rows depend on."""
    model = nn.Sequential(nn.Linear(16, 256), nn.LayerNorm(256), nn.Linear(256, 8))
    report = explained(model, torch.randn(128, 16), saves="int8")
    statistics = [save for save in report.saves if save.shape == (128, 1)]
    assert statistics
    assert {save.reason for save in statistics} == {SaveReason.USE}
    assert any(save.reason is SaveReason.ENCODED for save in report.saves)


def test_exact_only() -> None:
    """No exact encoding is smaller, and saves allows no other."""
    relu = save_of(explained(mlp(), torch.randn(32, 16)), "relu")
    assert (relu.reason, relu.encoding) == (SaveReason.EXACT_ONLY, "as is")


@pytest.mark.parametrize("saves", ["nm", "topk", "rows", "sampled_rows"])
def test_use_of_features(saves: str) -> None:
    """Backward multiplies by it: features may be dropped of operands of weight gradients alone."""
    report = explained(lambda x, w: x.mm(w).exp() * 2, leaf(64, 64), leaf(64, 64), saves=saves)
    product = save_of(report, "mm")
    assert product.uses == ("pointwise",)
    assert (product.reason, product.encoding) == (SaveReason.USE, "as is")


def test_use_of_an_unknown_op() -> None:
    """No loss is allowed for an op that is not known to bear it."""
    report = explained(lambda x: x.sin().cumprod(0) * 2, leaf(64, 64), saves="int4")
    product = save_of(report, "cumprod")
    assert "gather" in product.uses
    assert (product.reason, product.encoding) == (SaveReason.USE, "as is")


@pytest.mark.parametrize(
    "options",
    [
        {"saves": "nm", "save_density": 1.0},
        {"saves": "topk", "save_density": 1.0},
        {"saves": "rows", "save_density": 1.0},
        {"saves": "rows", "save_density": 1},
    ],
)
def test_unsupported(options: dict[str, Any]) -> None:
    """No encoding of this family holds such rows: kept whole they are not smaller."""
    relu = save_of(explained(mlp(), torch.randn(32, 16), **options), "relu")
    assert (relu.reason, relu.encoding) == (SaveReason.UNSUPPORTED, "as is")


def test_rows_need_a_matrix() -> None:
    """The input of a convolution has no rows of tokens."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3))
    report = explained(model, torch.randn(2, 3, 16, 16), saves="rows")
    saved = save_of(report, "sigmoid")
    assert saved.reason in (SaveReason.UNSUPPORTED, SaveReason.USE)
    assert saved.encoding == "as is"


def above_0(x: Tensor) -> Tensor:
    """Drops what stands where a running sum is negative, which is saved as a mask."""
    return torch.where(x.cumsum(0) > 0, x, 0.0)


def test_dynamic() -> None:
    """Its rows have no fixed length."""
    x = leaf(32, 80)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 1)
    report = ardd.explain(above_0, x, options=EAGER)
    mask = next(save for save in report.saves if save.uses == ("mask",))
    assert (mask.reason, mask.encoding) == (SaveReason.DYNAMIC, "as is")
    assert mask.bytes_after == 32 * 80


def test_dynamic_batches_are_encoded() -> None:
    """Only the length of a row has to be fixed."""
    x = leaf(32, 80)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    report = ardd.explain(above_0, x, options=EAGER)
    mask = next(save for save in report.saves if save.uses == ("mask",))
    assert isinstance(mask.shape[0], str)
    assert (mask.reason, mask.encoding) == (SaveReason.ENCODED, "1 bit")
    assert mask.bytes_after == 32 * 80 // 8


def test_overlapping() -> None:
    """Elements of it share memory: it is smaller than it looks."""

    def expanded(x: Tensor) -> Tensor:
        mask = (x.sum(0, keepdim=True) > 0).expand(8, 512)
        return torch.where(mask, x, 0.0)

    result = compressed(expanded, leaf(8, 512), save_all=True)
    (mask,) = (save for save in result.saves if save.dtype == "bool")
    assert (mask.reason, mask.bytes_before) == (SaveReason.OVERLAPPING, 512)


def test_budget() -> None:
    """The memory budget is met without."""
    report = explained(mlp(), torch.randn(32, 16), saves="int8", memory_budget=1.0)
    relu = save_of(report, "relu")
    assert (relu.reason, relu.encoding) == (SaveReason.BUDGET, "as is")


def test_every_reason_has_a_test() -> None:
    tested = {name.removeprefix("test_").split("_of_")[0] for name in globals()}
    tested |= {"huge_values", "parameters"}  # in tests/backends/test_saves_rough.py
    missing = [r.name for r in SaveReason if r.name.lower() not in tested]
    assert missing == []


# ---- what is encoded, and what is not ------------------------------------------------------


def test_the_sensitive_keep_8_bits() -> None:
    """What is exponentiated relative to its maximum has 8 bits where all else has 4."""

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x.sin() @ w, torch.arange(64))

    report = explained(loss, leaf(64, 64), leaf(64, 64), saves="int4")
    assert any("softmax" in save.uses for save in report.saves)
    for save in report.saves:
        if save.reason is SaveReason.ENCODED:
            wanted = "int8" if "softmax" in save.uses else "int4"
            assert save.encoding.startswith(wanted)


def test_comparing_another_number_keeps_its_bit() -> None:
    """The sign of a quantised tensor is its own only if it is compared with 0."""
    report = explained(mlp(), torch.randn(32, 16), saves="int8")
    assert save_of(report, "relu").encoding == "int8 + sign"

    def clipped(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.hardtanh(x @ w, 0.0, 6.0) @ v

    report = explained(clipped, leaf(64, 64), leaf(64, 64), leaf(64, 64), saves="int8")
    for save in report.saves:
        assert save.encoding != "int8 + sign"


def test_parts_have_one_name_in_both_graphs() -> None:
    """What forward saves is what backward takes, whatever the names."""
    report = explained(mlp(), torch.randn(32, 16), saves="nm")
    (graph,) = report.graphs
    head = next(line for line in graph.backward.splitlines() if "def forward" in line)
    returned = graph.forward.split("return ")[-1]
    assert "saved_" in head
    for argument in head.split("(", 1)[1].split(","):
        name = argument.split(":")[0].strip()
        if name.startswith("saved_"):
            assert name in returned


def test_operators_named() -> None:
    """The report names the op that makes a tensor, not the view that is saved."""
    report = explained(mlp(), torch.randn(32, 16))
    assert operator.attrgetter("op", "module")(save_of(report, "relu")) == (
        "aten.relu.default",
        "1",
    )
