"""The pass over the two graphs of a cut: saves are encoded by what backward uses them for.

forward:   %r = relu(%a)                 saves %r, 4 bytes an element
backward:  %m = le(%r, 0)
           %dw = mm(%g, %r)
=>
forward:   %codes, %scale = ...          saves these, 0.53 bytes an element
backward:  %r = ...
           %m = le(%r, 0)
           %dw = mm(%g, %r)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from ..core.decisions import PassResult
from ..core.errors import BudgetError
from ..core.options import Options
from ..core.saves import SavedTensor, SaveReason
from ..runtime.codec import Codec
from ..runtime.quantize_groups import QuantizeGroups
from ..runtime.token_rows import TokenRows
from .classify_saves import COMPARISONS, INDEX, MASK, SIGN, never_negative, readers, uses_of
from .cut_graphs import Cut, bytes_of, root_of
from .defer_dropout import deferred_rate
from .encode_saves import contractions, encode, keep_rows, split_signs
from .merge_views import merge_views
from .plan_saves import SaveFacts, exact_codec, lossy_codecs
from .recompute_saves import chain_of, recompute
from .relation import shape_of
from .save_layout import RowLayout, row_layout
from .sites import module_path, static_shape

aten = torch.ops.aten

SMALLEST_BYTES = 256
"""Smaller tensors are saved as they are."""
# Relative error (2-norm) on Gaussian activations, to weigh one encoding against another.
_ERRORS: Mapping[str, float] = {"int8": 0.008, "int4": 0.13, "nm": 0.55, "top": 0.6, "rows": 0.8}


@dataclasses.dataclass(frozen=True)
class SavesResult(PassResult):
    """What became of the saves of one graph."""

    saves: tuple[SavedTensor, ...] = ()
    """One row for each."""
    bytes_before: int = 0
    """Bytes kept for backward as torch cut the graph."""
    bytes_after: int = 0
    """Bytes kept with the encodings."""
    encodings: Mapping[str, tuple[Codec | TokenRows, RowLayout]] = dataclasses.field(
        default_factory=dict
    )
    """Names of the tensors that were encoded, to what was done to them."""


@dataclasses.dataclass
class _Save:
    """One saved tensor while its fate is decided."""

    node: fx.Node
    given: fx.Node
    uses: tuple[str, ...]
    bytes: int
    reason: SaveReason = SaveReason.EXACT_ONLY
    layout: RowLayout | None = None
    facts: SaveFacts | None = None
    exact: Codec | None = None
    ladder: list[Codec | TokenRows] = dataclasses.field(default_factory=list)
    chosen: Codec | TokenRows | None = None

    def bytes_with(self, codec: Codec | TokenRows | None) -> int:
        """Returns the bytes of an encoding, with the signs that it does not hold."""
        if codec is None:
            return self.bytes
        assert self.facts is not None
        if isinstance(codec, TokenRows):
            total = codec.payload_bytes(self.facts.row, self.facts.dtype)
        else:
            rows = self.bytes // (self.facts.row * self.facts.dtype.itemsize)
            total = rows * codec.row_bytes(self.facts.row, self.facts.dtype)
        return total + (self.sign_bytes if SIGN in self.uses and not _keeps_sign(codec) else 0)

    @property
    def exact_bytes(self) -> int:
        """Bytes without any loss."""
        signs_alone = set(self.uses) == {SIGN} and self.facts is not None
        return self.sign_bytes if signs_alone else self.bytes_with(self.exact)

    @property
    def sign_bytes(self) -> int:
        """Bytes of the comparisons, one bit for each."""
        assert self.facts is not None
        compared = {(u.target, u.args[1]) for _, u in _comparisons(self.given)}
        return len(compared) * (self.bytes // self.facts.dtype.itemsize + 7) // 8


@dataclasses.dataclass(frozen=True)
class CompressSaves:
    """Encodes what is saved for backward, exactly or, if the options say so, with a loss.

    Park et al. 2021, "Deferred Dropout", https://doi.org/10.1109/ICCAD51958.2021.9643433: the
    forward uses the dense tensor, and only what is kept for backward is dropped or rounded.

    1. An encoding is allowed if it is for all uses that backward makes of the tensor.
    2. A tensor that is kept anyway, as an input or a result of the program, stays as it is.
    3. What is saved never becomes larger.
    """

    name: ClassVar[str] = "compress-saves"
    exact: ClassVar[bool] = False

    options: Options = dataclasses.field(default_factory=Options)
    """What the user asked for."""
    parameters: Collection[int] = ()
    """Which inputs of the Dynamo graph are parameters."""

    def apply(self, cut: Cut) -> SavesResult:
        """Rewrites both graphs in place.

        Raises:
            BudgetError: no plan that the options allow fits the memory budget.
        """
        before = cut.saved_bytes()
        if self.options.saves == "off":
            return SavesResult(modified=False, bytes_before=before, bytes_after=before)
        kept = {root_of(node) for node in cut.outputs if isinstance(node, fx.Node)}
        merged = merge_views(cut, kept)
        budget = self._budget(before)
        recomputed = self._recompute(cut, self._saves(cut), budget)
        saves = self._saves(cut)  # anew: what is computed again from a save is a use of it
        self._plan(cut, saves, budget)
        lossy = {save.node for save in saves if save.chosen and not save.chosen.exact}
        rows = [_view_row(view) for view in merged]
        for save, sources in recomputed:
            exact = not lossy & sources
            rows.append(_row(save, RECOMPUTED, 0, SaveReason.RECOMPUTED, exact=exact))
        rows += [self._apply(cut, save) for save in saves]
        cut.tidy()
        after = cut.saved_bytes()
        return SavesResult(
            modified=any(row.encoding != AS_IS for row in rows),
            saves=tuple(rows),
            bytes_before=before,
            bytes_after=after,
            encodings={
                save.node.name: (save.chosen, save.layout)
                for save in saves
                if save.chosen is not None and save.layout is not None
            },
        )

    # ---- what is known --------------------------------------------------------------

    def _saves(self, cut: Cut) -> list[_Save]:
        kept = {root_of(node) for node in cut.outputs if isinstance(node, fx.Node)}
        grads = self._parameter_grads(cut)
        saves = []
        for node, given in cut.saves():
            root = root_of(node)
            save = _Save(node, given, uses_of(given, grads), bytes_of(node))
            saves.append(save)
            if root.op == "placeholder":
                save.bytes, save.reason = 0, SaveReason.NO_BYTES
            elif root in kept:
                save.bytes, save.reason = 0, SaveReason.USER_OUTPUT
            elif save.bytes < SMALLEST_BYTES:
                save.reason = SaveReason.SMALL
            else:
                self._add_facts(save)
        return saves

    def _add_facts(self, save: _Save) -> None:
        value = save.node.meta["val"]
        # Bits are packed in eight runs, that have to be whole vectors; features stay in a row.
        shortest, multiple = (1024, 128) if set(save.uses) <= {MASK, SIGN} else (64, 64)
        save.layout = row_layout(value, shortest, multiple)
        if save.layout is None:
            shared = any(isinstance(s, int) and s == 0 for s in value.stride())
            save.reason = SaveReason.OVERLAPPING if shared else SaveReason.DYNAMIC
            return
        comparisons = _comparisons(save.given)
        direct = all(read is save.given for read, _ in comparisons)
        with_zero = all(_with_zero(user) for _, user in comparisons)
        tokens = shape_of(save.node)[0]
        matrix = len(shape_of(save.node)) == 2 and save.layout.order == (0, 1)
        save.facts = SaveFacts(
            uses=save.uses if direct or SIGN not in save.uses else ("a comparison",),
            dtype=value.dtype,
            row=save.layout.row,
            tokens=tokens
            if matrix and isinstance(tokens, int) and contractions(save.given) is not None
            else None,
            largest=_largest_index(save.node) if save.uses == (INDEX,) else None,
            deferred=deferred_rate(save.node),
            sign=bool(comparisons) and direct and with_zero and never_negative(save.node),
        )
        exact = exact_codec(save.facts)
        save.exact = exact if exact and save.bytes_with(exact) < save.bytes else None
        allowed = lossy_codecs(save.facts, self.options)
        save.ladder = [
            codec
            for codec in allowed
            if codec.refusal(value.dtype, save.layout.row) is None
            and save.bytes_with(codec) < save.bytes
        ]
        if self.options.saves != "exact":
            refused = SaveReason.UNSUPPORTED if allowed else SaveReason.USE
            save.reason = SaveReason.BUDGET if save.ladder else refused

    def _parameter_grads(self, cut: Cut) -> set[fx.Node]:
        (results,) = cut.backward.graph.output_node().args
        assert isinstance(results, (tuple, list))
        nodes = [(i, result) for i, result in enumerate(results) if isinstance(result, fx.Node)]
        others = {node for i, node in nodes if i not in cut.parameter_grads}
        return {node for i, node in nodes if i in cut.parameter_grads} - others

    def _sources(self, cut: Cut) -> set[fx.Node]:
        """Returns what backward may read: the saves, and the parameters, which stay anyway."""
        parameters = {
            node
            for node in cut.forward.graph.find_nodes(op="placeholder")
            if getattr(node.meta.get("desc"), "idx", None) in self.parameters
            and not any(user.target is aten.copy_.default for user in node.users)
        }
        return parameters | {node for node, _ in cut.saves()}

    # ---- the plan -------------------------------------------------------------------

    def _budget(self, stock_bytes: int) -> int | None:
        given = self.options.memory_budget
        if given is None:
            return None
        return int(given * stock_bytes) if isinstance(given, float) else given

    def _recompute(
        self, cut: Cut, saves: list[_Save], budget: int | None
    ) -> list[tuple[_Save, set[fx.Node]]]:
        """Has backward compute again what cheap ops give, the largest first, until a budget is met.

        Returns:
            The saves that are gone, and what each is computed from.
        """
        if budget is None and self.options.saves != "mixed":
            return []
        total, done = self._exact_bytes(cut, saves), []
        for save in sorted(saves, key=lambda s: -s.bytes):
            if budget is not None and total <= budget:
                break
            stays = save.reason in (SaveReason.NO_BYTES, SaveReason.USER_OUTPUT)
            if stays or save.bytes < SMALLEST_BYTES:
                continue
            chain = chain_of(save.node, self._sources(cut))
            if chain is not None:
                recompute(cut, save.node, chain)
                total -= save.exact_bytes
                sources = {source for node in chain for source in node.all_input_nodes}
                done.append((save, sources))
        return done

    def _exact_bytes(self, cut: Cut, saves: list[_Save]) -> int:
        """Returns the bytes saved with the exact encodings alone."""
        return cut.saved_bytes() - sum(save.bytes - save.exact_bytes for save in saves)

    def _plan(self, cut: Cut, saves: list[_Save], budget: int | None) -> None:
        for save in saves:
            deferred = save.facts is not None and save.facts.deferred is not None
            save.chosen = next(iter(save.ladder), None) if deferred else save.exact
        free = [save for save in saves if save.chosen is None and save.ladder]
        if budget is None:
            # Of 8 and 4 bits, that `mixed` has both of, the one asked for.
            step = int(self.options.saves == "mixed" and self.options.save_bits == 4)
            for save in free:
                save.chosen = save.ladder[min(step, len(save.ladder) - 1)]
            return
        total = self._exact_bytes(cut, saves)
        for save in saves:
            if save.chosen is not None:
                total -= save.exact_bytes - save.bytes_with(save.chosen)
        for save, codec, fewer in _steps(free):
            if total <= budget:
                return
            save.chosen = codec
            total -= fewer
        if total > budget:
            raise BudgetError(budget, total, self.options.saves)

    # ---- the rewrite ----------------------------------------------------------------

    def _apply(self, cut: Cut, save: _Save) -> SavedTensor:
        if save.layout is None or save.facts is None:
            return _row(save, AS_IS, save.bytes, save.reason, exact=True)
        after = save.bytes_with(save.chosen)
        signs: list[fx.Node] = []
        if SIGN in save.uses and save.facts.uses == save.uses:
            alone, sign_bytes = set(save.uses) == {SIGN}, save.sign_bytes
            if alone or (save.chosen is not None and not _keeps_sign(save.chosen)):
                signs = split_signs(cut, save.node, save.given, save.layout)
            if alone:
                cut.replace(save.node, [])
                return _row(save, "1 bit", sign_bytes, SaveReason.ENCODED, exact=True)
        if save.chosen is None:
            return _row(save, AS_IS, save.bytes, save.reason, exact=True)
        if isinstance(save.chosen, TokenRows):
            keep_rows(cut, save.node, save.given, save.chosen)
        else:
            encode(cut, save.node, save.given, save.chosen, save.layout)
        name = save.chosen.name + (", 1 bit" if signs else "")
        return _row(save, name, after, SaveReason.ENCODED, exact=save.chosen.exact)


AS_IS, RECOMPUTED = "as is", "recomputed"


def _view_row(view: fx.Node) -> SavedTensor:
    return saved_row(view, (), 0, 0, AS_IS, SaveReason.SAME_STORAGE, exact=True)


def _row(save: _Save, encoding: str, after: int, reason: SaveReason, *, exact: bool) -> SavedTensor:
    return saved_row(save.node, save.uses, save.bytes, after, encoding, reason, exact=exact)


def _steps(saves: list[_Save]) -> list[tuple[_Save, Codec | TokenRows, int]]:
    """Returns the next encodings of all saves, those first that cost least for what they save.

    A smaller budget takes more steps of the same sequence, so that it never saves more.
    """
    steps = []
    for save in saves:
        bytes_now, error_now, worst = save.bytes, 0.0, 0.0
        for codec in save.ladder:
            fewer = bytes_now - save.bytes_with(codec)
            if fewer <= 0:
                continue
            # A step never comes before the one that it starts from.
            worst = max(worst, (_error(codec) - error_now) * save.bytes / fewer)
            steps.append((worst, save, codec, fewer))
            bytes_now, error_now = bytes_now - fewer, _error(codec)
    steps.sort(key=operator.itemgetter(0))
    return [(save, codec, fewer) for _, save, codec, fewer in steps]


def _error(codec: Codec | TokenRows) -> float:
    return next((e for name, e in _ERRORS.items() if codec.name.startswith(name)), 1.0)


def _keeps_sign(codec: Codec | TokenRows) -> bool:
    return isinstance(codec, QuantizeGroups) and codec.sign


def _comparisons(given: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    return [(read, user) for read, user in readers(given) if user.target in COMPARISONS]


def _with_zero(comparison: fx.Node) -> bool:
    number: object = comparison.args[1]
    return comparison.target in (aten.le.Scalar, aten.gt.Scalar) and bool(number == 0)


def _largest_index(node: fx.Node) -> int | None:
    """Returns the largest index that a reduction can give, None where it is not known."""
    source: Any = node
    if node.target is operator.getitem:
        source = node.args[0]
        if node.args[1] != 1:
            return None
    args = source.args
    if source.target in (aten.max.dim, aten.min.dim, aten.sort.default, aten.argmax.default):
        bound = _size_along(args[0], args[1] if len(args) > 1 else -1)
    elif source.target is aten.topk.default:
        bound = _size_along(args[0], args[2] if len(args) > 2 else -1)
    elif source.target is aten.max_pool2d_with_indices.default:
        *_, height, width = shape_of(args[0])
        bound = height * width
    else:
        return None
    return bound - 1 if isinstance(bound, int) else None


def _size_along(x: fx.Node, dim: int | None) -> int | torch.SymInt | None:
    return None if dim is None else shape_of(x)[dim]


def saved_row(
    node: fx.Node,
    uses: tuple[str, ...],
    before: int,
    after: int,
    encoding: str,
    reason: SaveReason,
    *,
    exact: bool,
) -> SavedTensor:
    """Returns the row of the report for a tensor."""
    value = node.meta["val"]
    return SavedTensor(
        name=node.name,
        op=str(root_of(node).target).replace("<built-in function getitem>", "getitem"),
        module=module_path(node),
        uses=uses,
        shape=static_shape(value),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes_before=before,
        bytes_after=after,
        encoding=encoding,
        exact=exact,
        reason=reason,
    )
