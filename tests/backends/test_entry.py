"""How users reach the backend: by name, with options, and what they get when those are wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ardd
from ardd.backends.dynamo import compile_graph
from ardd.core.decisions import Reason

from .yardstick import EAGER, Net, check_exact, run_python, step

# ---- by name -----------------------------------------------------------------------------


def test_the_name_is_enough() -> None:
    """No `import ardd` in the user's program: torch finds the backend by its entry point."""
    printed = run_python("""
import sys, torch
assert "ardd" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(), torch.nn.Linear(64, 4))
compiled = torch.compile(model, backend="ardd", options={"target": "eager", "pattern": "block"})
compiled(torch.randn(8, 16)).sum().backward()
print([d.reason.name for d in sys.modules["ardd.core.report"].current().decisions])
""")
    assert printed == "['STRUCTURED']\n"


def test_the_name_is_listed() -> None:
    assert "ardd" in torch._dynamo.list_backends()


def test_module_compile_leaves_the_keys_alone() -> None:
    model = Net()
    keys = list(model.state_dict())
    model.compile(backend="ardd", options=EAGER)
    check_exact(model, model, torch.randn(4, 16))
    assert list(model.state_dict()) == keys


def test_module() -> None:
    model = Net()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    check_exact(compiled, model, torch.randn(4, 16))


def test_function() -> None:
    weight = torch.randn(64, 32, requires_grad=True)

    @torch.compile(backend="ardd", options=EAGER)
    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.25) @ weight

    (draw,) = step(layer, nn.Module(), torch.randn(4, 64)).draws
    assert len(draw.kept) * 4 == draw.n_blocks * 3
    (decision,) = ardd.report().decisions
    assert (decision.p, decision.p_used) == (0.25, 0.25)
    assert decision.source.startswith("test_entry.py:")


