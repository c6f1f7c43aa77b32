"""Which dropouts "auto" may structure: those whose structured masks train as well as ordinary ones.

A structured mask is shared by all samples of a batch, or by a part of them. Whether that costs
quality depends on the role of the dropout, not on its size: what is dropped between two products
trains as well, what is dropped on a residual stream does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..core.decisions import Reason, Role
from ..core.options import Options

HIGHEST_RATES: Final[Mapping[Role, float]] = {
    # 0.1 to 0.7, where dropout helps: quality_kinds_cpu_202611.md, "MLP", rows "block:hidden".
    Role.HIDDEN: 0.75,
    # 0.3 and 0.5, where dropout helps: the same, "LSTM on words". Up to 0.7, where it does not:
    # quality_cpu_202611.md, "LSTM on words".
    Role.RNN_INPUT: 0.75,
    Role.RNN_OUTPUT: 0.75,
    # At 0.3; at 0.5 it loses half of what dropout gains there.
    Role.RNN_BETWEEN: 0.4,
    # 0.3 to 0.7, where dropout helps: quality_kinds_cpu_202611.md, "DropConnect". Up to 0.75, where
    # it does not: quality_dropconnect_cpu_202611.md.
    Role.WEIGHT: 0.75,
}
"""By role, the highest rate that "auto" structures, with the measurement that it rests on."""

HIGHEST_RATES_OF_TOKENS: Final[Mapping[Role, float]] = {
    # At 0.5 a point of accuracy is lost: quality_kinds_cpu_202611.md, "tuned encoder".
    Role.HIDDEN: 0.4,
}
"""The same where a mask is shared by the tokens or places of a sample, not by samples alone."""


def left_random(role: Role, p: float, of_tokens: bool, options: Options) -> Reason | None:
    """Returns why a dropout stays random whatever it would save, None if it need not.

    Args:
        role: What it does in its network.
        p: Its rate.
        of_tokens: Whether a sample has many rows of features: more than two dimensions are dropped.
        options: What the user asked for.
    """
    if options.structure != "auto":
        return None if role.value in options.structure else Reason.NOT_CHOSEN
    if options.pattern != "auto":
        return None
    highest = HIGHEST_RATES.get(role, 0.0)
    if of_tokens:
        highest = min(highest, HIGHEST_RATES_OF_TOKENS.get(role, highest))
    return Reason.QUALITY if p > highest else None
