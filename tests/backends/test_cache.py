"""Torch's caches under ardd: a warm start is the same, with a report, and nothing stale is hit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ardd
from ardd.backends import inductor, report_cache
from ardd.backends.compilation import Compilation
from ardd.core import version
from ardd.core.decisions import Decision, Reason
from ardd.core.report import GraphReport

from .yardstick import EAGER, PACKAGE, Net, run_python

# ---- two processes -----------------------------------------------------------------------

TRAIN = """
import json, sys, torch
from torch._dynamo.utils import counters
from ardd.backends.dynamo import compile_graph
options = json.loads(sys.argv[1])
dynamic, checkpoint = options.pop("dynamic", False), options.pop("checkpoint", False)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(64, 8)
)
def program(x):
    if checkpoint:
        x = torch.utils.checkpoint.checkpoint(model[:3], x, use_reentrant=False)
        return model[3](x)
    return model(x)
torch.manual_seed(0)
for p in model.parameters():
    torch.nn.init.normal_(p)
compiled = torch.compile(program, backend=compile_graph, options=options)
x = torch.randn(32, 16)
if dynamic:
    torch._dynamo.mark_dynamic(x, 0)
y = compiled(x)
y.sum().backward()
import ardd
print(json.dumps({
    "counters": {**counters["aot_autograd"], **counters["inductor"]},
    "values": [y.tolist(), *(p.grad.tolist() for p in model.parameters())],
    "report": ardd.report().to_dict(),
    "text": str(ardd.report()),
    "file": ardd.__file__,
}))
"""
OPTIONS: dict[str, object] = {"pattern": "block", "strict": True}


def train(cache: Path, package: Path = PACKAGE, **options: Any) -> dict[str, Any]:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(package.parent)}
    printed = run_python(TRAIN, json.dumps(OPTIONS | options), env=env)
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert result["file"].startswith(str(package))
    return result


def assert_hit(result: Mapping[str, Any]) -> None:
    counted = result["counters"]
    assert counted.get("autograd_cache_hit") == 1, counted
    assert not counted.get("autograd_cache_miss")
    assert_no_bypass(result)
    (graph,) = result["report"]["graphs"]
    assert graph["from_cache"]


def assert_miss(result: Mapping[str, Any]) -> None:
    counted = result["counters"]
    assert counted.get("autograd_cache_miss") == 1, counted
    assert counted.get("autograd_cache_saved") == 1, counted
    assert not counted.get("autograd_cache_hit")
    assert not counted.get("fxgraph_cache_hit")
    assert_no_bypass(result)
    (graph,) = result["report"]["graphs"]
    assert not graph["from_cache"]


def assert_no_bypass(result: Mapping[str, Any]) -> None:
    """Neither our ops nor our passes make torch give up caching."""
    assert not [name for name, n in result["counters"].items() if "bypass" in name and n]


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cache that one process has filled, and what that one saw."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, train(cache)


def changed_package(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """Returns a copy of ardd with one file edited."""
    package = tmp_path / "ardd"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return package


@pytest.mark.slow
def test_second_process_hits(cold: tuple[Path, dict[str, Any]]) -> None:
    """The same numbers, and the same report but for where it comes from."""
    cache, first = cold
    assert_miss(first)
    second = train(cache)
    assert_hit(second)
    assert second["values"] == first["values"]
    for graph in second["report"]["graphs"]:
        graph["from_cache"] = False
    assert second["report"] == first["report"]
    assert "from cache" in second["text"]


@pytest.mark.slow
def test_a_lost_report_is_found_again(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Torch's cache may come from another machine, which does not send our files along."""
    shutil.copytree(cold[0], tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "ardd-reports")
    second = train(tmp_path / "cache")
    assert_hit(second)
    assert second["values"] == cold[1]["values"]
    (graph,), (expected,) = second["report"]["graphs"], cold[1]["report"]["graphs"]
    assert graph["decisions"] == expected["decisions"]
    assert graph["saved_bytes_after"] == expected["saved_bytes_after"]
    assert list((tmp_path / "cache" / "ardd-reports").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"block_size": 4}, {"rate_tolerance": 0.5}])
def test_changed_option_misses(cold: tuple[Path, dict[str, Any]], options: dict[str, Any]) -> None:
    result = train(cold[0], **options)
    counted = result["counters"]
    assert counted.get("autograd_cache_miss") == 1
    assert not counted.get("autograd_cache_hit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("passes/compact.py", "from __future__", "# an edit\nfrom __future__"),
        ("runtime/draw_blocks.py", "from __future__", "# an edit\nfrom __future__"),
        ("core/version.py", "VERSION: Final =", "VERSION: Final = '7' +"),
    ],
)
def test_changed_source_misses(
    cold: tuple[Path, dict[str, Any]], tmp_path: Path, file: str, old: str, new: str
) -> None:
    """A changed pass must not be given the graphs of the old one."""
    result = train(cold[0], changed_package(tmp_path, file, old, new))
    counted = result["counters"]
    assert counted.get("autograd_cache_miss") == 1
    assert not counted.get("autograd_cache_hit")
    assert result["values"] == cold[1]["values"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"checkpoint": True}, {"dynamic": True}])
