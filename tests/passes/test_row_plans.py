"""Tests of the plans of a row pattern: their rates, how close they are, how they differ."""

from __future__ import annotations

import itertools

import pytest

from ardd.core.options import Options
from ardd.passes.row_plans import RowPlans, plan_rows
from ardd.runtime.draw_rows import kept_in_all
from ardd.runtime.search_distribution import search_distribution


def plans(n: int, p: float, site: int = 0, **options: object) -> RowPlans:
    given = Options.from_mapping({"pattern": "row", **options})
    found = plan_rows(n, p, given, site)
    assert found is not None
    return found


def check(found: RowPlans, n: int, p: float, search: str = "narrow", most: int = 8) -> None:
    """Checks what is said of plans against what they are."""
    dropped = [1 - kept_in_all(n, counts) / n for counts in found.counts]
    assert found.rate == pytest.approx(sum(dropped) / len(dropped), abs=1e-12)
    wanted = search_distribution(p, most, search).probabilities
    total = sum(found.totals)
    shares = [count / total for count in found.totals]
    by_hand = sum(abs(a - b) for a, b in zip(shares, wanted, strict=True)) / 2
    assert found.distance == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.875])
@pytest.mark.parametrize("n", [64, 128, 1024])
def test_the_rate_is_met(n: int, p: float) -> None:
    """By the groups of one plan, that is in every step."""
    found = plans(n, p)
    assert len(found.counts) == 1
    assert abs(found.rate - p) <= 0.02
    check(found, n, p)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.4, 0.6])
def test_plans_meet_a_rate_that_no_single_group_can(p: float) -> None:
    """Five plans of one group each have the multiples of a tenth exactly."""
    found = plans(60, p, plans=5, row_groups=1)
    assert found.rate == pytest.approx(p, abs=1e-12)
    assert found.distance == pytest.approx(0, abs=1e-9)
    assert all(sum(counts) == 1 for counts in found.counts)
    check(found, 60, p)


@pytest.mark.parametrize("search", ["maxent", "pairwise", "sgd"])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.7])
def test_more_plans_are_closer(search: str, p: float) -> None:
    """To the distribution; the rate is within what moving one group to another period changes."""
    found = [plans(840, p, plans=m, row_groups=1, search=search) for m in (4, 16, 64)]
    for each in found:
        check(each, 840, p, search)
    assert found[0].distance >= found[1].distance >= found[2].distance
    assert found[2].distance < 0.04
    assert abs(found[0].rate - p) < 0.05
    assert abs(found[2].rate - p) < 0.005


def test_no_multiset_is_closer_in_rate_and_distribution() -> None:
    """All multisets of 4 of the periods 1..8: none has a better rate and is as close."""
    for p in (0.3, 0.5, 0.7):
        found = plans(840, p, plans=4, row_groups=1, search="maxent")
        wanted = search_distribution(p, 8).probabilities
        for periods in itertools.combinations_with_replacement(range(1, 9), 4):
            error = abs(sum(1 - 1 / i for i in periods) / 4 - p)
            away = sum(abs(periods.count(i) / 4 - w) for i, w in enumerate(wanted, 1)) / 2
            better = error < abs(found.rate - p) - 1e-9 and away < found.distance + 1e-9
            assert not better, (p, periods)


def test_dropouts_are_not_aligned() -> None:
    """The orders of the plans of two dropouts differ, and are the same in every compile."""
    orders = [plans(64, 0.3, site, plans=5, row_groups=1).counts for site in range(20)]
    assert len(set(orders)) >= 6  # of the 10 that there are
    assert orders[3] == plans(64, 0.3, 3, plans=5, row_groups=1).counts


def test_the_rate_of_a_plan_varies_little() -> None:
    """Groups are shared out evenly: plans differ by what is left over."""
    found = plans(128, 0.3, plans=4, search="maxent")
    for counts in zip(*found.counts, strict=True):
        assert max(counts) - min(counts) <= 4
    assert {sum(counts) for counts in found.counts} == {sum(found.counts[0])}


def test_what_cannot_be() -> None:
    """A rate that no period has, and groups that do not divide or hold the period."""
    assert plan_rows(64, 0.9, Options(pattern="row", max_period=8), 0) is None
    assert plan_rows(64, 0.5, Options(pattern="row", row_groups=3), 0) is None
    assert plan_rows(64, 0.75, Options(pattern="row", row_groups=32), 0) is None
    assert plan_rows(2, 0.75, Options(pattern="row"), 0) is None
    assert plan_rows(64, 0.9, Options(pattern="row"), 0) is not None


def test_the_text_of_the_report() -> None:
    assert plans(64, 0.5).describe() == "groups of period 2: 8; 0.000 from narrow"
    assert plans(60, 0.3, plans=5, row_groups=1).describe() == (
        "groups of period 1: 2, 2: 3 in 5 plans, of which 0 is shown; 0.000 from narrow"
    )
