"""Compressed saves in whole models: what may change does, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ardd
from ardd.core.saves import SaveReason
from ardd.passes import compress_saves
from ardd.passes.compress_saves import CompressSaves

from .test_failures import PlantedError, fails, warned
from .yardstick import Run, assert_same_step, step

EAGER: dict[str, Any] = {"target": "eager", "pattern": "random", "strict": True}
WEIGHT_FAMILIES = ["nm", "topk", "rows", "sampled_rows"]
FAMILIES = [*WEIGHT_FAMILIES, "int8", "int4", "mixed"]

each_family = pytest.mark.parametrize("saves", FAMILIES)


# ---- models ------------------------------------------------------------------------------


def mlp(p: float = 0.0) -> nn.Module:
    drop: list[nn.Module] = [nn.Dropout(p)] if p else []
    layers = [nn.Linear(16, 64), nn.ReLU(), *drop, nn.Linear(64, 64), nn.ReLU(), *drop]
    return nn.Sequential(*layers, nn.Linear(64, 8))


def encoder(p: float, activation: str = "relu") -> nn.Module:
    return nn.TransformerEncoderLayer(32, 2, 64, p, activation, batch_first=True)


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(8, 4)),
    )


class Pooled(nn.Module):
    """Takes maxima and the largest few, whose indices are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 300), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        few: Tensor = self.last(h.topk(20, 1).values)
        y: Tensor = few + h.max(1, keepdim=True).values + h.sort(1).values[:, :8].exp()
        return y


class Gated(nn.Module):
    """Halves of one product: one is a gate of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 128), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, -1)
        y: Tensor = self.last(F.silu(gate) * value.tanh())
        return y


class Fused(nn.Module):
    """Queries, keys and values of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Bert(nn.Module):
    """A BERT of one layer, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        self.model = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return y


Make = tuple[Callable[[], nn.Module], tuple[int, ...]]

MODELS: dict[str, Make] = {
    "mlp": (mlp, (48, 16)),
    "mlp with dropout": (lambda: mlp(0.3), (48, 16)),
    "encoder": (lambda: encoder(0.0), (3, 16, 32)),
    "encoder with dropout": (lambda: encoder(0.1, "gelu"), (3, 16, 32)),
    "cnn": (cnn, (4, 3, 16, 16)),
    "pooled": (Pooled, (40, 16)),
    "gated": (Gated, (48, 16)),
    "fused": (Fused, (3, 16, 32)),
    "bert": (Bert, (3, 16, 32)),
}
SLOW = {"bert"}
EVERY = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
each_model = pytest.mark.parametrize("name", EVERY)


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), torch.randn(shape).to(dtype).requires_grad_()


def run(model: nn.Module, x: Tensor, seed: int = 1, **options: Any) -> tuple[Run, ardd.Report]:
    """Compiles and runs one step from a seed, with a report of that alone."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ardd", options=EAGER | options)
    torch.manual_seed(seed)
    result = step(compiled, model, x)
    return result, ardd.report()


def check_bytes(report: ardd.Report) -> tuple[int, int]:
    """Returns the bytes saved, before and after, as the rows and the totals agree on."""
    before, after = report.saved_bytes_before, report.saved_bytes_after
    assert after is not None
    rows = sum(save.bytes_before for save in report.saves)
    assert after == sum(save.bytes_after for save in report.saves)
    assert all(save.bytes_after <= save.bytes_before for save in report.saves)
    assert all(graph.failure is None for graph in report.graphs)
    if before is None:  # torch's own is not known where there are dropouts
        before = rows
    assert after <= before
    return before, after


def assert_equal_runs(got: Run, expected: Run) -> None:
    assert torch.equal(got.output, expected.output)
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert torch.equal(got.grads[name], grad), name


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# ---- exact -------------------------------------------------------------------------------


@each_model
def test_exact_saves_change_no_bit(name: str) -> None:
    """Of no gradient, and never save more bytes."""
    model, x = made(name)
    expected, off = run(model, x, saves="off")
    got, report = run(model, x, saves="exact")
    assert_equal_runs(got, expected)
    assert got.grads
    _, after = check_bytes(report)
    assert off.saves == ()
    assert off.saved_bytes_after is None or after <= off.saved_bytes_after
    assert all(save.exact for save in report.saves)


@each_model
def test_exact_saves_of_bfloat16(name: str) -> None:
    model, x = made(name, torch.bfloat16)
    expected, _ = run(model, x, saves="off")
    got, report = run(model, x, saves="exact")
    assert_equal_runs(got, expected)
    check_bytes(report)