def test_other_programs_hit_too(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = train(tmp_path, **options), train(tmp_path, **options)
    assert_miss(first)
    assert_hit(second)
    assert second["values"] == first["values"]


# ---- one process -------------------------------------------------------------------------


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_warm_report_has_todays_names(fresh_cache: Path) -> None:
    """The same program on another line: torch's cache does not tell them apart."""
    weight = torch.randn(32, 8)

    def first(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) @ weight

    def second(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) @ weight

    options = EAGER | {"target": "inductor"}
    for program in (first, second):
        torch._dynamo.reset()
        torch.compile(program, backend="ardd", options=options)(torch.randn(4, 32))
        (graph,) = ardd.report().graphs
        line = program.__code__.co_firstlineno + 1
        assert graph.decisions[0].source == f"test_cache.py:{line}"
    assert graph.from_cache


def test_the_key_is_made_of_what_matters() -> None:
    options = ardd.Options()
    base = Compilation(options, parameters=[0, 1], hints=[8])
    others = [
        dataclasses.replace(base, options=ardd.Options(pattern="block")),
        dataclasses.replace(base, options=ardd.Options(max_rewrites=1)),
        dataclasses.replace(base, parameters=[0]),
        dataclasses.replace(base, hints=[512]),
        dataclasses.replace(base, plan=1),
    ]
    assert len({base.key, *(other.key for other in others)}) == 6
    assert dataclasses.replace(base, parameters=[1, 0]).key == base.key
    assert version.source_hash() in base.key
    assert "0x" not in base.key, "an address differs from process to process"


def test_sizes_of_this_call_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's keys have a symbol for a batch size; what pays depends on how large it is."""
    from ardd.backends import eager

    keys: list[str] = []

    def note(gm: torch.fx.GraphModule, inputs: Any, compilation: Compilation) -> Any:
        keys.append(compilation.key)
        return gm.forward

    monkeypatch.setattr(eager, "compile_eagerly", note)
    for batch in (8, 512, 8):
        torch._dynamo.reset()
        x = torch.randn(batch, 16)
        torch._dynamo.mark_dynamic(x, 0)
        torch.compile(Net(), backend="ardd", options=EAGER)(x)
    assert keys[0] == keys[2] != keys[1]


def test_the_key_knows_the_version_of_a_cost_model() -> None:
    class Priced:
        name = "cache-priced"

        def __init__(self, version: str) -> None:
            self.version = version

        def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
            return 0.0

    model = Priced("1")
    ardd.register_cost_model("cache-priced", lambda: model)
    compilation = Compilation(ardd.Options(cost_model="cache-priced"))
    first = compilation.key
    model.version = "2"
    assert compilation.key != first


def test_source_hash_covers_every_module(tmp_path: Path) -> None:
    """Other bytes in any file of any layer are another hash."""
    code = "from ardd.core.version import source_hash; print(source_hash())"

    def hashed(package: Path) -> str:
        return run_python(code, env=os.environ | {"PYTHONPATH": str(package.parent)})

    before = hashed(PACKAGE)
    assert before.strip() == version.source_hash()
    edit = ("from __future__", "# an edit\nfrom __future__")
    package = changed_package(tmp_path, "passes/rules/layout.py", *edit)
    assert hashed(package) != before


def test_torch_can_hash_the_hooks() -> None:
    """Without a uuid of its own torch would not cache, or would compare the passes by address."""
    hooks = inductor._hooks(Compilation(ardd.Options(), sites=()))
    again = inductor._hooks(Compilation(ardd.Options(), sites=()))
    for name in ("joint_custom_pre_pass", "custom_partitioner_fn"):
        hook = hooks[name]
        assert isinstance(hook.uuid(), str)
        assert hook.uuid() == again[name].uuid()


def test_passes_of_the_user_run_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """And count in the key; one that has no uuid forbids to cache, as in stock torch."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[bool] = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(any("draw_blocks" in str(node.target) for node in graph.nodes))

        def uuid(self) -> str:
            return "theirs"

    with config.patch(joint_custom_pre_pass=Theirs()):
        ardd.explain(Net(), torch.randn(4, 16), options={"pattern": "block"})
        hook = inductor._hooks(Compilation(ardd.Options()))["joint_custom_pre_pass"]
        assert "theirs" in hook.uuid()
    assert seen == [True, False]  # then in the compile without ardd, to compare with
    with config.patch(joint_custom_pre_pass=lambda graph: None):
        hook = inductor._hooks(Compilation(ardd.Options()))["joint_custom_pre_pass"]
        assert hook.uuid() is None


# ---- reports on disk ---------------------------------------------------------------------

ENTRY = GraphReport(
    decisions=(
        Decision(0, "dropout", "drop", "net.py:3", (4, "s0"), 0.5, True, Reason.STRUCTURED),
    ),
    flops_before=10,
    flops_after=5,
    saved_bytes_before=None,
    saved_bytes_after=7,
    before="a",
    after="b",
    forward="c",
    backward="d",
    inference=False,
)


def test_report_is_read_back(fresh_cache: Path) -> None:
    report_cache.save_report("k", ENTRY)
    assert report_cache.load_report("k") == ENTRY
    (file,) = (fresh_cache / "ardd-reports").iterdir()  # and no temporary file
    assert file.name == "k.json"
    assert stat.S_IMODE((fresh_cache / "ardd-reports").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 99}', "[" * 100_000, "\x00", '{"schema": 1}']
)
def test_a_bad_file_is_no_report(fresh_cache: Path, text: str) -> None:
    report_cache.save_report("k", ENTRY)
    (fresh_cache / "ardd-reports" / "k.json").write_text(text)
    assert report_cache.load_report("k") is None


def test_bytes_that_are_no_text_are_no_report(fresh_cache: Path) -> None:
    report_cache.save_report("k", ENTRY)
    (fresh_cache / "ardd-reports" / "k.json").write_bytes(b"\xff\xfe\x00")
    assert report_cache.load_report("k") is None


def test_a_huge_file_is_not_read(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_cache.save_report("k", ENTRY)
    monkeypatch.setattr(report_cache, "MAX_BYTES", 10)
    assert report_cache.load_report("k") is None


def test_a_folder_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ardd-reports").write_text("a file where the folder should be")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    report_cache.save_report("k", ENTRY)
    assert report_cache.load_report("k") is None
