"""Networks that are plausible and unlike the usual ones, for the tests of roles."""

from __future__ import annotations

from typing import Any

import torch
from tests.passes.role_models import (
    IMAGE,
    SEQUENCE,
    WORDS,
    B,
    Case,
    D,
    T,
    X,
    data,
    drop,
    ids,
    lin,
    net,
    par,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def tied(m: Any, x: Tensor) -> Any:
    return F.linear(drop(F.linear(x, m.w).relu()), m.w.T)


def two_layers(m: Any, x: Tensor) -> Any:
    return m.b(drop(m.a(x).relu()))


def linear_attention(m: Any, x: Tensor) -> Any:
    q, k, v = m.q(x).softmax(-1), m.k(x).softmax(1), m.v(x)
    context = torch.einsum("btd,bte->bde", k, v)
    return x + drop(m.out(torch.einsum("btd,bde->bte", q, context)))


def talking_heads(m: Any, x: Tensor) -> Any:
    q = m.q(x).view(B, T, 2, -1)
    scores = torch.einsum("bthd,bshd->bhts", q, m.k(x).view(B, T, 2, -1))
    mixed = m.heads(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return drop(mixed.softmax(-1)) @ m.v(x).view(B, T, 2, -1).transpose(1, 2)


def deep_fm(m: Any, x: Tensor) -> Any:
    e = m.words(x)
    pairs = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
    deep = m.b(drop(m.a(drop(e.flatten(1))).relu()))
    return pairs + m.linear(x).sum(1) + deep


def cross_network(m: Any, x: Tensor) -> Any:
    h = x * m.a(x) + x
    h = x * m.b(h) + h
    return m.c(drop(h))


def positions_after(m: Any, x: Tensor) -> Any:
    """Positions are added behind the dropout, in a network without a stream."""
    h = drop(m.words(x) * D**0.5) + m.positions
    return m.a(h.flatten(1))


def memory(m: Any, x: Tensor, source: Tensor) -> Any:
    s = drop(m.norm(source + m.f(source)))
    p = (m.q(x) @ m.k(s).transpose(1, 2)).softmax(-1)
    return x + drop(m.out(p @ m.v(s)))


def tcn(m: Any, x: Tensor) -> Any:
    h = drop(F.relu(m.a(x)[..., :-2]))
    h = drop(F.relu(m.b(h)[..., :-2]))
    return m.c(F.relu(h + m.down(x)))


def queries(m: Any, x: Tensor) -> Any:
    q = m.queries.expand(x.shape[0], -1, -1)
    z = (m.q(q) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)
    z = m.norm(q + drop(z))
    return z + drop(m.down(drop(m.up(z).relu())))


def vae(m: Any, x: Tensor) -> Any:
    h = drop(m.a(x).relu())
    mean, log_var = m.mean(h), m.var(h)
    z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    y = m.out(drop(m.b(z).relu()))
    kl = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).mean()
    return y, F.mse_loss(y, x) + kl


def stochastic_depth(m: Any, x: Tensor) -> Any:
    """As in torchvision, for a batch together."""
    noise = torch.empty([1] * x.dim()).bernoulli_(0.75).div_(0.75)
    return x + m.a(x) * noise


def layer_scale(m: Any, x: Tensor) -> Any:
    h = m.norm(m.conv(x).permute(0, 2, 3, 1))
    h = (m.gamma * m.down(drop(F.gelu(m.up(h))))).permute(0, 3, 1, 2)
    keep = torch.rand(x.shape[0], 1, 1, 1) < 0.75
    return x + h * keep / 0.75


def reversible_norm(m: Any, x: Tensor) -> Any:
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    h = m.b(drop(m.a((x - mean) / std).relu()))
    return drop(h) * std + mean


def bag_of_words(m: Any, x: Tensor) -> Any:
    return m.a(drop(m.words(x)).mean(1))


def mixture(m: Any, x: Tensor) -> Any:
    weights = drop(m.router(x).softmax(-1))
    outputs = torch.stack([e(x) for e in m.experts], 1)
    return (weights.unsqueeze(-1) * outputs).sum(1)


def batch_ensemble(m: Any, x: Tensor) -> Any:
    h = drop(torch.bmm(x.expand(2, -1, -1), m.w).relu())
    return torch.baddbmm(m.b, h, m.v)


def two_towers(m: Any, a: Tensor, b: Tensor) -> Any:
    u = m.b(drop(m.a(a).relu()))
    return (u * m.d(drop(m.c(b).relu()))).sum(-1)


def scalar_mix(m: Any, x: Tensor) -> Any:
    """Every layer is read by the head."""
    a = x + drop(m.a(x))
    b = a + drop(m.b(a))
    weights = m.weights.softmax(0)
    h = (torch.stack([x, a, b]) * weights[:, None, None]).sum(0)
    return m.head(drop(h))


def reused(m: Any, x: Tensor) -> Any:
    """Two products read one dropped tensor: hidden all the same."""
    h = drop(m.a(x).relu())
    return m.b(h) * m.c(h).sigmoid()


def twice(m: Any, x: Tensor) -> Any:
    return m.b(drop(drop(m.a(x)).relu()))


def attention_pool(m: Any, x: Tensor) -> Any:
    weights = drop(m.score(x).softmax(1))
    return m.head(drop((weights * x).sum(1)))


def auto_encoder(m: Any, x: Tensor) -> Any:
    """A denoising one: noise on the data, and the difference to it is the loss."""
    return F.mse_loss(m.b(m.a(drop(x)).relu()), x)


def regularised(m: Any, x: Tensor, y: Tensor) -> Any:
    h = drop(m.a(x).relu())
    return F.cross_entropy(m.b(h), y) + 0.01 * h.pow(2).mean()


def token_shift(m: Any, x: Tensor) -> Any:
    """RWKV's channel mixing."""
    before = F.pad(x, (0, 0, 1, -1))
    z = x * m.mix + before * (1 - m.mix)
    return x + m.r(z).sigmoid() * drop(m.v(drop(m.k(z).relu().square())))


def gated_cnn(m: Any, x: Tensor) -> Any:
    return m.c(drop(F.glu(m.a(x), 1)))


def conv_attention(m: Any, x: Tensor) -> Any:
    """Self-attention over the positions of a map."""
    h = m.a(x)
    z = h.flatten(2)
    p = drop((z.transpose(1, 2) @ z).softmax(-1))
    return m.b(h + drop((z @ p.transpose(1, 2)).view(h.shape)))


def mixed_precision(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return x + drop(m.b(drop(F.gelu(m.a(m.norm(x))))))


def transpose_conv(m: Any, x: Tensor) -> Any:
    return m.b(F.dropout2d(m.a(x).relu(), 0.25, True))


def unrolled(m: Any, x: Tensor) -> Any:
    h = c = x.new_zeros(x.shape[0], D)
    for t in range(3):
        h, c = m.cell(drop(x[:, t]), (h, c))
    return m.head(drop(m.mid(drop(h)).relu()))


CHANNELS = {"a": nn.Conv1d(4, 4, 3, padding=2), "b": nn.Conv1d(4, 4, 3, padding=2)}

ODD: dict[str, Case] = {
    "tied": Case(net(tied, w=par(D, D)), X, "hidden"),
    "spectral norm": Case(
        net(two_layers, a=spectral_norm(lin()), b=lin()),
        X,
        "hidden",
    ),
    "spectral norm behind": Case(net(two_layers, a=lin(), b=spectral_norm(lin())), X, "hidden"),
    "weight norm": Case(net(two_layers, a=weight_norm(lin()), b=weight_norm(lin())), X, "hidden"),
    "batch of one and one output": Case(
        net(two_layers, a=lin(), b=lin(D, 1)), data((1, D)), "hidden"
    ),
    "linear attention": Case(
        net(linear_attention, q=lin(), k=lin(), v=lin(), out=lin()), SEQUENCE, "residual"
    ),
    "talking heads": Case(
        net(talking_heads, q=lin(), k=lin(), v=lin(), heads=lin(2, 2)), SEQUENCE, "attention"
    ),
    "deep fm": Case(
        net(
            deep_fm,
            words=nn.Embedding(WORDS, 4),
            linear=nn.Embedding(WORDS, 1),
            a=lin(4 * T),
            b=lin(D, 1),
        ),
        ids(),
        "input hidden",
    ),
    "cross network": Case(net(cross_network, a=lin(), b=lin(), c=lin()), X, "input"),
    "positions behind": Case(
        net(
            positions_after, words=nn.Embedding(WORDS, D), positions=torch.randn(T, D), a=lin(T * D)
        ),
        ids(),
        "input",
    ),
    "memory": Case(
        net(memory, f=lin(), q=lin(), k=lin(), v=lin(), out=lin(), norm=nn.LayerNorm(D)),
        data((B, T, D), (B, T, D)),
        "input residual",
    ),
    "tcn": Case(
        net(tcn, **CHANNELS, down=nn.Conv1d(4, 4, 1), c=nn.Conv1d(4, 4, 1)),
        data((B, 4, T)),
        "channels channels_skip",
    ),
    "learned queries": Case(
        net(
            queries,
            queries=par(4, D),
            q=lin(),
            k=lin(),
            v=lin(),
            up=lin(),
            down=lin(),
            norm=nn.LayerNorm(D),
        ),
        SEQUENCE,
        "residual hidden residual",
    ),
    "vae": Case(net(vae, a=lin(), mean=lin(), var=lin(), b=lin(), out=lin()), X, "hidden hidden"),
    "stochastic depth of a batch": Case(net(stochastic_depth, a=lin()), SEQUENCE, "samples"),
    "convnext": Case(
        net(
            layer_scale,
            conv=nn.Conv2d(3, 3, 3, padding=1, groups=3),
            norm=nn.LayerNorm(3),
            up=lin(3, 8),
            down=lin(8, 3),
            gamma=par(3),
        ),
        IMAGE,
        "hidden samples",
    ),
    "reversible norm": Case(net(reversible_norm, a=lin(), b=lin()), SEQUENCE, "hidden output"),
    "bag of words": Case(net(bag_of_words, words=nn.Embedding(WORDS, D), a=lin()), ids(), "input"),
    "mixture of experts": Case(
        net(mixture, router=lin(D, 2), experts=nn.ModuleList([lin(), lin()])), X, "attention"
    ),
    "ensemble": Case(
        net(batch_ensemble, w=par(2, D, D), v=par(2, D, D), b=par(2, 1, D)), X, "hidden"
    ),
    "two towers": Case(
        net(two_towers, a=lin(), b=lin(), c=lin(), d=lin()), data((B, D), (B, D)), "hidden hidden"
    ),
    "scalar mix": Case(
        net(scalar_mix, a=lin(), b=lin(), weights=par(3), head=lin()), X, "residual residual input"
    ),
    "read twice": Case(net(reused, a=lin(), b=lin(), c=lin()), X, "hidden"),
    "dropped twice": Case(net(twice, a=lin(), b=lin()), X, "hidden hidden"),
    "attention pool": Case(
        net(attention_pool, score=lin(D, 1), head=lin()), SEQUENCE, "attention input"
    ),
    "auto-encoder": Case(net(auto_encoder, a=lin(), b=lin()), X, "input"),
    "regularised": Case(
        net(regularised, a=lin(), b=lin()),
        lambda: (torch.randn(B, D), torch.randint(D, (B,))),
        "hidden",
    ),
    "rwkv": Case(
        net(token_shift, mix=par(D), r=lin(), k=lin(), v=lin()), SEQUENCE, "hidden residual"
    ),
    "gated convolution": Case(
        net(gated_cnn, a=nn.Conv1d(4, 8, 3), c=nn.Conv1d(4, 4, 3)), data((B, 4, 9)), "channels"
    ),
    "attention of a map": Case(
        net(conv_attention, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)),
        IMAGE,
        "attention residual",
    ),
    "mixed precision": Case(
        net(mixed_precision, a=lin(), b=lin(), norm=nn.LayerNorm(D)), SEQUENCE, "hidden residual"
    ),
    "transposed convolutions": Case(
        net(transpose_conv, a=nn.ConvTranspose2d(3, 8, 3), b=nn.ConvTranspose2d(8, 3, 3)),
        IMAGE,
        "channels",
    ),
    "unrolled cells": Case(
        net(unrolled, cell=nn.LSTMCell(D, D), mid=lin(), head=lin()),
        SEQUENCE,
        "input input input input hidden",
    ),
}
