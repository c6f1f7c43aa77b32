"""The role of every dropout, in networks as AOTAutograd and Inductor's decompositions give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.odd_role_models import ODD
from tests.passes.role_models import CASES, Block, X, drop, gpt, ids, lin, mlp, net
from tests.passes.tracing import mask, trace
from torch import Tensor, fx

import ardd
from ardd.core.decisions import Role
from ardd.passes.find_roles import find_roles
from ardd.passes.program_inputs import inputs_in
from ardd.passes.random_masks import lower_random_masks, masks_in
from ardd.passes.structure_dropout import StructureDropout, StructureResult
from ardd.passes.walk_uses import Walker

Recorder = Callable[..., list[str]]
BLOCK = ["attention", "residual", "hidden", "residual"]


def roles_in(graph: fx.Graph, parameters: list[fx.Node]) -> list[Role]:
    masks = masks_in(graph)
    found = find_roles(graph, masks, parameters)
    assert list(found) == masks
    return [found[m] for m in sorted(masks, key=lambda m: str(m.args[4]).zfill(3))]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Returns a function that compiles and runs a network, and returns its roles."""
    found: list[str] = []

    def apply(self: StructureDropout, graph: fx.Graph) -> StructureResult:
        parameters = inputs_in(graph, self.parameters)
        found.extend(role.value for role in roles_in(graph, parameters))
        lower_random_masks(graph)
        return StructureResult(modified=True)

    def run(network: Any, *inputs: Tensor, compiler: Any = torch.compile) -> list[str]:
        options = {"target": "eager", "strict": True}
        compiled = compiler(network, backend="ardd", options=options)
        compiled(*inputs)
        return found

    monkeypatch.setattr(StructureDropout, "apply", apply)
    return run


def compile_rnns(network: Any, *, backend: str, options: dict[str, object]) -> Any:
    return ardd.compile(network, options=options)


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str, record: Recorder) -> None:
    case = CASES[name]
    compiler = compile_rnns if "rnn" in case.roles else torch.compile
    assert record(case.make(), *case.inputs(), compiler=compiler) == case.roles.split()


@pytest.mark.parametrize("name", ODD)
def test_roles_in_odd_networks(name: str, record: Recorder) -> None:
    case = ODD[name]
    assert record(case.make(), *case.inputs()) == case.roles.split()


def test_values_are_the_strings_that_users_write() -> None:
    assert [role.value for role in Role] == [role.name.lower() for role in Role]


def test_without_gradients(record: Recorder) -> None:
    """An inference graph has no tangents: all of it is forward."""
    with torch.no_grad():
        assert record(Block(), torch.randn(3, 6, 16)) == [
            "attention",
            "residual",
            "hidden",
            "residual",
        ]


def test_a_batch_of_any_size(record: Recorder) -> None:
    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    assert record(net(mlp, a=lin(), b=lin(), c=lin())(), x) == ["input", "hidden", "hidden"]


def test_blocks_of_any_batch_and_length(record: Recorder) -> None:
    x = torch.randn(3, 6, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    assert record(Block(), x) == ["attention", "residual", "hidden", "residual"]


def test_backward_is_no_use(record: Recorder) -> None:
    """The gradient of a residual branch goes through products: it stays what it is."""
    w = torch.randn(16, 16, requires_grad=True)

    def penalised(x: Tensor) -> Tensor:
        return x + drop(x @ w)

    assert record(penalised, X()[0].requires_grad_()) == ["residual"]


def plain_roles(fn: Callable[..., Any], *inputs: Tensor) -> list[Role]:
    """Returns the roles in a function of plain tensors, traced without decompositions."""
    return roles_in(trace(fn, *inputs).graph, [])


W = torch.randn(16, 16)


def test_a_function_of_plain_tensors() -> None:
    """What comes last in a product, from the inputs alone, is its weight."""

    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = (x * mask(x, site=0)) @ w
        h = torch.nn.functional.gelu(h)
        return (h * mask(h, site=1)) @ v

    assert plain_roles(f, *X(), W, W) == [Role.INPUT, Role.HIDDEN]


def test_a_weight_of_a_function_of_plain_tensors() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return x @ (w * mask(w))

    assert plain_roles(f, *X(), W) == [Role.WEIGHT]


def test_ops_that_are_not_decomposed() -> None:
    """Norms, softmax and attention as single ops."""

    def f(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        x = x * mask(x, site=0)
        z = torch.layer_norm(x, [16], g, g)
        p = torch.softmax((z @ w) @ z.transpose(1, 2), -1)
        x = x + (y := (p * mask(p, site=1)) @ (z @ w)) * mask(y, site=2)
        z = torch.layer_norm(x, [16], g, g)[:, None]
        y = torch.nn.functional.scaled_dot_product_attention(z @ w, z @ w, z @ w)[:, 0]
        y = (y * mask(y, site=3)) @ w
        return x + y * mask(y, site=4)

    roles = plain_roles(f, torch.randn(2, 4, 16), W, torch.ones(16))
    assert [role.value for role in roles] == [
        "residual",
        "attention",
        "residual",
        "hidden",
        "residual",
    ]


def test_an_unused_mask() -> None:
    gm = trace(lambda x: (x + 1, mask(x)), *X())
    assert roles_in(gm.graph, []) == [Role.OUTPUT]


def test_walks_are_short(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the blocks take twice the steps: a walk ends where its stream goes on."""
    steps = []
    is_merge = Walker._is_merge

    def counted(self: Walker, *args: Any) -> bool:
        steps.append(1)
        return is_merge(self, *args)

    monkeypatch.setattr(Walker, "_is_merge", counted)

    def count(blocks: int) -> int:
        steps.clear()
        record(gpt(blocks, fused=True), *ids()())
        return len(steps)

    one, two, three = count(1), count(2), count(3)
    assert three - two == two - one


BERT = "residual " + "attention residual residual " * 2
T5_STACK = "residual " + "attention residual hidden residual " * 2 + "input "
T5_DECODER = "residual " + "attention residual attention residual hidden residual " * 2 + "input"
HUGGINGFACE = {"bert": BERT, "gpt2": BERT, "vit": BERT, "t5": T5_STACK + T5_DECODER}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGINGFACE)
def test_models_of_huggingface(name: str, attention: str, record: Recorder) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from tests.test_huggingface import made

    model, inputs = made(name, 0.1, 0.1, attention)
    assert record(model, *inputs) == HUGGINGFACE[name].split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_wav2vec_of_huggingface(record: Recorder) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        feat_proj_dropout=0.1,
        final_dropout=0.1,
        attn_implementation="eager",
    )
    model = transformers.Wav2Vec2ForCTC(config).train()
    model.freeze_feature_encoder()  # else its input asks for a gradient, which breaks the graph
    roles = record(lambda x: model(x).logits, torch.randn(2, 200))
    assert roles == ["residual", "residual", *BLOCK, "input"]
