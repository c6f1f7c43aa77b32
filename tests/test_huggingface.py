"""Models of Hugging Face, small, with random weights, in training mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from tests.replay import check_exact, compare, run
from torch import Tensor, nn

import ardd

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="needs transformers")

WIDTH, HEADS, WORDS, LENGTH, BATCH = 32, 2, 64, 8, 2


def ids() -> Tensor:
    return torch.randint(4, WORDS, (BATCH, LENGTH))


class Logits(nn.Module):
    """Calls a model by keyword, and returns its logits."""

    def __init__(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.keys, inputs, strict=True))).logits  # type: ignore[no-any-return]


Made = tuple[nn.Module, tuple[str, ...], list[Tensor]]


def bert(p: float, p_attention: float, attention: str, layers: int) -> Made:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p_attention,
        attn_implementation=attention,
    )
    return transformers.BertForMaskedLM(config), ("input_ids",), [ids()]


def gpt2(p: float, p_attention: float, attention: str, layers: int) -> Made:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=WIDTH,
        n_layer=layers,
        n_head=HEADS,
        n_positions=LENGTH,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p_attention,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config), ("input_ids",), [ids()]


def t5(p: float, p_attention: float, attention: str, layers: int) -> Made:
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=layers,
        num_heads=HEADS,
        dropout_rate=p,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    model = transformers.T5ForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, transformers.models.t5.modeling_t5.T5Attention):
            module.dropout = p_attention
    return model, ("input_ids", "decoder_input_ids"), [ids(), ids()]


def vit(p: float, p_attention: float, attention: str, layers: int) -> Made:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p_attention,
        num_labels=4,
        attn_implementation=attention,
    )
    model = transformers.ViTForImageClassification(config)
    return model, ("pixel_values",), [torch.randn(BATCH, 3, 8, 8)]


MODELS: Mapping[str, Callable[[float, float, str, int], Made]] = {
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
}

# Their own attention takes its softmax in float32, also for fp64: numbers agree as far as that.
RTOL = 1e-5


def made(
    name: str, p: float, p_attention: float, attention: str, layers: int = 2
) -> tuple[nn.Module, list[Tensor]]:
    model, keys, inputs = MODELS[name](p, p_attention, attention, layers)
    module = Logits(model, keys).double().train()
    return module, [x.double() if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rate_of_nearly_zero_gives_the_gradients_of_eager(name: str, attention: str) -> None:
    """Nothing is ever dropped, so nothing depends on how masks are drawn."""
    module, inputs = made(name, 1e-30, 1e-30, attention)
    compiled = torch.compile(
        module, backend="ardd", fullgraph=True, options={"target": "eager", "strict": True}
    )
    compare(run(compiled, module, inputs), run(module, module, inputs), RTOL)
    assert ardd.report().decisions


@pytest.mark.parametrize("name", MODELS)
def test_a_rate_of_nearly_zero_through_inductor(name: str) -> None:
    module, inputs = made(name, 1e-30, 1e-30, "sdpa", layers=1)
    compiled = torch.compile(module, backend="ardd", fullgraph=True, options={"strict": True})
    compare(run(compiled, module, inputs), run(module, module, inputs), RTOL)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("p", [0.125, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_exact_for_the_masks_drawn(name: str, p: float, attention: str) -> None:
    module, inputs = made(name, p, 0.0, attention)
    decisions = check_exact(module, inputs, rtol=RTOL, fullgraph=True)
    left = [decision.module for decision in decisions if not decision.taken]
    # The first thing behind the embeddings of GPT-2 is a norm: no product, nothing to shrink
    assert left == (["model.transformer.drop"] if name == "gpt2" else [])


@pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_with_a_dropout_in_the_attention(name: str, attention: str) -> None:
    """That one stays random: what it drops are no features."""
    module, inputs = made(name, 0.25, 0.25, attention)
    decisions = check_exact(module, inputs, rtol=RTOL, fullgraph=True)
    left = [decision for decision in decisions if not decision.taken]
    assert left
    assert all(decision.reason is ardd.Reason.NO_PRODUCT for decision in left)
