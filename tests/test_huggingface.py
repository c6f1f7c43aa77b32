"""Models that nobody wrote for ardd: random weights from a config, in training mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ardd

transformers = pytest.importorskip("transformers")

# Dynamo's own look at the input of a second graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Inputs = dict[str, Tensor]
RTOL = 1e-6  # these models compute softmax and loss in float32, whatever their parameters are
TINY = 1e-30
"""Keeps every dropout in the program and drops nothing, as PyTorch's own suite does."""


def tokens(vocabulary: int, length: int = 16) -> Tensor:
    return torch.randint(3, vocabulary, (3, length))


def bert(p: float, attention: str) -> tuple[nn.Module, Inputs]:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=p,
        attention_probs_dropout_prob=p, classifier_dropout=p, attn_implementation=attention,
    )  # fmt: skip
    inputs = {"input_ids": tokens(64), "labels": torch.tensor([0, 1, 0])}
    return transformers.BertForSequenceClassification(config), inputs


def gpt2(p: float, attention: str) -> tuple[nn.Module, Inputs]:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=p, embd_pdrop=p,
        attn_pdrop=p, attn_implementation=attention, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = tokens(64)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def t5(p: float, attention: str) -> tuple[nn.Module, Inputs]:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=p,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": tokens(64),
        "labels": tokens(64, 8),
    }


def vit(p: float, attention: str) -> tuple[nn.Module, Inputs]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
        attn_implementation=attention,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 0])}
    return transformers.ViTForImageClassification(config), inputs


MODELS: dict[str, Callable[[float, str], tuple[nn.Module, Inputs]]] = {
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
}


def gradients(model: nn.Module, run: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(name: str, attention: str, target: str) -> None:
    model, inputs = MODELS[name](TINY, attention)
    model = model.double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = gradients(model, model, inputs)
    options: dict[str, Any] = {"pattern": "block", "target": target, "strict": True}
    got = gradients(model, torch.compile(model, backend="ardd", options=options), inputs)
    decisions = ardd.report().decisions
    assert decisions
    assert all(d.p == TINY for d in decisions)
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        error = float((got[parameter] - gradient).abs().max()) / scale
        assert error < RTOL, f"{parameter}: {error:.1e} of the largest gradient"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_eager(name: str, attention: str) -> None:
    if name == "t5" and attention == "sdpa":
        pytest.skip("T5 has one implementation of attention")
    compare(name, attention, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_eager_under_inductor(name: str) -> None:
    compare(name, "eager", "inductor")


@pytest.mark.parametrize("name", MODELS)
def test_dropouts_are_structured_at_a_real_rate(name: str) -> None:
    model, inputs = MODELS[name](0.25, "eager")
    report = ardd.explain(model.train(), options={"pattern": "block", "strict": True}, **inputs)
    taken = [d for d in report.decisions if d.taken]
    assert len(taken) >= len(report.decisions) / 2
    assert report.flops_after < report.flops_before
