"""Tests of attention written out: torch's own numbers, whatever the arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ardd.core.decisions import Reason
from ardd.core.errors import DropoutRateError
from ardd.passes.attention_calls import keep_autocast
from ardd.passes.mark_dropout import MarkDropout
from ardd.passes.write_out_attention import WriteOutAttention

from .attention import Rewritten, maths, rewrite
from .marking import graphs_in, random_calls

pytestmark = pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing")
SDPA = F.scaled_dot_product_attention
NAME = "scaled_dot_product_attention"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def qkv(
    query: tuple[int, ...] = (2, 4, 5, 8),
    key: tuple[int, ...] = (2, 4, 7, 8),
    value: tuple[int, ...] = (2, 4, 7, 3),
) -> tuple[Tensor, Tensor, Tensor]:
    return randn(*query), randn(*key), randn(*value)


def allowed(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


def one_row_sees_nothing() -> Tensor:
    mask = allowed(2, 1, 5, 7)
    mask[0, 0, 2] = False
    return mask


# name -> q, k, v; the attention mask; further arguments
CASES: Mapping[str, Callable[[], tuple[tuple[Tensor, ...], Tensor | None, dict[str, Any]]]] = {
    "plain": lambda: (qkv(), None, {}),
    "2-D": lambda: (qkv((5, 8), (7, 8), (7, 3)), None, {}),
    "3-D": lambda: (qkv((4, 5, 8), (4, 7, 8), (4, 7, 3)), None, {}),
    "5-D": lambda: (qkv((2, 1, 4, 5, 8), (1, 3, 4, 7, 8), (4, 7, 3)), None, {}),
    "broadcast": lambda: (qkv((2, 4, 5, 8), (1, 4, 7, 8), (7, 3)), None, {}),
    "one size of head": lambda: (qkv(value=(2, 4, 7, 8)), None, {}),
    "scale": lambda: (qkv(), None, {"scale": 0.7}),
    "integer scale": lambda: (qkv(), None, {"scale": 2}),
    "negative scale": lambda: (qkv(), None, {"scale": -0.3}),
    "no scale at all": lambda: (qkv(), None, {"scale": 0.0}),
    "causal": lambda: (qkv(), None, {"is_causal": True}),
    "causal, longer query": lambda: (qkv((2, 4, 9, 8)), None, {"is_causal": True}),
    "boolean mask": lambda: (qkv(), allowed(5, 7), {}),
    "boolean mask of a batch": lambda: (qkv(), allowed(2, 1, 1, 7), {}),
    "a row that sees nothing": lambda: (qkv(), one_row_sees_nothing(), {}),
    "float mask": lambda: (qkv(), randn(5, 7), {}),
    "float32 mask": lambda: (qkv(), torch.randn(4, 5, 7), {}),
    "float mask that hides": lambda: (
        qkv(),
        torch.zeros(5, 7).masked_fill(~allowed(5, 7), -torch.inf).double(),
        {},
    ),
    "grouped": lambda: (qkv(key=(2, 2, 7, 8), value=(2, 2, 7, 3)), None, {"enable_gqa": True}),
    "grouped, two ways": lambda: (
        qkv(key=(2, 2, 7, 8), value=(2, 1, 7, 3)),
        allowed(5, 7),
        {"enable_gqa": True},
    ),
    "grouped, causal": lambda: (
        qkv(key=(2, 1, 7, 8), value=(2, 1, 7, 3)),
        None,
        {"enable_gqa": True, "is_causal": True},
    ),
    "no groups": lambda: (qkv(), None, {"enable_gqa": True}),
}


def check(
    rewritten: Rewritten, tensors: list[Tensor], mask: Tensor | None, p: float, more: dict[str, Any]
) -> None:
    """Compares values, gradients and their gradients with torch's own."""
    assert NAME not in rewritten.calls
    assert not random_calls(rewritten.gm)
    leaves = [x for x in (*tensors, mask) if x is not None and x.requires_grad]
    (y,) = rewritten.run()
    (kept,) = rewritten.masks
    assert 0 < (kept == 0).double().mean() < 1
    more = dict(more)
    q, k, v = tensors
    expected = maths(q, k, v, mask, p, more.pop("is_causal", False), kept, **more)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), leaves, create_graph=True)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, create_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    second, third = (
        torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)
        for grads in (found, wanted)
    )
    torch.testing.assert_close(second, third, rtol=1e-9, atol=1e-9)


DYNAMIC = ("plain", "2-D", "broadcast", "causal", "boolean mask of a batch", "grouped, causal")


@pytest.mark.parametrize(
    ("case", "dynamic"), [*((case, False) for case in CASES), *((case, True) for case in DYNAMIC)]
)
def test_equals_the_maths_of_torch(case: str, dynamic: bool) -> None:
    tensors, mask, more = CASES[case]()
    leaves = [x.requires_grad_() for x in tensors]
    if mask is not None and mask.is_floating_point():
        mask.requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return SDPA(q, k, v, mask, 0.3, **more)

    if "enable_gqa" in more:  # heads that are not constant cannot be repeated
        for x in leaves:
            torch._dynamo.decorators.mark_static(x, x.dim() - 3)
    rewritten = rewrite(f, *tensors, mask, dynamic=dynamic)
    (site,) = rewritten.result.sites
    assert (site.kind, site.p, site.mean, site.index) == (NAME, 0.3, 1.0, 0)
    assert rewritten.result.decisions == ()
    line = f.__code__.co_firstlineno + 1
    assert site.source == f"test_write_out_attention.py:{line}"
    check(rewritten, leaves, mask, 0.3, more)


