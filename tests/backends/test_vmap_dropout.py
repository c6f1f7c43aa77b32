"""Dropout under ``torch.vmap``: one site, and masks as its ``randomness`` says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

import ardd

RANDOM: dict[str, Any] = {"pattern": "random", "target": "eager", "strict": True}
MEMBERS = 4


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="ardd", fullgraph=True, options=RANDOM | options)


def decision() -> ardd.Decision:
    """Returns the one row of the one graph."""
    (graph,) = ardd.report().graphs
    assert graph.failure is None
    (found,) = graph.decisions
    return found


def all_equal(members: Tensor) -> bool:
    return all(torch.equal(members[0], member) for member in members[1:])


def all_differ(members: Tensor) -> bool:
    pairs = [(i, j) for i in range(len(members)) for j in range(i)]
    return not any(torch.equal(members[i], members[j]) for i, j in pairs)


def inplace(x: Tensor) -> Tensor:
    return F.dropout(x * 1.0, 0.5, inplace=True)


Call = Callable[[Tensor], Tensor]
# spelling -> function of one member, shape of a member, dimensions that share a draw
SPELLINGS: dict[str, tuple[Call, tuple[int, ...], tuple[int, ...]]] = {
    "F.dropout": (lambda x: F.dropout(x, 0.5), (16, 64), ()),
    "torch.dropout": (lambda x: torch.dropout(x, 0.5, True), (16, 64), ()),
    "module": (nn.Dropout(0.5), (16, 64), ()),
    "inplace": (inplace, (16, 64), ()),
    "dropout1d": (lambda x: F.dropout1d(x, 0.5), (16, 64, 5), (2,)),
    "dropout1d, no batch": (lambda x: F.dropout1d(x, 0.5), (512, 5), (1,)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5), (16, 64, 2, 3), (2, 3)),
    "dropout3d": (lambda x: F.dropout3d(x, 0.5), (16, 64, 2, 1, 3), (2, 3, 4)),
    "dropout3d, no batch": (lambda x: F.dropout3d(x, 0.5), (512, 2, 1, 3), (1, 2, 3)),
    "feature_dropout": (lambda x: torch.feature_dropout(x, 0.5, True), (16, 64, 5), (2,)),
}


def check_mask(members: Tensor, shared: tuple[int, ...]) -> None:
    """Every member drops half, and whole channels where the spelling says so."""
    assert set(members.unique().tolist()) == {0.0, 2.0}
    if shared:
        dims = tuple(dim + 1 for dim in shared)
        assert torch.equal(members.amin(dims), members.amax(dims))
    assert 0.4 < (members == 0).float().mean() < 0.6


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_same(spelling: str) -> None:
    """functorch's contract: every member gets the same mask."""
    fn, shape, shared = SPELLINGS[spelling]
    y = compiled(lambda x: vmap(fn, randomness="same")(x))(torch.ones(MEMBERS, *shape))
    assert all_equal(y)
    check_mask(y, shared)
    assert decision().reason is ardd.Reason.PATTERN_RANDOM


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_different(spelling: str) -> None:
    fn, shape, shared = SPELLINGS[spelling]
    y = compiled(lambda x: vmap(fn, randomness="different")(x))(torch.ones(MEMBERS, *shape))
    assert all_differ(y)
    check_mask(y, shared)
    assert decision().reason is ardd.Reason.PATTERN_RANDOM


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "inplace"])
def test_what_all_members_share(spelling: str, randomness: str) -> None:
    """The input has no dimension of members; their masks are the same or not all the same."""
    fn, shape, shared = SPELLINGS[spelling]

    def member(scale: Tensor, x: Tensor) -> Tensor:
        return fn(x) * scale

    def ensemble(scales: Tensor, x: Tensor) -> Tensor:
        return vmap(member, in_dims=(0, None), randomness=randomness)(scales, x)

    y = compiled(ensemble)(torch.ones(MEMBERS), torch.ones(shape))
    assert y.shape == (MEMBERS, *shape)
    assert all_equal(y) if randomness == "same" else all_differ(y)
    check_mask(y, shared)
    decision()


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_members_along_any_dimension(in_dim: int) -> None:
    x = torch.ones(16, 64, MEMBERS).movedim(2, in_dim)
    for randomness, holds in (("same", all_equal), ("different", all_differ)):
        torch._dynamo.reset()

        def drop(x: Tensor, randomness: str = randomness) -> Tensor:
            return vmap(lambda r: F.dropout(r, 0.5), in_dims=in_dim, randomness=randomness)(x)

        assert holds(compiled(drop)(x))


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_nested(inner: str, outer: str) -> None:
    def drop(x: Tensor) -> Tensor:
        within = vmap(lambda r: F.dropout(r, 0.5), randomness=inner)
        return vmap(within, randomness=outer)(x)

    y = compiled(drop)(torch.ones(3, MEMBERS, 200))
    check_mask(y, ())
    for group in y:
        assert all_equal(group) if inner == "same" else all_differ(group)
    assert all_equal(y) if outer == "same" else all_differ(y)
    decision()


def ensemble_of(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a skeleton, and the parameters of members that are all alike."""
    parameters, _ = stack_module_state([copy.deepcopy(model) for _ in range(MEMBERS)])
    return model, {name: value.detach() for name, value in parameters.items()}


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_ensemble(randomness: str, target: str) -> None:
    """Members with the same weights and the same input differ by their masks alone."""
    layers = [nn.Linear(32, 48), nn.ReLU(), nn.Dropout(0.5), nn.Linear(48, 8), nn.Dropout(0.25)]
    base, parameters = ensemble_of(nn.Sequential(*layers))

    def member(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, parameters, (x,))  # type: ignore[no-any-return]

    def ensemble(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return vmap(member, in_dims=(0, None), randomness=randomness)(parameters, x)

    y = compiled(ensemble, target=target)(parameters, torch.randn(16, 32))
    assert y.shape == (MEMBERS, 16, 8)
    assert all_equal(y) if randomness == "same" else all_differ(y)
    (graph,) = ardd.report().graphs
    assert [d.p for d in graph.decisions] == [0.5, 0.25]


def test_gradients_have_the_masks_of_the_forward() -> None:
    """Backward computes the masks again, of every member its own."""

    def drop(x: Tensor) -> Tensor:
        return vmap(lambda r: F.dropout(r.sin(), 0.5) * r, randomness="different")(x)  # type: ignore[no-any-return]

    x = torch.randn(MEMBERS, 16, 64).requires_grad_()
    y = compiled(drop)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    mask = (y != 0) * 2.0
    assert all_differ(mask)
    torch.testing.assert_close(y, x.sin() * mask * x)
    torch.testing.assert_close(grad, mask * (x.cos() * x + x.sin()))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_alpha_dropout(randomness: str) -> None:
    def drop(x: Tensor) -> Tensor:
        return vmap(lambda r: F.alpha_dropout(r, 0.5, True), randomness=randomness)(x)

    y = compiled(drop)(torch.ones(MEMBERS, 16, 64))
    assert len(y.unique()) == 2
    assert all_equal(y) if randomness == "same" else all_differ(y)
    assert decision().kind == "alpha_dropout"


def test_randomness_has_to_be_chosen() -> None:
    """As in eager mode, where nothing was said a dropout is an error."""

    def drop(x: Tensor) -> Tensor:
        return vmap(lambda r: F.dropout(r, 0.5))(x)

    with pytest.raises(RuntimeError, match="randomness"):
        compiled(drop)(torch.ones(MEMBERS, 8))
