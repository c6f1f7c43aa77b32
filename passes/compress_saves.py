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
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import fx

from ..core.decisions import PassResult
from ..core.errors import BudgetError
from ..core.options import Options
from ..core.saves import SavedTensor, SaveReason
from ..runtime.codec import Codec
from ..runtime.quantize_groups import QuantizeGroups
from ..runtime.token_rows import TokenRows
from .classify_saves import SIGN
from .cut_graphs import Cut
from .describe_saves import SMALLEST_BYTES, Save, describe_saves, keeps_sign, saved_row
from .encode_saves import encode, keep_comparison, keep_rows, split_signs
from .merge_views import merge_views
from .plan_saves import BY_FEATURE, QUANTISED
from .recompute_saves import chain_of, recompute
from .save_layout import RowLayout
from .smooth_uses import grows_at

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

    def apply(self, cut: Cut) -> SavesResult:
        """Rewrites both graphs in place.

        Raises:
            BudgetError: no plan that the options allow fits the memory budget.
        """
        before = cut.saved_bytes()
        if self.options.saves == "off":
            return SavesResult(modified=False, bytes_before=before, bytes_after=before)
        merged = merge_views(cut, cut.returned)
        budget = self._budget(before)
        recomputed = self._recompute(cut, describe_saves(cut, self.options), budget)
        # Anew: what is computed again from a save is a use of it.
        saves = describe_saves(cut, self.options)
        self._plan(cut, saves, budget)
        lossy = {save.node for save in saves if save.chosen and not save.chosen.exact}
        rows = [_view_row(view) for view in merged]
        for save, sources in recomputed:
            exact = not lossy & sources
            rows.append(save.row(RECOMPUTED, 0, SaveReason.RECOMPUTED, exact=exact))
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

    def _sources(self, cut: Cut) -> set[fx.Node]:
        """Returns what backward may read: the saves, and the parameters, which stay anyway.

        Not what the forward writes to at its end: backward would read the new values.
        """
        sources = {*cut.parameters, *cut.sizes(), *(node for node, _ in cut.saves())}
        return {node for node in sources if not _is_written(node)}

    # ---- the plan -------------------------------------------------------------------

    def _budget(self, stock_bytes: int) -> int | None:
        given = self.options.memory_budget
        if given is None:
            return None
        return int(given * stock_bytes) if isinstance(given, float) else given

    def _recompute(
        self, cut: Cut, saves: list[Save], budget: int | None
    ) -> list[tuple[Save, set[fx.Node]]]:
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
            if chain is not None and not self._spoils(save, chain, saves):
                recompute(cut, save.node, chain)
                total -= save.exact_bytes
                sources = {source for node in chain for source in node.all_input_nodes}
                done.append((save, sources))
        return done

    def _spoils(self, save: Save, chain: list[fx.Node], saves: list[Save]) -> bool:
        """Returns whether to compute a save again would forbid to encode what it is made from."""
        inside = set(chain)
        sources = {source for node in chain for source in node.all_input_nodes} - inside
        rounded = {other.node for other in saves if other.ladder and other.node in sources}
        if not rounded:
            return False
        if self.options.saves in BY_FEATURE:
            return True  # pointwise ops are no weight gradients
        rough = False
        for node in chain:  # in their order: an error goes on from op to op, and not from seeds
            read = [source for source in node.all_input_nodes if source in rounded]
            rough = rough or any(grows_at(source, node) for source in read)
            rounded |= {node} if read else set()
        return rough or not set(save.uses) <= QUANTISED - {SIGN}

    def _exact_bytes(self, cut: Cut, saves: list[Save]) -> int:
        """Returns the bytes saved with the exact encodings alone."""
        return cut.saved_bytes() - sum(save.bytes - save.exact_bytes for save in saves)

    def _plan(self, cut: Cut, saves: list[Save], budget: int | None) -> None:
        for save in saves:
            deferred = save.facts is not None and save.facts.deferred is not None
            save.chosen = next(iter(save.ladder), None) if deferred else save.exact
        free = [save for save in saves if save.chosen is None and save.ladder]
        if budget is None:
            for save in free:
                save.chosen = self._without_budget(save)
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
            raise BudgetError.of_saves(budget, total, self.options.saves)

    def _without_budget(self, save: Save) -> Codec | TokenRows | None:
        if self.options.saves != "mixed":
            return save.ladder[0]
        bits = 4 if self.options.save_bits == 4 else 8
        fits = [c for c in save.ladder if isinstance(c, QuantizeGroups) and c.bits >= bits]
        return fits[-1] if fits else None

    # ---- the rewrite ----------------------------------------------------------------

    def _apply(self, cut: Cut, save: Save) -> SavedTensor:
        if save.layout is None or save.facts is None:
            return save.row(AS_IS, save.bytes, save.reason, exact=True)
        if save.only_signs:
            after = save.sign_bytes
            split_signs(cut, save.node, save.given, save.layout)
            cut.replace(save.node, [])
            return save.row("1 bit", after, SaveReason.ENCODED, exact=True)
        if save.chosen is None:
            return save.row(AS_IS, save.bytes, save.reason, exact=True)
        name, after = save.chosen.name, save.bytes_with(save.chosen)
        if not save.chosen.exact:
            for pin in save.pins:
                if pin.comparison._erased:  # another save has kept it
                    after -= pin.bytes
                else:
                    keep_comparison(cut, pin.comparison, pin.operand, pin.layout)
        if SIGN in save.uses and not keeps_sign(save.chosen):
            split_signs(cut, save.node, save.given, save.layout)
            name += ", 1 bit"
        if isinstance(save.chosen, TokenRows):
            keep_rows(cut, save.node, save.given, save.chosen)
        else:
            encode(cut, save.node, save.given, save.chosen, save.layout)
        return save.row(name, after, SaveReason.ENCODED, exact=save.chosen.exact)


AS_IS, RECOMPUTED = "as is", "recomputed"


def _is_written(node: fx.Node) -> bool:
    return any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
        for user in node.users
    )


def _view_row(view: fx.Node) -> SavedTensor:
    return saved_row(view, (), 0, 0, AS_IS, SaveReason.SAME_STORAGE, exact=True)


def _steps(saves: list[Save]) -> list[tuple[Save, Codec | TokenRows, int]]:
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
