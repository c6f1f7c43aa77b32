"""What ardd decided about every dropout it saw, and why."""

from __future__ import annotations

import dataclasses
import enum


class Reason(enum.Enum):
    """Why a dropout was, or was not, turned into structured sparse products.

    The value of each member is the sentence that the report prints.
    """

    STRUCTURED = "the products around it are computed on the kept features only"
    DEFERRED = "the forward keeps everything; what is saved for backward is dropped"
    NOT_DEFERRABLE = "backward uses what it drops for more than gradients of weights, or saves none"
    QUALITY = "a dropout of this role trains worse with a mask that samples share"
    COPIES = "the batch holds samples more than once, whose masks must differ"
    NOT_CHOSEN = 'options={"structure": ...} names other roles'
    NOT_WORTH_IT = "structure saves less time than gathering and expanding costs"
    NO_PRODUCT = "no product with a weight contracts or produces a dimension of it"
    ZEROS_SEEN = "an op divides by its zeros, or tells -0.0 from 0.0: they have to be as they are"
    SHAPE = "no block size gives enough blocks within rate_tolerance"
    DYNAMIC_DIM = "the dimension to drop has no fixed size"
    CONFLICT = "another dropout of the same dimension saves more"
    P_ROUNDS_TO_ZERO = "p is too small to drop anything"
    P_IS_ONE = "everything is dropped; the result is zeros"
    PATTERN_RANDOM = 'options={"pattern": "random"} asks for random masks'
    FALLBACK_RANDOM = "torch._inductor.config.fallback_random asks for the masks of eager mode"
    OUT_OF_FUEL = "max_rewrites was reached"
    WEIGHT_DROPOUT = "what is dropped is a weight (DropConnect) that no product takes in tiles"
    ALPHA_DROPOUT = "alpha dropout does not put zeros: nothing can be skipped"
    INSIDE_SDPA = "the dropout is inside scaled_dot_product_attention"
    INSIDE_RNN = "the dropout is between the layers of a fused RNN call"
    HAND_MASK = "the mask is used in a way that cannot be proven to be a dropout"
    UNUSED = "nothing reads the result"
    SUBGRAPH = "the dropout is in the body of a higher-order operator"
    PASS_FAILED = "an ardd pass failed; the original program runs"


class Role(enum.Enum):
    """What a dropout does in its network, judged by what makes and what reads the dropped tensor.

    The value of each member is what users write and the report prints.
    """

    HIDDEN = "hidden"
    """Made by products with weights and read by products with weights: the inside of an FFN."""
    RESIDUAL = "residual"
    """Added to a stream, or the start of one: it does not go into products alone."""
    INPUT = "input"
    """Read by products with weights, but not made by any: data, embeddings, a stream."""
    ATTENTION = "attention"
    """Probabilities of a softmax that weigh other activations."""
    RNN_INPUT = "rnn_input"
    """Read by a recurrent layer and not made by one."""
    RNN_BETWEEN = "rnn_between"
    """Made by a recurrent layer and read by the next."""
    RNN_OUTPUT = "rnn_output"
    """Made by a recurrent layer and read by anything else."""
    CHANNELS = "channels"
    """Channels or elements of the feature map of a convolution, without a skip around it."""
    CHANNELS_SKIP = "channels_skip"
    """The same where a skip connection or a dense concatenation reads it too."""
    SAMPLES = "samples"
    """Whole samples of a branch (stochastic depth)."""
    WEIGHT = "weight"
    """Made of parameters alone (DropConnect)."""
    OUTPUT = "output"
    """Read by no product: returned, or part of a loss."""
    OTHER = "other"
    """None of these."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """One dropout of the user's program and what became of it."""

    site: int
    """Number of the dropout within its graph, in program order."""
    kind: str
    """What the user wrote: ``dropout``, ``dropout2d``, ``bernoulli``, ..."""
    module: str
    """Path of the module that holds it, ``""`` outside modules."""
    source: str
    """The user's line, ``file.py:12``."""
    shape: tuple[int | str, ...]
    """Shape of the mask; symbolic sizes as text."""
    p: float
    """Drop rate asked for."""
    taken: bool
    """Whether the dropout was rewritten into structured products."""
    reason: Reason
    """Why, from the enumeration."""
    role: Role | None = None
    """What it does in its network; None where no product was looked for."""
    detail: str = ""
    """What the reason needs said about this one, such as the predicted times."""
    pattern: str = "random"
    """Pattern of the kept set."""
    p_used: float | None = None
    """Drop rate in effect after rounding to blocks; None where nothing is known."""
    dim: int | None = None
    """Dimension of the mask that is dropped."""
    block: int | None = None
    """Features per block."""
    flops_before: int = 0
    """FLOPs of the products that this dropout touches, one forward and backward."""
    flops_after: int = 0
    """The same with the dropped features left out."""

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values."""
        fields = dataclasses.asdict(self)
        role = None if self.role is None else self.role.value
        return fields | {"reason": self.reason.name, "role": role, "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did."""

    modified: bool
    """False means that the graph is untouched."""
    decisions: tuple[Decision, ...] = ()
    """One for every candidate that the pass settled, refused ones included."""