@pytest.mark.parametrize("name", ["cnn", "pooled"])
def test_exact_saves_are_smaller(name: str) -> None:
    """Masks and indices are there to be packed."""
    model, x = made(name)
    before, after = check_bytes(run(model, x)[1])
    assert after < before


@pytest.mark.parametrize("name", ["mlp with dropout", "encoder with dropout"])
def test_dropout_leaves_no_mask_to_pack(name: str) -> None:
    """Masks of dropout are computed again from seeds: only rows without a key have a boolean."""
    model, x = made(name)
    _, report = run(model, x)
    before, after = check_bytes(report)
    assert after == before
    booleans = [save for save in report.saves if "bool" in save.dtype]
    assert all(save.shape[-1] == 1 for save in booleans)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp with dropout", "cnn", "fused"])
def test_exact_saves_under_inductor(name: str) -> None:
    """Within rounding: other graphs are fused in another way."""
    model, x = made(name)
    expected, _ = run(model, x, saves="off", target="inductor")
    got, report = run(model, x, saves="exact", target="inductor")
    assert_same_step(got, expected)
    check_bytes(report)


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["nm", "topk", "rows", "int8", "int4"])
def test_lossy_saves_under_inductor(saves: str) -> None:
    """As the eager target has them, up to the dither."""
    model, x = made("mlp")
    expected, _ = run(model, x, saves=saves)
    got, report = run(model, x, saves=saves, target="inductor")
    before, after = check_bytes(report)
    assert after < before / 2
    noise = {"int8": 0.02, "int4": 0.3}.get(saves, 1e-3)
    for key, grad in expected.grads.items():
        assert relative_error(got.grads[key], grad) <= noise, key


# ---- lossy -------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", WEIGHT_FAMILIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_weight_gradients_change(saves: str, p: float, dtype: torch.dtype) -> None:
    """The output, the gradient of the input and those of biases are bit for bit what they were."""
    torch.manual_seed(0)
    model, x = mlp(p).to(dtype), torch.randn(48, 16).to(dtype).requires_grad_()
    expected, _ = run(model, x, saves="off")
    got, report = run(model, x, saves=saves)
    assert torch.equal(got.output, expected.output)
    assert got.grads.keys() == expected.grads.keys()
    assert "input 0" in got.grads
    changed = {key for key in got.grads if not torch.equal(got.grads[key], expected.grads[key])}
    # The first layer reads the input of the program, which is kept as it is.
    weights = {key for key in got.grads if key.endswith("weight") and key != "0.weight"}
    assert changed == weights
    before, after = check_bytes(report)
    assert after < before / 2
    for key in weights:
        assert 0 < relative_error(got.grads[key], expected.grads[key]) < 4


@each_family
@each_model
def test_forward_is_dense(name: str, saves: str) -> None:
    """The output is what it was, gradients are near, and fewer bytes are saved."""
    model, x = made(name)
    expected, _ = run(model, x, saves="off")
    got, report = run(model, x, saves=saves)
    assert torch.equal(got.output, expected.output)
    assert got.grads.keys() == expected.grads.keys()
    assert all(grad.isfinite().all() for grad in got.grads.values())
    check_bytes(report)
    if saves == "int8":
        for key, grad in expected.grads.items():
            if grad.norm() > 1e-4:
                assert relative_error(got.grads[key], grad) < 0.1, key


@pytest.mark.parametrize(
    ("name", "least"), [("mlp", 3.5), ("encoder with dropout", 3.0), ("gated", 3.0), ("fused", 3.0)]
)
def test_int8_saves_a_quarter(name: str, least: float) -> None:
    model, x = made(name)
    before, after = check_bytes(run(model, x, saves="int8")[1])
    assert before / after > least


@pytest.mark.parametrize("saves", ["nm", "topk", "rows"])
def test_density_keeps_more(saves: str) -> None:
    """A larger density saves more bytes and errs less."""
    model, x = made("mlp")
    expected, _ = run(model, x, saves="off")
    runs = [run(model, x, saves=saves, save_density=d) for d in (0.125, 0.25, 0.5, 0.75)]
    sizes = [check_bytes(report)[1] for _, report in runs]
    errors = [relative_error(r.grads["4.weight"], expected.grads["4.weight"]) for r, _ in runs]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    assert errors == sorted(errors, reverse=True)


def test_sampled_rows_are_unbiased() -> None:
    """The mean of the weight gradient over many steps is that of the dense program."""
    model, x = made("mlp")
    expected, _ = run(model, x, saves="off")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ardd", options=EAGER | {"saves": "sampled_rows"})
    n = 400
    grads = torch.stack([step(compiled, model, x).grads["2.weight"] for _ in range(n)]).double()
    sigma = grads.std(0) / n**0.5
    error = (grads.mean(0) - expected.grads["2.weight"].double()).abs()
    assert (error <= 6 * sigma + 1e-6).all()
    assert (grads[0] - expected.grads["2.weight"]).abs().max() > 6 * sigma.max()