@pytest.mark.parametrize("name", ["auto", "inductor", "eager"])
def test_targets_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets are what their names say; nothing else than eager runs without Inductor."""
    from ardd.backends import eager, inductor

    used: list[str] = []

    def note(target: str) -> Callable[..., Any]:
        def compile_nothing(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            used.append(target)
            return gm.forward

        return compile_nothing

    monkeypatch.setattr(eager, "compile_eagerly", note("eager"))
    monkeypatch.setattr(inductor, "compile_with_inductor", note("inductor"))
    torch.compile(Net(), backend="ardd", options={"target": name})(torch.randn(2, 16))
    assert used == ["eager" if name == "eager" else "inductor"]


def test_inductor_in_short() -> None:
    """The one test of the quick suite that generates code, forward and backward."""
    model = Net()
    options = EAGER | {"target": "inductor"}
    compiled = torch.compile(model, backend="ardd", options=options)
    run = check_exact(compiled, model, torch.randn(8, 16, requires_grad=True))
    assert len(run.draws) == 2
    (graph,) = ardd.report().graphs
    assert not graph.inference
    assert graph.saved_bytes_after


# ---- arguments of torch.compile ----------------------------------------------------------


def test_fullgraph() -> None:
    model = Net()
    compiled = torch.compile(model, backend="ardd", fullgraph=True, options=EAGER)
    check_exact(compiled, model, torch.randn(4, 16))


def test_fullgraph_does_not_hide_a_break() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    compiled = torch.compile(Broken(), backend="ardd", fullgraph=True, options=EAGER)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.randn(4, 16))


@pytest.mark.parametrize(("dynamic", "compiles"), [(True, 1), (False, 3), (None, 2)])
def test_dynamic(dynamic: bool | None, compiles: int) -> None:
    """Batches of 4, 6 and 9: a symbol at once, never, or from the second size on."""
    model = Net()
    compiled = torch.compile(model, backend="ardd", dynamic=dynamic, options=EAGER)
    for batch in (4, 6, 9):
        check_exact(compiled, model, torch.randn(batch, 16))
    graphs = ardd.report().graphs
    assert len(graphs) == compiles
    shapes = {type(d.shape[0]) for d in graphs[-1].decisions}
    assert shapes == {int if dynamic is False else str}


def test_mode_is_one_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from ardd.backends import inductor

    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any], **kwargs: Any) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(inductor, "_compile_fx", compile_fx)
    mode = "max-autotune-no-cudagraphs"
    torch.compile(Net(), backend="ardd", mode=mode)(torch.randn(2, 16))
    expected = torch._inductor.list_mode_options()[mode]
    assert expected
    assert expected.items() <= seen[0].items()


def test_a_mode_that_leaves_out_passes_does_not_leave_out_ours() -> None:
    """Such as "lite": the user named the backend, and it would silently do nothing."""
    with torch._inductor.config.patch(use_joint_graph_passes=False):
        report = ardd.explain(Net(), torch.randn(2, 16), options={"pattern": "block"})
    assert [d.taken for d in report.decisions] == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.11, when it tunes
def test_mode_through_inductor() -> None:
    model = Net(p=0.5)
    mode = "max-autotune-no-cudagraphs"
    compiled = torch.compile(model, backend="ardd", mode=mode)
    step(compiled, model, torch.randn(8, 16))
    assert [d.reason for d in ardd.report().decisions] == [Reason.NOT_WORTH_IT] * 2


def test_unknown_mode() -> None:
    with pytest.raises(
        ardd.OptionsError, match=r"'mode' is 'fastest'\. Allowed: default, .*max-"
    ) as e:
        torch.compile(Net(), backend="ardd", mode="fastest")(torch.randn(2, 16))
    assert str(e.value).count("default") == 1


# ---- wrong options -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patern": "block"}, r"Unknown option 'patern' \(given 'block'\)\. .* 'pattern'\?"),
        (
            {"pattern": "bloc"},
            r"Option 'pattern' is 'bloc'\. Allowed: 'auto', 'block', 'grouped', 'window', 'row', ",
        ),
        ({"block_size": 0}, r"Option 'block_size' is 0\. Allowed: 'auto' or an int of at least 1"),
        ({"strict": 1}, r"Option 'strict' is 1\. Allowed: True or False"),
    ],
)
def test_options_error_is_not_wrapped(options: dict[str, Any], message: str) -> None:
    """`except ardd.OptionsError` catches it, and it says what was given, and what may be."""
    with pytest.raises(ardd.OptionsError, match=message) as caught:
        torch.compile(Net(), backend="ardd", options=options)(torch.randn(2, 16))
    assert isinstance(caught.value, ValueError)
    assert type(caught.value).__name__ == "OptionsError"
    assert caught.value.__cause__ is None


def test_cost_model_error_is_not_wrapped() -> None:
    compiled = torch.compile(Net(), backend="ardd", options={"cost_model": "rooflin"})
    with pytest.raises(ardd.CostModelError, match="Did you mean 'roofline'"):
        compiled(torch.randn(2, 16))


def test_cost_model_that_cannot_be_made() -> None:
    def broken() -> ardd.CostModel:
        raise FileNotFoundError("prices.json")

    ardd.register_cost_model("entry-broken", broken)
    compiled = torch.compile(Net(), backend="ardd", options={"cost_model": "entry-broken"})
    with pytest.raises(ardd.CostModelError, match=r"cannot be made: FileNotFoundError: prices"):
        compiled(torch.randn(2, 16))


def test_errors_pickle() -> None:
    """A worker process sends them home."""
    with pytest.raises(ardd.OptionsError) as caught:
        torch.compile(Net(), backend="ardd", options={"patern": 1})(torch.randn(2, 16))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ardd.OptionsError
    assert str(copy) == str(caught.value)


def test_wrong_options_leave_no_trace() -> None:
    """After a correction the same model compiles."""
    model = Net()
    with pytest.raises(ardd.OptionsError):
        torch.compile(model, backend="ardd", options={"target": "eagre"})(torch.randn(2, 16))
    assert ardd.report().graphs == ()
    check_exact(torch.compile(model, backend="ardd", options=EAGER), model, torch.randn(2, 16))


# ---- several at once ---------------------------------------------------------------------


def test_two_models_with_different_options() -> None:
    """One process, one class: each keeps its own options, whoever runs first."""
    blocks, whole = Net(), Net()
    first = torch.compile(blocks, backend="ardd", options=EAGER | {"block_size": 4})
    second = torch.compile(whole, backend="ardd", options=EAGER | {"pattern": "random"})
    x = torch.randn(4, 16)
    for _ in range(2):
        assert [draw.n_blocks for draw in step(first, blocks, x).draws] == [8, 8]
        assert step(second, whole, x).draws == []
    assert len(ardd.report().graphs) == 2


def test_one_model_compiled_twice() -> None:
    model = Net()
    first = torch.compile(model, backend="ardd", options=EAGER | {"block_size": 4})
    second = torch.compile(model, backend="ardd", options=EAGER | {"block_size": 1})
    x = torch.randn(4, 16)
    assert [draw.n_blocks for draw in step(first, model, x).draws] == [8, 8]
    assert [draw.n_blocks for draw in step(second, model, x).draws] == [32, 32]


def test_the_graph_of_dynamo_is_not_changed() -> None:
    """Dynamo may hand it to somebody else: a debugger, or the next backend after a failure."""
    graphs: list[tuple[str, str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        compiled = compile_graph(gm, inputs, options=EAGER)
        graphs.append((before, gm.print_readable(print_output=False)))
        return compiled

    model = Net()
    step(torch.compile(model, backend=backend), model, torch.randn(4, 16))
    ((before, after),) = graphs
    assert before == after


def test_user_config_of_inductor_is_left_alone() -> None:
    from torch._inductor import config

    before = config.joint_custom_pre_pass, config.custom_partitioner_fn
    model = Net()
    step(torch.compile(model, backend="ardd", options=EAGER), model, torch.randn(4, 16))
    assert (config.joint_custom_pre_pass, config.custom_partitioner_fn) == before
