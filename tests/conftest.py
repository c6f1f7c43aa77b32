"""What every test runs under: its own seed, a clean record, and one compile cache per run."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # Several processes share the cores: one thread each, also for what torch starts itself.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis  # noqa: E402  # the settings above are read when torch is imported
import pytest  # noqa: E402
import torch  # noqa: E402

if WORKER:
    torch.set_num_threads(1)


class _TorchRandom:
    """Torch's generators as hypothesis wants them: it seeds them anew for every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis holds no reference of its own
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("ardd", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ardd")

SAMPLE_ONE_IN = 8
CACHE = "TORCHINDUCTOR_CACHE_DIR"
_caches: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("all", "sample"),
        default="all",
        help=f"run all tests marked slow, or a fixed one in {SAMPLE_ONE_IN} of them",
    )


def pytest_configure() -> None:
    """Gives the run a compile cache of its own, which the workers inherit."""
    if CACHE not in os.environ:
        _caches.append(tempfile.mkdtemp(prefix="ardd-tests-"))
        os.environ[CACHE] = _caches[0]


def pytest_unconfigure() -> None:
    for cache in _caches:
        shutil.rmtree(cache, ignore_errors=True)
        del os.environ[CACHE]
    _caches.clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    no_xla = pytest.mark.skip(reason="needs torchax and JAX")
    has_cuda = torch.cuda.is_available()
    has_xla = all(importlib.util.find_spec(name) for name in ("torchax", "jax"))
    for item in items:
        if "cuda" in item.keywords and not has_cuda:
            item.add_marker(no_cuda)
        if "xla" in item.keywords and not has_xla:
            item.add_marker(no_xla)
    if config.getoption("--slow") == "sample":
        left_out = [i for i in items if "slow" in i.keywords and _seed(i.nodeid) % SAMPLE_ONE_IN]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds everything from the test's own id, so that the order of tests changes nothing."""
    value = _seed(request.node.nodeid)
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Forgets compiled graphs and ardd's record after each test."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "ardd.core.report" in sys.modules:
        sys.modules["ardd.core.report"].clear()