@pytest.mark.parametrize("saves", FAMILIES)
def test_nan_stays_visible(saves: str) -> None:
    """An overflow in the forward reaches the gradients, as it does without encodings."""
    model, x = made("mlp")
    with torch.no_grad():
        model.get_submodule("0").bias[3] = torch.inf  # type: ignore[operator]
    got, _ = run(model, x, saves=saves)
    assert not got.grads["2.weight"].isfinite().all()


@pytest.mark.parametrize("saves", ["exact", *FAMILIES])
@pytest.mark.parametrize(
    "name",
    ["mlp with dropout", *(pytest.param(n, marks=pytest.mark.slow) for n in ("encoder", "cnn"))],
)
def test_dynamic_batches(name: str, saves: str) -> None:
    """One compile serves several sizes."""
    model, _ = made(name)
    shape = MODELS[name][1]
    compiled = torch.compile(model, backend="ardd", dynamic=True, options=EAGER | {"saves": saves})
    off = {"saves": "off"}
    stock = torch.compile(model, backend="ardd", dynamic=True, options=EAGER | off)
    for batch in (shape[0], 5, 11):
        x = torch.randn(batch, *shape[1:], requires_grad=True)
        torch.manual_seed(2)
        got = step(compiled, model, x)
        torch.manual_seed(2)
        expected = step(stock, model, x)
        assert torch.equal(got.output, expected.output)
        if saves == "exact":
            assert_equal_runs(got, expected)
        assert got.grads.keys() == expected.grads.keys()
        assert all(grad.isfinite().all() for grad in got.grads.values())
        if saves == "int8":
            for key, grad in expected.grads.items():
                if grad.norm() > 1e-4:
                    assert relative_error(got.grads[key], grad) < 0.1, key
    for graph in ardd.report().graphs:
        assert graph.failure is None


# ---- the budget --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp with dropout", "encoder with dropout", "cnn", "gated"])
@pytest.mark.parametrize("saves", ["exact", "int8", "nm", "mixed"])
def test_budgets_are_met_or_refused(name: str, saves: str) -> None:
    """A smaller budget never saves more, and one that cannot be met is refused."""
    model, x = made(name)
    torch._dynamo.reset()
    stock = ardd.explain(model, x, options=EAGER | {"saves": "off"}).saved_bytes_after
    assert stock is not None
    sizes: list[int] = []
    for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.01):
        torch._dynamo.reset()
        budget: float | int = share if len(sizes) % 2 else int(share * stock)
        options = EAGER | {"saves": saves, "memory_budget": budget}
        try:
            report = ardd.explain(model, x, options=options)
        except ardd.BudgetError as error:
            assert error.budget == int(share * stock)  # noqa: PT017
            assert error.smallest > error.budget  # noqa: PT017
            assert error.saves == saves  # noqa: PT017
            assert sizes == [] or error.smallest <= sizes[-1]  # noqa: PT017
            break
        after = check_bytes(report)[1]
        assert after <= share * stock
        assert sizes == [] or after <= sizes[-1]
        sizes.append(after)
    else:
        pytest.fail("one byte in a hundred is enough")
    assert sizes


def test_the_smallest_plan_fits() -> None:
    """What the error says is needed is enough, and a byte less is not."""
    model, x = made("encoder with dropout")
    for saves in ("exact", "int4", "mixed"):
        torch._dynamo.reset()
        with pytest.raises(ardd.BudgetError) as caught:
            ardd.explain(model, x, options=EAGER | {"saves": saves, "memory_budget": 1})
        smallest = caught.value.smallest
        report = ardd.explain(model, x, options=EAGER | {"saves": saves, "memory_budget": smallest})
        assert report.saved_bytes_after == smallest
        with pytest.raises(ardd.BudgetError):
            ardd.explain(model, x, options=EAGER | {"saves": saves, "memory_budget": smallest - 1})


