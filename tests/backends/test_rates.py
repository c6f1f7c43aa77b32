"""Rates that change while training: few graphs with `ardd.set_rate`, a warning without."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests import replay
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ardd

from .yardstick import EAGER, Net

LIMIT = 8  # torch's, by default
NEEDED = 41  # by the default levels
has_limit = pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="torch.compile has no recompile_limit before 2.13",
)


@pytest.fixture(autouse=True)
def fresh_counters() -> None:
    assert torch._dynamo.config.recompile_limit == LIMIT, "what torch sets by default"
    counters.clear()


def compiled(model: nn.Module, **kwargs: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="ardd", options=EAGER, **kwargs)


def draws(fn: Callable[..., Tensor], x: Tensor) -> int:
    """Runs a step; returns how many kept sets it drew: none if it ran uncompiled."""
    with ardd.record_masks() as found:
        fn(x).sum().backward()
    return len(found)


def rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


# ---- schedules ---------------------------------------------------------------------------


@pytest.fixture
def limit() -> Iterator[None]:
    """What `set_rate` asks for, with the older of two ways: for what runs in here."""
    with torch._dynamo.config.patch(recompile_limit=NEEDED):
        yield


@pytest.mark.usefixtures("limit")
def test_a_schedule_compiles_a_graph_for_each_level() -> None:
    """200 rates, and back through all of them: as many graphs as levels, and none uncompiled."""
    model = Net()
    fn = compiled(model)
    x = torch.randn(4, 16)
    wanted = [0.99 * step / 199 for step in range(200)]
    used = set()
    for p in [*wanted, *reversed(wanted)]:
        rate = ardd.set_rate(model, p)
        assert abs(rate - p) <= 1 / 32 or rate == 15 / 16
        assert rates(model) == {rate}
        assert draws(fn, x) == (2 if rate else 0)
        used.add(rate)
    assert used == {step / 16 for step in range(16)}
    assert len(ardd.report().graphs) == 16
    assert counters["frames"] == {"total": 16, "ok": 16}
    assert ardd.report().notes == ()


def test_the_room_is_enough_for_evaluation_and_another_batch_size() -> None:
    """With the most levels that torch's default limit allows, its eight graphs are enough."""
    model = Net()
    fn = compiled(model)
    x, rest = torch.randn(4, 16), torch.randn(3, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ardd: the function", RuntimeWarning)  # none is left
        for number, p in enumerate([0.0, 0.3, 0.6, 0.3, 0.0, 0.6]):
            rate = ardd.set_rate(model, p, levels=(0.0, 0.25, 0.5))
            for batch in (x, rest) if number == 0 else (rest, x):
                model.train()
                assert draws(fn, batch) == (2 if rate else 0)
                model.eval()
                with torch.no_grad():
                    fn(batch)
    assert counters["frames"] == {"total": LIMIT, "ok": LIMIT}


def test_evaluation_at_one_rate_is_one_graph() -> None:
    """Torch guards on the rate where it drops nothing too; set to 0 before, it is the same."""
    model = Net()
    fn = compiled(model)
    x = torch.randn(4, 16)
    for p in (0.3, 0.6, 0.3):
        ardd.set_rate(model, p, levels=(0.0, 0.25, 0.5))
        model.train()
        assert draws(fn, x) == 2
        ardd.set_rate(model, 0, levels=(0.0, 0.25, 0.5))
        model.eval()
        with torch.no_grad():
            fn(x)
    assert len(ardd.report().graphs) == 3


@pytest.mark.usefixtures("limit")
def test_every_level_is_exact() -> None:
    """And is the rate in effect, where 16 divides the features."""
    model = Net(width=48).double()
    fn = compiled(model)
    for p in (0.1, 0.3, 0.5, 0.7, 0.95):
        rate = ardd.set_rate(model, p)
        x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
        decisions = replay.check_exact(model, [x], compiled=fn)
        assert [(d.p, d.p_used) for d in decisions] == [(rate, rate)] * 2


def test_two_groups_are_a_graph_for_every_combination() -> None:
    model = Net()
    fn = compiled(model)
    for first in (0.25, 0.5):
        for second in (0.25, 0.5):
            ardd.set_rate(model, first, levels=[0.25, 0.5], modules="drop")
            ardd.set_rate(model, second, levels=[0.25, 0.5], modules="again")
            assert draws(fn, torch.randn(4, 16)) == 2
    assert len(ardd.report().graphs) == 4


def test_without_it_torch_stops_compiling_and_ardd_says_so() -> None:
    """The warning comes with the last graph that torch compiles, once, and stays in the report."""
    model = Net()
    fn = compiled(model)
    x = torch.randn(4, 16)
    schedule = [0.1 + 0.05 * step for step in range(12)]
    for number, p in enumerate(schedule):
        model.drop.p = model.again.p = p
        if number == LIMIT - 1:
            with pytest.warns(RuntimeWarning, match="8 of which differ in the rates") as caught:
                draws(fn, x)
            assert "dropouts again, drop has 8 graphs" in str(caught[0].message)
            assert "ardd.set_rate" in str(caught[0].message)
        else:
            assert draws(fn, x) == (2 if number < LIMIT else 0), "uncompiled after the limit"
    (note,) = ardd.report().notes
    assert "recompile_limit is 8" in note
    assert f"note: {note[:60]}" in str(ardd.report())


def test_the_last_graph_may_be_one_for_evaluation() -> None:
    """It drops nothing, and was compiled for a rate all the same."""
    model = Net()
    fn = compiled(model)
    x = torch.randn(4, 16)
    for number in range(1, 1 + LIMIT // 2):
        model.drop.p = number / 10
        model.train()
        assert draws(fn, x) == 2
        model.eval()
        if number < LIMIT // 2:
            fn(x)
    with pytest.warns(RuntimeWarning, match="has 8 graphs, 4 of which differ in the rates"):
        fn(x)


def test_shapes_that_change_are_no_rates() -> None:
    """Torch's limit is reached, and not by rates: nothing that set_rate could help."""
    fn = compiled(Net(), dynamic=False)
    for batch in range(2, 2 + LIMIT):
        draws(fn, torch.randn(batch, 16))
    assert len(ardd.report().graphs) == LIMIT
    assert ardd.report().notes == ()


def test_other_dropouts_are_no_other_rates() -> None:
    """One function of the caller, for models that differ in more than rates."""

    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
            self.drops = nn.ModuleList(nn.Dropout(0.5) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for layer, drop in zip(self.layers, self.drops, strict=True):
                x = drop(layer(x))
            return x

    for depth in range(1, 1 + LIMIT):
        draws(compiled(Deep(depth)), torch.randn(4, 16))
    assert len(ardd.report().graphs) == LIMIT
    assert ardd.report().notes == ()


@has_limit
def test_a_limit_of_the_model_counts() -> None:
    """Both for the levels that there is room for, and for the warning."""
    model = Net()
    fn = compiled(model, recompile_limit=11)
    assert isinstance(fn, nn.Module)
    for step in range(4):
        ardd.set_rate(fn, step / 4, levels=4)
        draws(fn, torch.randn(4, 16))
    assert rates(model) == {0.75}
    with pytest.raises(ardd.RateError, match="5 rates may need 14 graphs"):
        ardd.set_rate(fn, 0.5, levels=5)
    with pytest.raises(ardd.RateError, match="4 rates may need 11 graphs"):
        ardd.set_rate(model, 0.5, levels=4)  # by which nothing can be known of it
    for number in range(5, 12):
        model.drop.p = number / 20
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert draws(fn, torch.randn(4, 16)) == 2
        assert len(caught) == (number == 11)
    assert "recompile_limit is 11" in str(caught[0].message)


@has_limit
def test_a_limit_of_module_compile_counts() -> None:
    model = Net()
    model.compile(backend="ardd", options=EAGER, recompile_limit=6)
    assert ardd.set_rate(model, 0.4, levels=2) == 0.5
    for inside in (model, nn.Sequential(Net(), model)):
        with pytest.raises(ardd.RateError, match="compiles one function 6 times"):
            ardd.set_rate(inside, 0.4, levels=3)


@has_limit
def test_isolated_compiles_have_limits_of_their_own() -> None:
    model = Net()
    both = [compiled(model, isolate_recompiles=True) for _ in range(2)]
    for p in (0.1, 0.2, 0.3, 0.4, 0.5):
        model.drop.p = p
        assert [draws(fn, torch.randn(4, 16)) for fn in both] == [2, 2]
    assert len(ardd.report().graphs) == 10
    assert ardd.report().notes == ()


def test_the_way_out_that_the_error_names() -> None:
    """More levels than torch's limit, under a higher one for this model alone."""
    model = Net()

    @torch.compile(backend="ardd", options=EAGER)
    def train_step(x: Tensor) -> Tensor:
        return model(x).square().sum()  # type: ignore[no-any-return]

    with pytest.raises(ardd.RateError) as caught:
        ardd.set_rate(model, 0.5)
    assert f"torch._dynamo.config.patch(recompile_limit={NEEDED})" in str(caught.value)
    with torch._dynamo.config.patch(recompile_limit=NEEDED):
        for step in range(1, 11):
            ardd.set_rate(model, step / 16)
            assert draws(train_step, torch.randn(4, 16)) == 2
    assert torch._dynamo.config.recompile_limit == LIMIT


# ---- what is set -------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList(
            kind(0.1)
            for kind in (
                *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
                *(nn.AlphaDropout, nn.FeatureAlphaDropout),
            )
        )
        self.off = nn.Dropout(0)
        self.rnns = nn.ModuleList(
            kind(4, 4, num_layers=2, dropout=0.1) for kind in (nn.LSTM, nn.GRU, nn.RNN)
        )
        self.attention = nn.MultiheadAttention(4, 2, dropout=0)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.1)
        self.dropout = 0.1
        self.attention_dropout_prob = 0.0
        # None of these is a rate of a dropout.
        self.single = nn.LSTM(4, 4)
        self.layerdrop = 0.1
        self.drop_path = 0.1
        self.dropout_every = 3
        self.use_dropout = True
        self.dropout_temperature = 1.5
        self.eps = 1e-5


def test_what_is_set_and_what_is_not() -> None:
    model = Everything()
    before = {k: v for k, v in vars(model).items() if isinstance(v, (int, float))}
    assert ardd.set_rate(model, 0.45, levels=2) == 0.5
    assert [module.p for module in [*model.drops, model.off]] == [0.5] * 7
    assert [rnn.dropout for rnn in model.rnns] == [0.5] * 3
    assert (model.attention.dropout, model.encoder.self_attn.dropout) == (0.5, 0.5)
    assert model.encoder.dropout.p == model.encoder.dropout1.p == 0.5
    assert model.single.dropout == 0
    after = {k: v for k, v in vars(model).items() if isinstance(v, (int, float))}
    assert after == before | {"dropout": 0.5, "attention_dropout_prob": 0.5}


@pytest.mark.parametrize(
    ("modules", "chosen"),
    [
        (None, {"a", "b.a", "b.b"}),
        ("", {"a", "b.a", "b.b"}),
        ("b", {"b.a", "b.b"}),
        (["a", "b.b"], {"a", "b.b"}),
        ({"b.a"}, {"b.a"}),
        (lambda name, module: name.endswith("b.b"), {"b.b"}),
        (lambda name, module: name == "b", {"b.a", "b.b"}),
        (lambda name, module: getattr(module, "p", 0) > 0.15, {"a"}),
    ],
)
@pytest.mark.parametrize("compile_it", [False, True])
def test_modules_are_chosen_by_name_or_by_a_function(
    modules: Any, chosen: set[str], compile_it: bool
) -> None:
    drops = {"a": nn.Dropout(0.2), "b.a": nn.Dropout(0.1), "b.b": nn.Dropout(0.1)}
    model: nn.Module = nn.ModuleDict(
        {"a": drops["a"], "b": nn.ModuleDict({"a": drops["b.a"], "b": drops["b.b"]})}
    )
    if compile_it:
        model = torch.compile(model, backend="ardd")  # type: ignore[assignment]
    assert ardd.set_rate(model, 0.5, levels=2, modules=modules) == 0.5
    assert {name for name, drop in drops.items() if drop.p == 0.5} == chosen


def test_compiled_parts_have_the_names_of_the_originals() -> None:
    """Blocks that are compiled one by one hold their modules below ``_orig_mod``."""
    part = torch.compile(Net(), backend="ardd")
    assert isinstance(part, nn.Module)
    model = nn.Sequential(Net(), part)
    ardd.set_rate(model, 0, levels=2, modules="1.drop")
    assert [drop.p for drop in model.modules() if isinstance(drop, nn.Dropout)] == [
        0.5,
        0.5,
        0,
        0.5,
    ]


def test_a_shared_module_has_both_names() -> None:
    drop = nn.Dropout(0.5)
    ardd.set_rate(nn.ModuleDict({"one": drop, "two": drop}), 0, levels=2, modules="two")
    assert drop.p == 0


# ---- levels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "levels", "rate"),
    [
        (0.0, 3, 0.0),
        (0.16, 3, 0.0),
        (0.17, 3, 1 / 3),
        (0.999, 3, 2 / 3),
        (0.25, 2, 0.0),
        (0.26, 2, 0.5),
        (0.3, (0.1, 0.5), 0.1),
        (0.31, (0.5, 0.1), 0.5),
        (0, [0.2], 0.2),
        (0.45, [0, 0.2, 0.2, 0.4], 0.4),
    ],
)
@pytest.mark.usefixtures("limit")
def test_the_nearest_level_is_set(p: float, levels: Any, rate: float) -> None:
    """The lower of two that are as near."""
    model = nn.Dropout(0.9)
    returned = ardd.set_rate(model, p, levels=levels)
    assert returned == model.p == rate
    assert type(returned) is type(model.p) is float


