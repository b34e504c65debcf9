"""Adapted fused projections: one frozen layer that holds several (q, k, v; gate, up), some of which are adapted."""

import math
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import DoraConfig, FusedParts
from ..errors import DoraError, UsageError
from ..kernels.cache import LayerCache
from ..kernels.operands import Operands
from ..state import FusedValues, LayerAdapter, blocks
from .base.linear import Dense
from .base.opaque import Opaque
from .init import DRAWN
from .linear import DoraLinear

# of a length that a file keeps for a row that is left alone: the base may have been quantized when it was written
_SAME_LENGTH = 0.05


class DoraFused(DoraLinear):
    """A frozen fused projection whose adapted parts each learn lengths (m) and a low-rank turn of direction (B A).

    It equals separate layers for the parts that share an input, and one draw of dropout. The other parts keep the
    base's numbers, bit for bit: their rows of B are zero and their gain is 1. It computes as one layer of rank
    R times the number of adapted parts, B having a block for each.

    Raises:
        DoraError: if the layer is not linear.
    """

    lora_fused_B: nn.Parameter
    """B of the parts, one below the other, (rows of all adapted parts, R)."""
    rows: Tensor
    """The row numbers of those."""

    def __init__(
        self,
        base_layer: nn.Module,
        parts: FusedParts,
        r: int,
        scale: float,
        config: DoraConfig,
        base: Dense | None = None,
    ) -> None:
        self._freeze(base_layer, scale, config, base)
        self._parts = parts
        self._add_parameters(r, config)

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """B with a block for each part, (O, P R), made anew."""
        return blocks(self.lora_fused_B, self.rows_by_part, self.out_features)

    @property
    def rows_by_part(self) -> tuple[Tensor, ...]:
        """Views of `rows`."""
        return self.rows.split(self._sizes)

    @property
    def num_lengths(self) -> int:
        return len(self.rows)

    @property
    def factors_by_part(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each part, views."""
        r = self.lora_fused_B.shape[1]
        return list(zip(self.lora_A.split(r), self.lora_fused_B.split(self._sizes), strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for cache in self.part_caches:
            cache.forget()
        return super()._apply(fn, recurse)

    def gain(self) -> Tensor | None:
        """``g = m / |W + s B A|``, (O,), 1 where nothing is adapted; None for LoRA."""
        m = self.lora_magnitude_vector
        return None if m is None else self._among_all(m / torch.cat(self._lengths(detach=self.detach_norm)))

    def values(self) -> FusedValues:
        parts = self.lora_A, self.lora_fused_B, self.lora_magnitude_vector
        return FusedValues(self.rows_by_part, *parts, self.cache.base_norm_sq().sqrt())

    def as_own(self, adapter: LayerAdapter) -> LayerAdapter:
        """The parts of a change of the whole weight.

        Raises:
            DoraError: if it changes rows of which no part is adapted here, or mixes the parts.
        """
        rank, rest = divmod(adapter.rank, len(self._sizes))
        if isinstance(adapter.values, FusedValues) or adapter.shape != self.base.row_shape or rest:
            return adapter
        b = adapter.b_OR
        rows = [index.to(b.device) for index in self.rows_by_part]
        parts = [b[index, i * rank : (i + 1) * rank] for i, index in enumerate(rows)]
        stacked = torch.cat(parts)
        m, w_O = adapter.m_O, self.cache.base_norm_sq().sqrt()
        others = torch.ones(len(b), dtype=torch.bool).index_fill(0, self.rows.cpu(), 0)
        longer = m is not None and not torch.allclose(m.cpu()[others].to(w_O), w_O.cpu()[others], rtol=_SAME_LENGTH)
        if not torch.equal(blocks(stacked, rows, len(b)), b) or longer:
            raise DoraError(
                f"the adapter changes more than the parts {', '.join(self._parts.adapt)} of a fused projection; "
                "load it into a model without fused_modules"
            )
        own_m = None if m is None else m[torch.cat(rows)]
        # a file says the scale by the alpha of all the ranks together, and sqrt(r) leaves a rounding
        scale = self.scale if math.isclose(adapter.scale, self.scale, rel_tol=1e-9) else adapter.scale
        values = FusedValues(tuple(rows), adapter.a_RI, stacked, own_m, w_O.to(b.device))
        return LayerAdapter(values=values, scale=scale, kind=adapter.kind)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight, (O, I), in float32, with ``g ∘ (W + s B A)`` in the rows of the adapted parts."""
        W_OI = self.base.W_OI
        merged, m = W_OI.to(F.sum_dtype(W_OI.dtype), copy=True), self.lora_magnitude_vector
        lengths = [None] * len(self._sizes) if m is None else list(m.split(self._sizes))
        for index, (a, b), m_O in zip(self.rows_by_part, self.factors_by_part, lengths, strict=True):
            merged[index] = F.merge_weight(W_OI[index], a, b, m_O, self.scale)
        return merged

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={', '.join(self._parts.adapt)}"

    def _register_factors(self, a: nn.Parameter, b: nn.Parameter) -> None:
        rows = adapted_rows(self._parts, self.out_features)
        self._sizes = [len(index) for index in rows]
        self.register_buffer("rows", torch.cat(rows).to(a.device), persistent=False)
        self.lora_A = nn.Parameter(a.new_empty(len(rows) * a.shape[0], a.shape[1]))
        self.lora_fused_B = nn.Parameter(b.new_empty(len(self.rows), b.shape[1]))
        self.part_caches = [LayerCache(_base_of_rows(self.base, index)) for index in rows]
        self._whole: tuple[list[Tensor], Tensor, Tensor] | None = None

    def _start_factors(self) -> None:
        for a, _ in self.factors_by_part:
            DRAWN[self.start](a)
        nn.init.zeros_(self.lora_fused_B)

    def _start_lengths(self) -> Tensor:
        return torch.cat([cache.norm_at_start(a, b, self.scale) for cache, (a, b) in self._caches_and_factors()])

    def row_lengths(self) -> Tensor:
        return super().row_lengths()[self.rows]

    def _operands(self, factors: tuple[Tensor, Tensor], m: Tensor | None, dtype: torch.dtype) -> Operands:
        """With B and the norm of all rows kept until the norm of a part changes."""
        if m is None:
            return super()._operands(factors, m, dtype)
        lengths = self._lengths(detach=True)
        if self._whole is None or any(now is not then for now, then in zip(lengths, self._whole[0], strict=True)):
            self._whole = lengths, self.lora_B, self._among_all(torch.cat(lengths))
        _, b_OR, n_O = self._whole
        return self.cache.operands(self.lora_A, b_OR, self._among_all(m), self.scale, self.bias, dtype, n_O)

    def _trains_by_cache(self, x: Tensor) -> bool:  # noqa: ARG002
        return False

    def _lengths(self, *, detach: bool) -> list[Tensor]:
        return [cache.norm(a, b, self.scale, detach=detach) for cache, (a, b) in self._caches_and_factors()]

    def _caches_and_factors(self) -> list[tuple[LayerCache, tuple[Tensor, Tensor]]]:
        return list(zip(self.part_caches, self.factors_by_part, strict=True))

    def _among_all(self, t: Tensor) -> Tensor:
        """Values of the adapted rows among ones, (O,)."""
        return t.new_ones(self.out_features).index_copy(0, self.rows, t)


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