@pytest.mark.parametrize("more", [{"scale": 0.7}, {"enable_gqa": True}])
def test_leaves_what_is_not_constant_alone(more: dict[str, Any]) -> None:
    """A scale, or a number of heads, that is an input of the graph."""
    scale = more.get("scale")
    tensors = qkv(key=(2, 2, 7, 8), value=(2, 2, 7, 3)) if scale is None else qkv()
    f = lambda q, k, v, scale: SDPA(q, k, v, None, 0.3, **(more | {"scale": scale}))  # noqa: E731
    rewritten = rewrite(f, *tensors, scale, dynamic=True)
    assert not rewritten.changed
    assert [d.reason for d in rewritten.result.decisions] == [Reason.INSIDE_SDPA]


@pytest.mark.parametrize("case", ["plain", "a row that sees nothing", "causal", "float32 mask"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_types(case: str, dtype: torch.dtype) -> None:
    """Halves are computed in fp32, as torch does: equal to the last bit."""
    tensors, mask, more = CASES[case]()
    q, k, v = (x.to(dtype) for x in tensors)
    f = lambda q, k, v, mask: SDPA(q, k, v, mask, 0.3, **more)  # noqa: E731
    rewritten = rewrite(f, q, k, v, mask)
    (y,) = rewritten.run()
    (kept,) = rewritten.masks
    assert kept.dtype == torch.float32
    expected = maths(q, k, v, mask, 0.3, more.get("is_causal", False), kept)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)


def test_halves_where_the_user_allows_to_compute_in_them() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        rewritten = rewrite(lambda q, k, v: SDPA(q, k, v, dropout_p=0.5), q, k, v)
        (y,) = rewritten.run()
        expected = maths(q, k, v, None, 0.5, False, rewritten.masks[0])
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    assert rewritten.masks[0].dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)  # at p = 0.5 the factor 1/(1-p) rounds nothing


Program = Callable[..., Any]


def inside(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return SDPA(q, k, v, mask, 0.3)


def checkpointed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return checkpoint(SDPA, q, k, v, mask, 0.3, use_reentrant=False)


def switched_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return SDPA(q, k, v, mask, 0.3)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return SDPA(q, k, v, mask, 0.3)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("program", [inside, checkpointed, switched_off, plain])
def test_autocast(program: Program, mask: str | None) -> None:
    """It converts the arguments, the mask too, and nothing in between."""
    q, k, v = (x.float() for x in qkv())
    k, v = k.bfloat16() if program is not switched_off else k, v
    given = {None: None, "bool": allowed(5, 7), "float": torch.randn(5, 7)}[mask]
    with torch.autocast("cpu", torch.bfloat16, enabled=program is plain):
        rewritten = rewrite(program, q, k, v, given)
        (y,) = rewritten.run()
        assert torch.is_autocast_enabled("cpu") == (program is plain)
    assert NAME not in rewritten.calls
    (kept,) = rewritten.masks
    dtype = torch.float32 if program is switched_off else torch.bfloat16
    if mask == "float":
        assert given is not None
        given = given.to(dtype)
    expected = maths(q.to(dtype), k.to(dtype), v.to(dtype), given, 0.3, False, kept)
    assert (y.dtype, kept.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y, expected)


def test_autocast_leaves_double_alone() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = rewrite(plain, q, k, v, None)
        (y,) = rewritten.run()
    (kept,) = rewritten.masks
    torch.testing.assert_close(y, maths(q, k, v, None, 0.3, False, kept))


def test_autocast_is_kept() -> None:
    def fails() -> None:
        with keep_autocast():
            torch.set_autocast_enabled("cpu", False)
            raise ValueError("as told")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="as told"):
            fails()
        assert torch.is_autocast_enabled("cpu")


def choosing(backend: SDPBackend) -> Program:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            y = SDPA(q, k, v)
        return y + SDPA(q, k, v, dropout_p=0.3)

    return f


LEFT: Mapping[str, Program] = {
    "sdpa_kernel": choosing(SDPBackend.MATH),
    "a fused sdpa_kernel": choosing(SDPBackend.FLASH_ATTENTION),
}


@pytest.mark.parametrize("case", LEFT)
def test_leaves_a_choice_of_the_user_alone(case: str) -> None:
    rewritten = rewrite(LEFT[case], *qkv(value=(2, 4, 7, 8)))
    assert not rewritten.changed
    (decision,) = rewritten.result.decisions
    assert (decision.kind, decision.reason, decision.p) == (NAME, Reason.INSIDE_SDPA, 0.3)


