"""Notices when changing rates use up the graphs that torch compiles of one function.

Torch itself only logs it, and from then on runs the function uncompiled with every other rate.
"""

from __future__ import annotations

import threading
import warnings
from typing import Final

import torch
from torch._dynamo import eval_frame
from torch._guards import CompileContext

from ..core import report
from ..core.report import GraphReport

_lock: Final = threading.Lock()
_compiled: Final[dict[tuple[int, int], dict[int, GraphReport]]] = {}
"""Of every function, by torch's number and region, the graphs by their number."""


def watch_rates(entry: GraphReport) -> None:
    """Warns if a graph is the last one that torch compiles of a function whose rates change.

    Called while Dynamo compiles the graph; calls outside of that are of no interest.
    """
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_id is None or compile_id.frame_compile_id is None:
        return
    function = (compile_id.frame_id, _region())
    with _lock:
        graphs = _compiled.setdefault(function, {})
        first = compile_id.frame_compile_id not in graphs  # a graph may be split into several
        graphs[compile_id.frame_compile_id] = entry
        entries = list(graphs.values())
    limit = torch._dynamo.config.recompile_limit  # of this compile: torch sets it for each
    if not first or len(entries) != limit:
        return
    sites, rates = _most_rates(entries)
    if rates < 2:
        return
    names = sorted({module or source for _, module, source in sites})
    text = (
        f"the function with the dropouts {', '.join(names)} has {limit} graphs,"
        f" {rates} of which differ in the rates of its dropouts. Torch's recompile_limit is"
        f" {limit}: with any other rate or shape the function runs uncompiled. Set rates by"
        " ardd.set_rate, or raise the limit, as in torch.compile(..., recompile_limit=32)."
    )
    report.note(text)
    warnings.warn(f"ardd: {text}", RuntimeWarning, stacklevel=2)


def forget_rates() -> None:
    """Forgets all graphs, as `torch._dynamo.reset` does."""
    with _lock:
        _compiled.clear()


Sites = tuple[tuple[str, str, str], ...]


def _most_rates(entries: list[GraphReport]) -> tuple[Sites, int]:
    """Returns the dropouts that the most graphs have at different rates, and how many.

    Not those of the last graph: it may be one for evaluation, which has none.
    """
    rates: dict[Sites, set[str]] = {}
    for entry in entries:
        sites = tuple((d.kind, d.module, d.source) for d in entry.decisions)
        if sites:
            rates.setdefault(sites, set()).add(repr([d.p for d in entry.decisions]))
    counts = [(sites, len(found)) for sites, found in rates.items()]
    return max(counts, key=lambda pair: pair[1], default=((), 0))


def _region() -> int:
    """Returns torch's number of a compile with ``isolate_recompiles``, which has its own graphs."""
    # New in torch 2.13
    number = getattr(eval_frame, "get_eval_frame_isolate_recompiles_id", lambda: -1)()
    return int(number)
