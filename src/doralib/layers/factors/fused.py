"""Factors of the parts of a fused projection (q, k, v; gate, up), some of which are adapted."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ... import functional as F
from ...config import DoraConfig, FusedParts
from ...errors import DoraError, UsageError
from ...kernels.cache import LayerCache
from ...kernels.operands import Operands
from ...state import FusedValues, LayerAdapter, blocks
from ..base.linear import Dense
from ..base.opaque import Opaque
from ..init import DRAWN
from .low_rank import Holder, LowRank

# of a length that a file keeps for a row that is left alone: the base may have been quantized when it was written
_SAME_LENGTH = 0.05


class FusedFactors(LowRank):
    """A and B of each adapted part, one below the other: `lora_A` (P R, I), `lora_fused_B` (rows of all parts, R).

    The layer equals separate layers for the parts that share an input, and one draw of dropout. The other parts keep
    the base's numbers, bit for bit: their rows of B are zero and their gain is 1. It computes as one layer of rank P R,
    B having a block for each part; the row numbers of the parts are the layer's buffer `rows`.

    Raises:
        DoraError: if the base's rows cannot be shared out so.
    """

    kept_in_training = False

    def __init__(self, base: Dense, parts: FusedParts, start: str = "kaiming") -> None:
        super().__init__(base, start)
        self.parts = parts
        self._rows = adapted_rows(parts, base.shape[0])
        self._sizes = [len(index) for index in self._rows]
        self._caches = [LayerCache(_base_of_rows(base, index)) for index in self._rows]
        self._whole: tuple[list[Tensor], Tensor, Tensor] | None = None

    def add_to(self, layer: Holder, r: int) -> None:
        a, b = self._empty(r)
        layer.register_buffer("rows", torch.cat(self._rows).to(a.device), persistent=False)
        layer.lora_A = nn.Parameter(a.new_empty(len(self._rows) * r, a.shape[1]))
        layer.lora_fused_B = nn.Parameter(b.new_empty(self.num_lengths, r))

    def reset(self, layer: Holder) -> None:
        for a, _ in self.by_part(layer):
            DRAWN[self.start](a)
        nn.init.zeros_(layer.lora_fused_B)

    def by_part(self, layer: Holder) -> list[tuple[Tensor, Tensor]]:
        """A and B of each part, views."""
        r = layer.lora_fused_B.shape[1]
        return list(zip(layer.lora_A.split(r), layer.lora_fused_B.split(self._sizes), strict=True))

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """A, and B with a block for each part, (O, P R), made anew."""
        return layer.lora_A, blocks(layer.lora_fused_B, layer.rows.split(self._sizes), self.base.shape[0])

    def values(self, layer: Holder) -> FusedValues:
        trained = layer.lora_A, layer.lora_fused_B, layer.lora_magnitude_vector
        return FusedValues(layer.rows.split(self._sizes), *trained, self.cache.base_norm_sq().sqrt())

    def as_own(self, layer: Holder, adapter: LayerAdapter) -> LayerAdapter:
        """The parts of a change of the whole weight.

        Raises:
            DoraError: if it changes rows of which no part is adapted here, or mixes the parts.
        """
        rank, rest = divmod(adapter.rank, len(self._sizes))
        if isinstance(adapter.values, FusedValues) or adapter.shape != self.base.row_shape or rest:
            return adapter
        b = adapter.b_OR
        rows = [index.to(b.device) for index in self._rows]
        parts = [b[index, i * rank : (i + 1) * rank] for i, index in enumerate(rows)]
        stacked = torch.cat(parts)
        m, w_O = adapter.m_O, self.cache.base_norm_sq().sqrt()
        others = torch.ones(len(b), dtype=torch.bool).index_fill(0, torch.cat(self._rows), 0)
        longer = m is not None and not torch.allclose(m.cpu()[others].to(w_O), w_O.cpu()[others], rtol=_SAME_LENGTH)
        if not torch.equal(blocks(stacked, rows, len(b)), b) or longer:
            raise DoraError(
                f"the adapter changes more than the parts {', '.join(self.parts.adapt)} of a fused projection; "
                "load it into a model without fused_modules"
            )
        own_m = None if m is None else m[torch.cat(rows)]
        # a file says the scale by the alpha of all the ranks together, and sqrt(r) leaves a rounding
        scale = layer.scale if math.isclose(adapter.scale, layer.scale, rel_tol=1e-9) else adapter.scale
        values = FusedValues(tuple(rows), adapter.a_RI, stacked, own_m, w_O.to(b.device))
        return LayerAdapter(values=values, scale=scale, kind=adapter.kind)

    @property
    def num_lengths(self) -> int:
        return sum(self._sizes)

    def norm(self, layer: Holder, *, detach: bool) -> Tensor:
        return torch.cat(self._norms(layer, detach=detach))

    def norm_at_start(self, layer: Holder) -> Tensor:
        parts = zip(self._caches, self.by_part(layer), strict=True)
        return torch.cat([cache.norm_at_start(a, b, layer.scale) for cache, (a, b) in parts])

    def gain(self, layer: Holder) -> Tensor | None:
        """1 where nothing is adapted."""
        gain = super().gain(layer)
        return None if gain is None else self._among_all(layer, gain)

    def operands(self, layer: Holder, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Operands:
        """With B and the norm of all rows kept until the norm of a part changes."""
        m = layer.lora_magnitude_vector
        if m is None:
            return super().operands(layer, pair, dtype)
        norms = self._norms(layer, detach=True)
        if self._whole is None or any(now is not then for now, then in zip(norms, self._whole[0], strict=True)):
            self._whole = norms, pair[1], self._among_all(layer, torch.cat(norms))
        _, b_OR, n_O = self._whole
        return self.cache.operands(pair[0], b_OR, self._among_all(layer, m), layer.scale, self.base.bias, dtype, n_O)

    def merge(self, layer: Holder) -> Tensor:
        """The weight, (O, I), in float32, with ``g ∘ (W + s B A)`` in the rows of the adapted parts."""
        W_OI = self.base.W_OI
        merged, m = W_OI.to(F.sum_dtype(W_OI.dtype), copy=True), layer.lora_magnitude_vector
        lengths = [None] * len(self._sizes) if m is None else list(m.split(self._sizes))
        for index, (a, b), m_O in zip(layer.rows.split(self._sizes), self.by_part(layer), lengths, strict=True):
            merged[index] = F.merge_weight(W_OI[index], a, b, m_O, layer.scale)
        return merged

    def forget(self) -> None:
        for cache in (self.cache, *self._caches):
            cache.forget()

    def extra_repr(self) -> str:
        return f"parts={', '.join(self.parts.adapt)}"

    def _norms(self, layer: Holder, *, detach: bool) -> list[Tensor]:
        """Of each part."""
        parts = zip(self._caches, self.by_part(layer), strict=True)
        return [cache.norm(a, b, layer.scale, detach=detach) for cache, (a, b) in parts]

    def _among_all(self, layer: Holder, t: Tensor) -> Tensor:
        """Values of the adapted rows among ones, (O,)."""
        return t.new_ones(self.base.shape[0]).index_copy(0, layer.rows, t)


def adapted_rows(parts: FusedParts, num_rows: int) -> list[Tensor]:
    """The row numbers of each adapted part, in the order of the parts.

    Raises:
        DoraError: if that many rows cannot be shared out so.
    """
    shares, per_repeat = parts.shares, sum(parts.shares.values())
    unit, rest = divmod(num_rows, parts.repeats * per_repeat)
    if rest or not unit:
        times = f"{parts.repeats} times " if parts.repeats > 1 else ""
        shown = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise DoraError(f"{num_rows} rows are not {times}{shown} in equal units")
    table = torch.arange(num_rows).view(parts.repeats, per_repeat, unit)
    split = dict(zip(shares, table.split(list(shares.values()), dim=1), strict=True))
    return [index.reshape(-1) for name, index in split.items() if name in parts.adapt]


def check_parts(bases: Mapping[str, Dense], config: DoraConfig) -> None:
    """Check that every entry of fused_modules has layers among those adapted, and that each is made up as it says.

    Raises:
        UsageError: if not, listing everything that is wrong.
    """
    problems, met = [], []
    for name, base in bases.items():
        parts = config.fused_parts(name)
        if parts is None:
            continue
        met.append(parts)
        if base.kind != "linear":
            problems.append(f"{name} is not a linear layer")
            continue
        try:
            adapted_rows(parts, base.shape[0])
        except DoraError as error:
            problems.append(f"{name}: {error}")
    problems += [
        f"{key!r} names no layer that is adapted; give it in target_modules too"
        for key, parts in config.fused_modules.items()
        if not any(parts is each for each in met)
    ]
    if problems:
        raise UsageError("\n  ".join(["fused_modules:", *problems]))


def _base_of_rows(base: Dense, index: Tensor) -> Dense:
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and not isinstance(base, Opaque):
        return _Block(base, slice(first, last + 1))
    return _Scattered(base, index)


class _Block(Dense):
    """Rows of a frozen layer that lie together: a view."""

    def __init__(self, base: Dense, rows: slice) -> None:
        super().__init__(base.module)
        self._base, self._rows = base, rows

    @property
    def W_OI(self) -> Tensor:
        return self._base.W_OI[self._rows]

    @property
    def _weight(self) -> Tensor:
        return self.W_OI


class _Scattered(Opaque):
    """Rows of a frozen layer here and there, as q of every head: taken from what the whole layer gives."""

    def __init__(self, base: Dense, rows: Tensor) -> None:
        super().__init__(base.module)
        self._base, self._rows = base, rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._base.shape[1]

    def key(self) -> tuple[object, ...]:
        return self._base.key()

    def row_norm_sq(self) -> Tensor:
        return self._base.row_norm_sq()[self._rows]

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return self._base.times_transposed(a_RI)[self._rows]

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        among_all = c_OR.new_zeros(self._base.shape[0], c_OR.shape[1])
        among_all[self._rows] = c_OR
        return self._base.transposed_times(among_all)

    def dense_rows(self, index: Tensor) -> Tensor:
        return self._base.dense_rows(self._rows.to(index.device)[index])