def test_a_budget_of_all_costs_nothing() -> None:
    model, x = made("mlp")
    expected, _ = run(model, x, saves="off")
    got, report = run(model, x, saves="int4", memory_budget=1.0)
    assert_equal_runs(got, expected)
    assert SaveReason.BUDGET in {save.reason for save in report.saves}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_impossible_budget_is_an_error(target: str, strict: bool) -> None:
    """Of its own type and with the numbers, not wrapped in one of torch: nothing runs dense."""
    model, x = made("mlp")
    options: dict[str, Any] = {
        "saves": "nm",
        "memory_budget": 100,
        "target": target,
        "strict": strict,
    }
    with pytest.raises(ardd.BudgetError, match="allows 100 bytes") as caught:
        run(model, x, **options)
    assert type(caught.value).__name__ == "BudgetError"
    assert isinstance(caught.value, ValueError)
    assert caught.value.smallest > 100
    assert ardd.report().graphs == ()


def test_recomputation_is_exact() -> None:
    """A budget over exact saves computes again, and draws nothing again."""
    model, x = made("encoder with dropout")
    expected, _ = run(model, x, saves="off")
    torch._dynamo.reset()
    with pytest.raises(ardd.BudgetError) as caught:
        ardd.explain(model, x, options=EAGER | {"memory_budget": 0})
    got, report = run(model, x, memory_budget=caught.value.smallest)
    assert_equal_runs(got, expected)
    assert SaveReason.RECOMPUTED in {save.reason for save in report.saves}


# ---- options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"saves": "nm", "save_density": 0},
        {"saves": "nm", "save_density": 0.0},
        {"saves": "nm", "save_density": 2},
        {"saves": "nm", "save_density": -0.5},
        {"saves": "nm", "save_density": float("nan")},
        {"saves": "nm", "save_density": True},
        {"saves": "nm", "save_bits": 5},
        {"saves": "nm", "save_bits": 8.0},
        {"memory_budget": 0.0},
        {"memory_budget": 2.0},
        {"memory_budget": -1},
        {"memory_budget": True},
        {"memory_budget": float("nan")},
        {"saves": "off", "memory_budget": 0.5},
        {"saves": "int2"},
        {"saves": None},
        {"saves": "EXACT"},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    """A clear error that names the option, before anything is compiled."""
    model, x = made("mlp")
    key = next(k for k in reversed(options))
    with pytest.raises(ardd.OptionsError, match=f"Option '{key}' is") as caught:
        run(model, x, **options)
    assert "Allowed" in str(caught.value)
    with pytest.raises(ardd.OptionsError):
        ardd.Options(**options)


# ---- the tools of torch around it --------------------------------------------------------


class Checkpointed(nn.Module):
    """The middle is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = mlp(), mlp(), nn.Linear(8, 8)
        self.between = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False)
        y: Tensor = self.last(self.second(self.between(h).relu()))
        return y


@pytest.mark.parametrize("saves", ["exact", "int8"])
def test_checkpointing(saves: str) -> None:
    """What torch computes again is not encoded, and gradients stay right."""
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(48, 16, requires_grad=True)
    expected, _ = run(model, x, saves="off")
    got, report = run(model, x, saves=saves)
    check_bytes(report)
    if saves == "exact":
        assert_equal_runs(got, expected)
    assert torch.equal(got.output, expected.output)
    for key, grad in expected.grads.items():
        # 1 % of each term; the sums over the tokens mostly cancel.
        assert relative_error(got.grads[key], grad) < 0.25, key


@each_family
def test_inference_is_left_alone(saves: str) -> None:
    """Without a gradient nothing is saved, and nothing is encoded."""
    model, x = made("mlp with dropout")
    model.eval()
    compiled = torch.compile(model, backend="ardd", options=EAGER | {"saves": saves})
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    report = ardd.report()
    assert report.saves == ()
    assert all(graph.inference for graph in report.graphs)


def test_eval_with_gradients() -> None:
    model, x = made("mlp with dropout")
    model.eval()
    expected, _ = run(model, x, saves="off")
    got, _ = run(model, x, saves="exact")
    assert_equal_runs(got, expected)


def test_training_learns() -> None:
    """Ten steps with 4 bits go where ten dense steps go."""
    losses = []
    for saves in ("off", "int4"):
        model, x = made("mlp")
        target = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="ardd", options=EAGER | {"saves": saves})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(compiled(x), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[1] / losses[0] - 1) < 0.05


def test_two_backwards() -> None:
    """Saves of a graph that is kept are decoded anew, and give the same gradients."""
    model, x = made("mlp with dropout")
    compiled = torch.compile(model, backend="ardd", options=EAGER | {"saves": "nm"})
    loss = compiled(x).square().sum()
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("pattern", ["block", "random"])
def test_beside_structured_dropout(pattern: str) -> None:
    model, x = made("mlp with dropout")
    expected, _ = run(model, x, saves="off", pattern=pattern)
    got, report = run(model, x, saves="exact", pattern=pattern)
    assert_equal_runs(got, expected)
    check_bytes(report)


# ---- failures ----------------------------------------------------------------------------


PLANTS: list[tuple[Any, str]] = [
    (CompressSaves, "_plan"),
    (CompressSaves, "_apply"),
    (compress_saves, "merge_views"),
    (compress_saves, "split_signs"),
    (compress_saves, "encode"),
]


@pytest.mark.parametrize(("module", "function"), PLANTS)
def test_a_failing_pass_leaves_the_original(
    module: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning, and with gradients as they were; strict raises."""
    model, x = made("mlp")
    expected, _ = run(model, x, saves="off")
    monkeypatch.setattr(module, function, fails)
    runs: list[Run] = []
    options: dict[str, Any] = {"saves": "nm", "strict": False}
    messages = warned(lambda: runs.append(run(model, x, **options)[0]))
    assert len(messages) == 1
    assert "Pass 'compress-saves' failed with PlantedError: planted." in messages[0]
    assert_equal_runs(runs[0], expected)
    (graph,) = ardd.report().graphs
    assert graph.failure is not None
    assert "PlantedError: planted" in graph.failure
    assert graph.saves == ()
    with pytest.raises(ardd.PassError) as caught:
        run(model, x, saves="nm", strict=True)
    assert caught.value.name == "compress-saves"
    assert isinstance(caught.value.cause, PlantedError)