def marked_by_hand(*args: Any, value: Tensor | None = None, **kwargs: Any) -> Any:
    """Applies the passes to one call that torch has not seen; returns the decision, if any."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(2, 5, 8) if value is None else value

    def given(arg: Any) -> Any:
        return x if arg == "x" else arg

    call = graph.call_function(
        SDPA, tuple(map(given, args)), {name: given(arg) for name, arg in kwargs.items()}
    )
    call.meta["example_value"] = x.meta["example_value"]
    graph.output(call)
    gm = fx.GraphModule({}, graph)
    assert not WriteOutAttention().apply(gm).modified
    decisions = MarkDropout().apply(gm).decisions
    return decisions[0] if decisions else None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", "x", "x", "x", 0.3, True), {}),
        (("x", "x", "x", None, 0.3), {"scale": "x"}),
        (("x", "x", "x", None, 0.3), {"enable_gqa": "x"}),
        (("x", "x", "x", None, 0.3), {"enable_gqa": None}),
        (("x", "x", "x", None, 0.3, "x"), {}),
        (("x", "x", "x", None, "x"), {}),
        (("x", "x", "x", 3.0, 0.3), {}),
        (("x", "x", None, None, 0.3), {}),
        (("x", "x"), {"dropout_p": 0.3}),
    ],
)
def test_leaves_these_arguments_alone(args: Any, kwargs: Any) -> None:
    """Not constant, or torch refuses them."""
    assert marked_by_hand(*args, **kwargs).reason is Reason.INSIDE_SDPA


@pytest.mark.parametrize("p", [0.0, -0.1])
def test_a_rate_that_drops_nothing_has_no_row(p: float) -> None:
    assert marked_by_hand("x", "x", "x", None, p) is None


def test_a_rate_above_one_raises() -> None:
    with pytest.raises(DropoutRateError, match=r"between 0 and 1, but got 1\.5"):
        marked_by_hand("x", "x", "x", None, 1.5)


def test_a_rate_of_one_has_a_reason_of_its_own() -> None:
    assert marked_by_hand("x", "x", "x", None, 1.0).reason is Reason.P_IS_ONE


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(2, 5, 8, dtype=torch.complex64),
        torch.randint(5, (2, 5, 8)),
        torch.empty(2, 5, 8, device="meta"),
        torch.randn(2, 5, 8).to_sparse(),
        torch.randn(8),
    ],
    ids=["complex", "integers", "another device", "sparse", "one dimension"],
)
def test_leaves_other_tensors_alone(value: Tensor) -> None:
    decision = marked_by_hand("x", "x", "x", None, 0.3, value=value)
    assert decision.reason is Reason.INSIDE_SDPA


def test_leaves_subclasses_and_the_unknown_alone() -> None:
    class Mine(Tensor):
        pass

    value = torch.randn(2, 5, 8).as_subclass(Mine)
    assert marked_by_hand("x", "x", "x", None, 0.3, value=value).reason is Reason.INSIDE_SDPA
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    assert marked_by_hand("x", "x", "x", None, 0.3, value=nested).reason is Reason.INSIDE_SDPA
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(SDPA, (x, x, x, None, 0.3)))
    assert not WriteOutAttention().apply(fx.GraphModule({}, graph)).modified


def test_leaves_what_torch_refuses_by_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert marked_by_hand("x", "x", "x", None, 0.3).reason is Reason.INSIDE_SDPA


def test_leaves_branches_alone() -> None:
    def f(x: Tensor) -> Tensor:
        def drops(x: Tensor) -> Tensor:
            return SDPA(x, x, x, dropout_p=0.3)

        y: Tensor = torch.cond(x.sum() > 0, drops, lambda x: x + 1, (x,))
        return y

    rewritten = rewrite(f, torch.randn(2, 5, 8))
    assert not rewritten.changed
    assert [d.reason for d in rewritten.result.decisions] == [Reason.INSIDE_SDPA]


def test_numbers_in_program_order() -> None:
    """Among others, in a checkpointed body too."""

    def f(x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1)
        x = SDPA(x, x, x, dropout_p=0.2)
        y: Tensor = checkpoint(
            lambda x: SDPA(x, x, F.dropout(x, 0.3), dropout_p=0.4), x, use_reentrant=False
        )
        return F.dropout(y, 0.5)

    rewritten = rewrite(f, torch.randn(2, 5, 8))
    sites = rewritten.result.sites
    assert [site.index for site in sites] == list(range(5))
    assert [site.p for site in sites] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert not rewritten.result.decisions


def test_new_nodes_have_values_and_places() -> None:
    """The later passes read both."""
    rewritten = rewrite(lambda q, k, v, m: SDPA(q, k, v, m, 0.3), *qkv(), allowed(5, 7))
    for graph in graphs_in(rewritten.gm):
        for node in graph.nodes:
            if node.op.startswith("call"):
                assert "test_write_out_attention.py" in (node.stack_trace or "")
                value = node.meta["example_value"]
                assert isinstance(value, Tensor)
                assert value.device.type == "cpu"


def test_no_dropout_no_change() -> None:
    assert not rewrite(lambda q, k, v: SDPA(q, k, v), *qkv()).changed
