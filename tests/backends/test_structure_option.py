"""The option ``structure``: which roles may be structured, and what the report says of roles."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd
from ardd import Reason, Role

STRUCTURED_PATTERNS = ("block", "grouped", "window", "row")


class Encoder(nn.Module):
    """A block of a transformer with dropouts of four roles, wide enough to pay."""

    def __init__(self, width: int = 64, p: float = 0.375) -> None:
        super().__init__()
        self.p = p
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.p)
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        weights = F.dropout((q @ k.transpose(-1, -2) / 8).softmax(-1), self.p)
        x = x + F.dropout(self.project(weights @ v), self.p)
        hidden = F.dropout(self.up(self.norms[1](x)).relu(), self.p)
        return x + F.dropout(self.down(hidden), self.p)


ROLES = [Role.RESIDUAL, Role.ATTENTION, Role.RESIDUAL, Role.HIDDEN, Role.RESIDUAL]
# No weight has the dimensions of attention probabilities, and the stream is read by a norm.
SHRINKABLE = [False, False, True, True, True]


def explained(model: nn.Module, *inputs: Tensor, **options: Any) -> ardd.Report:
    given: dict[str, Any] = {"target": "eager", "strict": True, "rate_tolerance": 0.1} | options
    torch._dynamo.reset()  # a model seen before would have symbolic sizes
    report = ardd.explain(model, *inputs, options=given)
    (graph,) = report.graphs
    assert graph.failure is None
    return report


def reasons(report: ardd.Report) -> list[Reason]:
    return [decision.reason for decision in report.decisions]


def encoder(**options: Any) -> ardd.Report:
    report = explained(Encoder(), torch.randn(4, 8, 64), **options)
    assert [decision.role for decision in report.decisions] == ROLES
    return report


@pytest.mark.parametrize("pattern", STRUCTURED_PATTERNS)
def test_a_named_pattern_structures_all_that_can_be(pattern: str) -> None:
    wanted = [Reason.STRUCTURED if able else Reason.NO_PRODUCT for able in SHRINKABLE]
    assert reasons(encoder(pattern=pattern)) == wanted


@pytest.mark.parametrize("pattern", STRUCTURED_PATTERNS)
@pytest.mark.parametrize(
    "structure", [("hidden",), ("residual",), ("hidden", "residual"), ("attention", "channels")]
)
def test_roles_choose(pattern: str, structure: tuple[str, ...]) -> None:
    """What is not chosen says so, but where no product could be shrunk anyway."""
    report = encoder(pattern=pattern, structure=structure)
    for decision, able in zip(report.decisions, SHRINKABLE, strict=True):
        assert decision.role is not None
        chosen = decision.role.value in structure
        assert decision.taken == (able and chosen)
        if not able:
            assert decision.reason is Reason.NO_PRODUCT
        elif not chosen:
            assert decision.reason is Reason.NOT_CHOSEN
            assert (decision.pattern, decision.dim, decision.block) == ("random", None, None)
            assert decision.flops_after == decision.flops_before


def wide_encoder(p: float = 0.375, **options: Any) -> ardd.Report:
    """So wide that structure pays, whichever dropout it is."""
    return explained(Encoder(256, p), torch.randn(16, 64, 256), **options)


def test_auto_structures_what_trains_as_well() -> None:
    report = wide_encoder()
    assert [decision.role for decision in report.decisions] == ROLES
    no, quality = Reason.NO_PRODUCT, Reason.QUALITY
    assert reasons(report) == [no, no, quality, Reason.STRUCTURED, quality]


@pytest.mark.parametrize("structure", [("residual",), ("hidden",), ("hidden", "residual")])
def test_roles_choose_under_auto(structure: tuple[str, ...]) -> None:
    """Whoever names roles has them structured where that pays, and no word of quality is said."""
    report = wide_encoder(structure=structure)
    assert Reason.QUALITY not in reasons(report)
    for decision, able in zip(report.decisions, SHRINKABLE, strict=True):
        assert decision.role is not None
        if not able:
            assert decision.reason is Reason.NO_PRODUCT
        elif decision.role.value in structure:
            assert decision.reason in (Reason.STRUCTURED, Reason.NOT_WORTH_IT)
        else:
            assert decision.reason is Reason.NOT_CHOSEN
    assert any(decision.taken for decision in report.decisions)


def test_auto_leaves_high_rates_random() -> None:
    """Of a role that is structured at the rates that were measured, and not above them."""
    for p, reason in ((0.5, Reason.STRUCTURED), (0.75, Reason.STRUCTURED), (0.9, Reason.QUALITY)):
        layers = [nn.Linear(256, 1024), nn.ReLU(), nn.Dropout(p), nn.Linear(1024, 256)]
        (decision,) = explained(nn.Sequential(*layers), torch.randn(512, 256)).decisions
        assert (decision.role, decision.reason) == (Role.HIDDEN, reason)


def test_auto_leaves_lower_rates_random_where_tokens_share_a_mask() -> None:
    """Of the same role; who names it has it structured."""
    hidden = ROLES.index(Role.HIDDEN)
    for p, reason in ((0.4, Reason.STRUCTURED), (0.5, Reason.QUALITY)):
        assert reasons(wide_encoder(p))[hidden] is reason
    assert reasons(wide_encoder(0.5, structure=("hidden",)))[hidden] is Reason.STRUCTURED


class DropConnect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5))


def test_weights() -> None:
    x = torch.randn(64, 256)
    (decision,) = explained(DropConnect(), x, pattern="block").decisions
    assert (decision.role, decision.reason) == (Role.WEIGHT, Reason.STRUCTURED)
    (decision,) = explained(DropConnect(), x, pattern="block", structure=("hidden",)).decisions
    assert (decision.role, decision.reason) == (Role.WEIGHT, Reason.NOT_CHOSEN)
    (decision,) = explained(DropConnect(), x, pattern="block", structure=("weight",)).decisions
    assert decision.reason is Reason.STRUCTURED


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 64), nn.Linear(64, 50)
        self.rnn = nn.LSTM(64, 64, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.rnn(F.dropout(self.embed(ids), 0.5))
        return self.out(F.dropout(y, 0.5))  # type: ignore[no-any-return]


def test_roles_of_recurrent_layers() -> None:
    ids = torch.randint(50, (4, 6))
    structure = ("rnn_between", "rnn_output")
    with torch._dynamo.config.patch(allow_rnn=True):
        report = explained(Recurrent(), ids, pattern="block", structure=structure)
    found = [(decision.role, decision.reason) for decision in report.decisions]
    assert found == [
        (Role.RNN_INPUT, Reason.NOT_CHOSEN),
        (Role.RNN_BETWEEN, Reason.STRUCTURED),
        (Role.RNN_OUTPUT, Reason.STRUCTURED),
    ]


@pytest.mark.parametrize("pattern", ["auto", *STRUCTURED_PATTERNS])
def test_a_list_is_a_tuple(pattern: str) -> None:
    listed = encoder(pattern=pattern, structure=["residual"])
    assert reasons(listed) == reasons(encoder(pattern=pattern, structure=("residual",)))


@pytest.mark.parametrize("given", [("hiden",), "hidden", (), ["hidden", 3], None])
def test_unknown_roles(given: object) -> None:
    """The error names the roles."""
    with pytest.raises(ardd.OptionsError, match="'auto' or a tuple of 'hidden', 'residual'"):
        encoder(structure=given)


@pytest.mark.parametrize("pattern", ["random", "deferred"])
def test_nothing_to_choose_from(pattern: str) -> None:
    with pytest.raises(ardd.OptionsError, match=f"Allowed: 'auto' with pattern='{pattern}'"):
        encoder(pattern=pattern, structure=("hidden",))
    options = ardd.Options(pattern=pattern, structure="auto")  # type: ignore[arg-type]
    assert options.structure == "auto"


def test_every_role_has_a_name_that_the_option_takes() -> None:
    for role in Role:
        assert ardd.Options(structure=(role.value,)).structure == (role.value,)


def test_roles_in_the_report() -> None:
    """In a column of the text, and in JSON there and back."""
    report = encoder(pattern="block")
    text = str(report)
    for role in ROLES:
        assert role.value in text
    data = json.loads(json.dumps(report.to_dict()))
    rows = data["graphs"][0]["decisions"]
    assert [row["role"] for row in rows] == [role.value for role in ROLES]
    assert ardd.GraphReport.from_dict(data["graphs"][0]) == report.graphs[0]


def test_no_role_where_no_product_was_looked_for() -> None:
    """What is left alone is read by nobody."""
    (decision,) = explained(nn.Sequential(nn.Linear(8, 8), nn.Dropout(1.0)), torch.randn(4, 8)).decisions  # fmt: skip  # noqa: E501
    assert (decision.reason, decision.role) == (Reason.P_IS_ONE, None)
    assert decision.to_dict()["role"] is None