def test_the_limit_of_all_graphs_counts_too() -> None:
    with torch._dynamo.config.patch(recompile_limit=300, accumulated_recompile_limit=NEEDED):
        ardd.set_rate(nn.Dropout(), 0.5)
        with pytest.raises(ardd.RateError, match="compiles one function 41 times"):
            ardd.set_rate(nn.Dropout(), 0.5, levels=17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, "The rate is 1.0. Expected a number from 0 to below 1."),
        ({"p": -0.1}, "The rate is -0.1."),
        ({"p": math.nan}, "The rate is nan."),
        ({"p": True}, "The rate is True."),
        ({"p": "0.5"}, "The rate is '0.5'."),
        ({"levels": 1}, "levels is 1. Expected an int of at least 2, or a sequence of rates"),
        ({"levels": True}, "levels is True."),
        ({"levels": 2.0}, "levels is 2.0."),
        ({"levels": []}, r"levels is \[\]."),
        ({"levels": [0.5, 1.0]}, r"levels is \[0.5, 1.0\]."),
        ({"levels": "0.5"}, "levels is '0.5'."),
        ({"levels": None}, "levels is None."),
        ({"levels": 4}, "4 rates may need 11 graphs: one each for training and for evaluation"),
        ({"levels": 4}, "Torch compiles one function 8 times, .* Or give at most 2 levels."),
        (
            {"levels": (0.1, 0.2, 0.3, 0.4)},
            "4 rates may need 10 graphs.* Or give at most 3 levels.",
        ),
        ({"levels": 16}, r"torch.compile\(model, ..., recompile_limit=41\)"),
        ({"levels": [step / 9 for step in range(9)]}, "9 rates may need 24 graphs"),
        ({"modules": "frist"}, "no module 'frist'. .* Did you mean 'first'?"),
        ({"modules": ["drop", "zzz"]}, "no module 'zzz'. .* gives them.$"),
        ({"modules": "first"}, "No dropout was found in modules='first'. Expected a module"),
        ({"modules": []}, r"No dropout was found in modules=\[\]"),
        ({"modules": lambda name, module: False}, "No dropout was found in modules=<function"),
        ({"model": nn.Linear(2, 2)}, "No dropout was found in the model."),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """With the value, what was expected, and nothing set."""
    model = Net()
    given: dict[str, Any] = {"model": model, "p": 0.3, "levels": 2} | arguments
    with pytest.raises(ardd.RateError, match=message) as caught:
        ardd.set_rate(**given)
    assert isinstance(caught.value, ValueError)
    assert rates(model) == {0.5}


