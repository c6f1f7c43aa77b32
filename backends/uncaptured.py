"""Remembers the RNNs at which torch.compile ended a graph: no graph can tell of them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any, Final

_CONTEXT: Final = re.compile(r"Developer debug context: (.*)")
_told: Counter[str] = Counter()
"""What has been reported already, or belongs to what was compiled before a reset."""


def uncaptured_rnns() -> tuple[str, ...]:
    """Returns a note on every RNN that was met without ``allow_rnn`` since the last reset."""
    notes = []
    for reason in rnn_breaks() - _told:
        context = _CONTEXT.search(reason)
        which = context[1].strip() if context else "an RNN"
        notes.append(
            f"torch.compile did not capture {which}, nor what follows it in the same function; "
            "use ardd.compile(model) in place of torch.compile, which does."
        )
    return tuple(notes)


def forget_rnns(which: Counter[str] | None = None) -> None:
    """Forgets some of those met, as `rnn_breaks` names them, or all so far."""
    _told.update(rnn_breaks() - _told if which is None else which)


def rnn_breaks() -> Counter[str]:
    """Returns how often each RNN was met, in the words of Dynamo."""
    utils: Any = sys.modules.get("torch._dynamo.utils")  # not loaded: nothing was compiled
    counters = {} if utils is None else utils.counters
    return Counter(
        {
            reason: times
            for kind in ("graph_break", "unimplemented")
            for reason, times in counters.get(kind, {}).items()
            if "RNN, GRU, or LSTM" in reason
        }
    )
