"""Options say what is wrong with them, and only then."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from ardd.core.errors import (
    ArddError,
    BudgetError,
    CostModelError,
    OptionsError,
    PassError,
    RateError,
    RedrawError,
)
from ardd.core.options import Options

PATTERNS = "'auto', 'block', 'grouped', 'window', 'row', 'random' or 'deferred'"
ROLES = (
    "'auto' or a tuple of 'hidden', 'residual', 'input', 'attention', 'rnn_input', 'rnn_between', "
    "'rnn_output', 'channels', 'channels_skip', 'samples', 'weight', 'output', 'other'"
)
FLOPS = "None, a fraction above 0 and at most 1.0, or an int of FLOPs of at least 0"
WRONG: list[tuple[str, object, str]] = [
    ("pattern", "blok", PATTERNS),
    ("pattern", None, PATTERNS),
    ("structure", None, ROLES),
    ("structure", "hidden", ROLES),
    ("structure", (), ROLES),
    ("structure", ("hidden", "hiden"), ROLES),
    ("structure", ("hidden", None), ROLES),
    ("structure", {"hidden"}, ROLES),
    ("block_size", 0, "'auto' or an int of at least 1"),
    ("block_size", 8.0, "'auto' or an int of at least 1"),
    ("block_size", True, "'auto' or an int of at least 1"),
    ("block_size", "8", "'auto' or an int of at least 1"),
    ("groups", 0, "'auto' or an int of at least 1"),
    ("groups", 2.0, "'auto' or an int of at least 1"),
    ("rate_tolerance", -0.01, "a number from 0 to 1"),
    ("rate_tolerance", 1.5, "a number from 0 to 1"),
    ("rate_tolerance", float("nan"), "a number from 0 to 1"),
    ("rate_tolerance", False, "a number from 0 to 1"),
    ("flops_budget", 0.0, FLOPS),
    ("flops_budget", 1.5, FLOPS),
    ("flops_budget", -1, FLOPS),
    ("flops_budget", True, FLOPS),
    ("max_rate", 0, "a number above 0 and below 1"),
    ("max_rate", 1.0, "a number above 0 and below 1"),
    ("max_rate", float("nan"), "a number above 0 and below 1"),
    ("max_rate", None, "a number above 0 and below 1"),
    ("plans", 0, "an int of at least 1"),
    ("plans", 1.0, "an int of at least 1"),
    ("row_groups", 0, "'auto' or an int of at least 1"),
    ("search", "least", "'narrow', 'maxent', 'sgd' or 'pairwise'"),
    ("max_period", "8", "'auto' or an int of at least 1"),
    ("target", "xla", "'auto', 'inductor' or 'eager'"),
    ("strict", 1, "True or False"),
    ("max_rewrites", -1, "None or an int of at least 0"),
    ("max_rewrites", True, "None or an int of at least 0"),
    ("cost_model", "", "the name of a cost model"),
    ("cost_model", len, "the name of a cost model"),
]


@pytest.mark.parametrize(("key", "given", "allowed"), WRONG)
def test_wrong_value_names_key_given_and_allowed(key: str, given: object, allowed: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.from_mapping({key: given})
    assert str(caught.value) == f"Option {key!r} is {given!r}. Allowed: {allowed}."


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(OptionsError, match="Option 'block_size' is 0"):
        Options(block_size=0)


def test_replacing_a_field_is_checked_too() -> None:
    with pytest.raises(OptionsError, match="Option 'max_rewrites' is -2"):
        dataclasses.replace(Options(), max_rewrites=-2)


@pytest.mark.parametrize("pattern", ["row", "random", "deferred"])
def test_a_budget_needs_a_pattern_whose_rates_can_be_raised(pattern: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.from_mapping({"pattern": pattern, "flops_budget": 0.5})
    assert str(caught.value) == (
        f"Option 'flops_budget' is 0.5. Allowed: None with pattern={pattern!r}."
    )


@pytest.mark.parametrize("pattern", ["random", "deferred"])
def test_roles_need_a_pattern_that_structures(pattern: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.from_mapping({"pattern": pattern, "structure": ("hidden",)})
    assert str(caught.value) == (
        f"Option 'structure' is ('hidden',). Allowed: 'auto' with pattern={pattern!r}."
    )


def test_a_list_of_roles_is_a_tuple() -> None:
    """As JSON has it; options are part of cache keys and have to be hashable."""
    listed = Options.from_mapping({"structure": ["hidden", "weight"]})
    assert listed == Options(structure=("hidden", "weight"))
    assert hash(listed) == hash(Options(structure=("hidden", "weight")))


def test_unknown_key_names_the_known_and_the_nearest() -> None:
    with pytest.raises(OptionsError) as caught:
        Options.from_mapping({"patern": "block"})
    assert str(caught.value) == (
        "Unknown option 'patern' (given 'block'). Known: block_size, cost_model, flops_budget, "
        "groups, max_period, max_rate, max_rewrites, memory_budget, pattern, plans, "
        "rate_tolerance, row_groups, save_bits, save_density, saves, search, strict, structure, "
        "target. Did you mean 'pattern'?"
    )


def test_unknown_key_far_from_all_gets_no_guess() -> None:
    with pytest.raises(OptionsError, match=r"target\.$"):
        Options.from_mapping({"zzz": 1})


def test_options_that_are_no_mapping() -> None:
    with pytest.raises(OptionsError, match="Option 'options' is 'block'"):
        Options.from_mapping("block")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pattern": "block", "block_size": 8},
        {"rate_tolerance": 0, "target": "eager", "strict": True},
        {"rate_tolerance": 1.0, "max_rewrites": 0, "cost_model": "mine"},
        {"flops_budget": 10**12, "max_rate": 0.75},
        {"pattern": "block", "flops_budget": 1.0},
        {"structure": ("hidden", "rnn_input")},
        {"pattern": "row", "structure": ("residual",)},
    ],
)
def test_from_mapping_sets_what_is_given_and_defaults_the_rest(given: dict[str, object]) -> None:
    options = dataclasses.asdict(Options.from_mapping(given))
    assert options == dataclasses.asdict(Options()) | given


def test_none_stands_for_the_defaults() -> None:
    assert Options.from_mapping(None) == Options()


def test_equal_options_print_and_hash_alike() -> None:
    one, other = Options(rate_tolerance=0), Options(rate_tolerance=0.0)
    assert one == other
    assert repr(one) == repr(other)
    assert hash(one) == hash(other)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


ERRORS: list[ArddError] = [
    OptionsError.bad_value("strict", 1, "True or False"),
    CostModelError.unknown_name("rofline", ["roofline"]),
    CostModelError.name_taken("roofline"),
    PassError("compact", ZeroDivisionError("division by zero")),
    RedrawError("%rand = aten.rand([4])"),
    BudgetError.of_saves(100, 200, "nm"),
    BudgetError.of_flops(100, 200, 300, 0.5, 2),
    RateError.bad_rate(2),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_copying_and_another_process(error: ArddError) -> None:
    """Torch's compile workers and pytest's send errors as pickles."""
    twin = copy.copy(error)  # by the same protocol
    assert type(twin) is type(error)
    assert str(twin) == str(error)


def test_messages_say_what_to_do() -> None:
    assert isinstance(ERRORS[0], ValueError)
    assert str(ERRORS[1]) == (
        "Unknown cost model 'rofline'. Known: roofline. Did you mean 'roofline'?"
    )
    assert str(ERRORS[2]).endswith("Register yours by another name.")
    assert str(ERRORS[3]).startswith("Pass 'compact' failed with ZeroDivisionError: division by")
    assert "aten.rand" in str(ERRORS[4])