def test_a_limit_without_room_is_refused() -> None:
    with (
        torch._dynamo.config.patch(recompile_limit=5),
        pytest.raises(ardd.RateError) as caught,
    ):
        ardd.set_rate(nn.Dropout(), 0.5, levels=2)
    assert "give at most" not in str(caught.value)


@pytest.mark.usefixtures("limit")
def test_transformers() -> None:
    """Every rate of a model of Hugging Face, those of its attention functions included."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=16,
        encoder_layerdrop=0.25,
    )
    model = transformers.BartModel(config)
    assert ardd.set_rate(model, 0.3, levels=3) == 1 / 3
    layer = model.encoder.layers[0]
    assert layer.dropout == layer.activation_dropout == layer.self_attn.dropout == 1 / 3
    assert model.encoder.layerdrop == 0.25


def test_a_model_of_ardd_compile() -> None:
    """Its limit is torch's own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.drop = nn.LSTM(8, 8, 2, dropout=0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.lstm(x)[0])  # type: ignore[no-any-return]

    module = Net()
    compiled = ardd.compile(module, options={"target": "eager"})
    assert isinstance(compiled, nn.Module)
    assert ardd.set_rate(compiled, 0.3, levels=(0.0, 0.25)) == 0.25
    assert (module.lstm.dropout, module.drop.p) == (0.25, 0.25)
    with pytest.raises(ardd.RateError, match="may need"):
        ardd.set_rate(compiled, 0.3)


def test_batches_that_groups_divide_and_others() -> None:
    """The graphs that rates above a half need are counted: torch's limit is not met."""
    module = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10))
    levels = (0.0, 0.6)
    compiled = torch.compile(module, backend="ardd", options={"target": "eager"})
    needed = 2 * len(levels) + 1 + 2
    with torch._dynamo.config.patch(recompile_limit=needed, fail_on_recompile_limit_hit=True):
        for rate in levels:
            for batch in (512, 513, 514, 515):
                for training in (True, False):
                    module.train(training)
                    ardd.set_rate(module, rate, levels=levels)
                    compiled(torch.randn(batch, 256))
