"""What ardd decided about every tensor that the forward saves for the backward, and why."""

from __future__ import annotations

import dataclasses
import enum


class SaveReason(enum.Enum):
    """Why a saved tensor is, or is not, encoded.

    The value of each member is the sentence that the report prints.
    """

    ENCODED = "encoded by what backward uses it for"
    RECOMPUTED = "computed again from other saves by pointwise ops"
    SAME_STORAGE = "it shares its memory with another save: to encode it alone would free nothing"
    NO_BYTES = "an input, a parameter or a view of one: it is kept anyway"
    USER_OUTPUT = "the program returns it: it is kept anyway"
    SMALL = "too small to be worth it"
    EXACT_ONLY = "no exact encoding is smaller; saves allows no other"
    USE = "backward uses it in a way that no encoding of this family is allowed for"
    UNSUPPORTED = "no encoding of this family holds rows of this type and length"
    DYNAMIC = "its rows have no fixed length"
    OVERLAPPING = "elements of it share memory"
    HUGE_VALUES = "it may hold numbers as large as those of masks, beside which others are lost"
    PARAMETERS = "made of parameters alone: it is never encoded with a loss"
    BUDGET = "the memory budget is met without"


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """One tensor that the forward saves for the backward."""

    name: str
    """Name of the node in the forward graph."""
    op: str
    """The op that produces it."""
    module: str
    """Path of the module that produces it, ``""`` outside modules."""
    uses: tuple[str, ...]
    """What backward uses it for: ``mask``, ``sign``, ``index``, ``weight gradient``,
    ``attention``, ``softmax``, ``pointwise``, ``statistic`` or the name of an op."""
    shape: tuple[int | str, ...]
    """Its shape; symbolic sizes as text."""
    dtype: str
    """Its type, ``float32``."""
    bytes_before: int
    """Bytes that it keeps without ardd."""
    bytes_after: int
    """Bytes that it keeps with ardd."""
    encoding: str
    """``as is``, ``recomputed``, ``1 bit``, ``int8``, ``nm 4:16``, ..."""
    exact: bool
    """Whether backward sees the very tensor."""
    reason: SaveReason
    """Why, from the enumeration."""
    error: float | None = None
    """Relative error (2-norm) on the example batch; None where it was not measured."""

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values."""
        fields = dataclasses.asdict(self)
        return fields | {
            "reason": self.reason.name,
            "shape": list(self.shape),
            "uses": list(self.uses),
        }