@pytest.mark.slow
def test_a_failing_pass_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("mlp")
    expected, _ = run(model, x, saves="off", target="inductor")
    monkeypatch.setattr(CompressSaves, "_plan", fails)
    runs: list[Run] = []
    options: dict[str, Any] = {"saves": "nm", "strict": False, "target": "inductor"}
    messages = warned(lambda: runs.append(run(model, x, **options)[0]))
    assert len(messages) == 1
    assert_same_step(runs[0], expected)


# ---- the report --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "saves"),
    [("encoder with dropout", "exact"), ("encoder with dropout", "mixed"), ("cnn", "nm")],
)
def test_json_round_trip(name: str, saves: str) -> None:
    """What a report says of saves is read back as it was."""
    model, x = made(name)
    torch._dynamo.reset()
    report = ardd.explain(model, x, options=EAGER | {"saves": saves})
    assert report.saves
    for graph in report.graphs:
        text = json.dumps(graph.to_dict(), allow_nan=False)
        assert ardd.GraphReport.from_dict(json.loads(text)) == graph
    printed = str(report)
    for save in report.saves:
        assert save.encoding == "as is" or save.encoding in printed


@pytest.mark.parametrize("saves", ["exact", "nm", "mixed"])
def test_explain_says_what_compile_does(saves: str) -> None:
    model, x = made("mlp with dropout")
    torch._dynamo.reset()
    said = ardd.explain(model, x, options=EAGER | {"saves": saves})
    _, done = run(model, x, saves=saves)
    key = lambda save: (save.op, save.module, save.encoding, save.bytes_after)  # noqa: E731
    assert sorted(map(key, said.saves)) == sorted(map(key, done.saves))
    assert said.saved_bytes_after == done.saved_bytes_after


def test_deferred_dropout_drops_for_the_backward_alone() -> None:
    """The forward is that of eval mode, and half of what it saves for the weight is dropped."""
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8))
    compiled = torch.compile(model, backend="ardd", options=EAGER | {"pattern": "deferred"})
    x = torch.randn(48, 16)
    assert (compiled(x) - model.eval()(x)).abs().max() < 1e-6
    report = ardd.report()
    assert [d.reason for d in report.decisions] == [ardd.Reason.DEFERRED]
    assert "top 32" in {save.encoding for save in report.saves}


def test_deferred_dropouts_count_as_rewrites() -> None:
    options = EAGER | {"pattern": "deferred", "max_rewrites": 1}
    torch.compile(mlp(0.5), backend="ardd", options=options)(torch.randn(4, 16))
    reasons = [decision.reason for decision in ardd.report().decisions]
    assert reasons == [ardd.Reason.DEFERRED, ardd.Reason.OUT_OF_FUEL]


class Renormed(nn.Module):
    """Shrinks its weight at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.mul_(0.5)
        result: Tensor = self.last(F.gelu(self.first(x)))
        return result


def test_measuring_a_loss_writes_to_no_parameter() -> None:
    """The call itself writes to it, as it would uncompiled, once."""
    model = Renormed()
    before = model.first.weight.detach().clone()
    report = ardd.explain(model, torch.randn(32, 16), options=EAGER | {"saves": "int8"})
    assert any(save.error for save in report.saves)
    assert torch.equal(model.first.weight, 0.5 * before)
