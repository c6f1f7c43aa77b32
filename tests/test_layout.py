"""The shape of the repository: layers, links, public names, and what an import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ardd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAYERS = ("core", "runtime", "passes", "backends")  # each may import itself and what is left of it
PACKAGE = Path(ardd.__file__).parent
ROOT = Path(__file__).parents[1]
PUBLIC = {
    "ArddError",
    "BudgetError",
    "CostModel",
    "CostModelError",
    "Decision",
    "DistributionError",
    "DerivativeError",
    "Draw",
    "GraphReport",
    "OpCost",
    "Options",
    "OptionsError",
    "PassError",
    "PayloadError",
    "RateError",
    "PeriodDistribution",
    "Reason",
    "RedrawError",
    "Report",
    "Role",
    "SaveReason",
    "SavedTensor",
    "TileDraw",
    "__version__",
    "compile",
    "eager_masks",
    "explain",
    "record_masks",
    "register_cost_model",
    "report",
    "set_rate",
    "search_distribution",
}

needs_checkout = pytest.mark.skipif(
    PACKAGE != ROOT / "src" / "ardd", reason="needs the checkout, and ardd is installed"
)


def library() -> Iterator[Path]:
    """Yields every module of the package, relative to it."""
    for part in (PACKAGE, *(PACKAGE / layer for layer in LAYERS)):
        pattern = "*.py" if part == PACKAGE else "**/*.py"
        yield from (path.relative_to(PACKAGE) for path in sorted(part.glob(pattern)))


MODULES = [str(path) for path in library()]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the level and the dotted name of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_left(module: str) -> None:
    """core <- runtime <- passes <- backends <- the face."""
    here = Path(module).parts
    if len(here) == 1:
        return  # the face may import every layer
    allowed = LAYERS[: LAYERS.index(here[0]) + 1]
    for level, name in imported(parse(module)):
        if level == len(here):  # climbs to the package itself
            assert name.split(".")[0] in allowed, f"{module} imports {name}"
        assert level <= len(here), f"{module} climbs out of the package"


@pytest.mark.parametrize("module", MODULES)
def test_library_imports_itself_relatively(module: str) -> None:
    """An absolute import would load a second copy of every class."""
    absolute = {name.split(".")[0] for level, name in imported(parse(module)) if level == 0}
    assert not absolute & {"ardd", *LAYERS}


@pytest.mark.parametrize("module", MODULES)
def test_library_runs_no_text_and_no_pickles(module: str) -> None:
    """Neither a cache file nor an option may become code."""
    tree = parse(module)
    names = {name.split(".")[0] for _, name in imported(tree)}
    assert not names & {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert not {func.id for func in calls if isinstance(func, ast.Name)} & {"eval", "exec"}


@needs_checkout
@pytest.mark.parametrize("layer", LAYERS)
def test_link_is_relative_and_checked_by_pyright(layer: str) -> None:
    """Pyright does not walk into links: one that is not named is silently not checked."""
    link = PACKAGE / layer
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", layer)
    assert not (ROOT / layer).is_symlink()
    assert f"src/ardd/{layer}" in pyproject()["tool"]["pyright"]["include"]


@needs_checkout
def test_every_link_is_a_layer() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_symlink()} == set(LAYERS)


@needs_checkout
def test_version_is_the_one_of_the_package() -> None:
    assert ardd.__version__ == pyproject()["project"]["version"]


def test_public_names() -> None:
    assert set(ardd.__all__) == PUBLIC
    for name in PUBLIC:
        assert hasattr(ardd, name)


def test_import_is_light() -> None:
    """`import ardd` loads no compiler: the name of a backend costs nothing until it is used."""
    code = (
        "import sys, ardd;"
        "heavy = ('jax', 'torchax', 'triton', 'torch._dynamo', 'torch._inductor');"
        "print([m for m in sys.modules if m.startswith(tuple(h + '.' for h in heavy))"
        " or m in heavy])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "[]\n"
