"""An adapter as named tensors and a few numbers: the currency of files, merging and models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import DoraError
from .functional import difference

# what is trained, by the fields of values
_SHORT_NAMES = {"a_RI": "A", "b_OR": "B", "m_O": "m", "A": "A", "B": "B", "start_A": "start A", "start_B": "start B"}
_SHORT_NAMES |= {"d_R": "d", "b_O": "b", "parts_b_OR": "B", "parts_m_O": "m"}
# PEFT's key, and a live layer's parameter of that name
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class LowRankValues:
    """A, B and m themselves.

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    a_RI: Tensor
    """(R, I), or (R, I / groups, taps...) for a convolution; any float dtype."""
    b_OR: Tensor
    """(O, R), or (O, R, 1...) for a convolution."""
    m_O: Tensor | None

    def __post_init__(self) -> None:
        a, b, m = self.a_RI, self.b_OR, self.m_O
        pointwise = a.dim() == b.dim() >= 2 and set(b.shape[2:]) <= {1}
        if not (pointwise and a.shape[0] == b.shape[1] and (m is None or m.shape == b.shape[:1])):
            raise DoraError(f"an adapter needs A (r, in), B (out, r) and m (out,), found {_shapes(a, b, m)}")

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b_OR.shape[0], *self.a_RI.shape[1:]


@dataclass(frozen=True)
class MovedValues:
    """A and B that started as a part of the weight: the change ``s (B A - B0 A0)``, of rank 2 R."""

    A: Tensor
    B: Tensor
    m_O: Tensor | None
    start_A: Tensor
    start_B: Tensor

    @property
    def a_RI(self) -> Tensor:
        """``[A; A - A0]``, made anew."""
        return difference(self.A, self.B, self.start_A, self.start_B)[0]

    @property
    def b_OR(self) -> Tensor:
        """``[B - B0, B0]``, made anew."""
        return difference(self.A, self.B, self.start_A, self.start_B)[1]

    @property
    def rank(self) -> int:
        return 2 * self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], *self.A.shape[1:]


@dataclass(frozen=True)
class BankValues:
    """VeRA and DVoRA: ``diag(b) B diag(d) A`` with A and B random and shared by all layers.

    A and B are the whole bank's, views; the layer takes as many of their columns and rows as its weight has.

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    bank: tuple[Tensor, Tensor]
    d_R: Tensor
    b_O: Tensor
    m_O: Tensor | None
    num_in: int

    def __post_init__(self) -> None:
        (a, b), d, m = self.bank, self.d_R, self.m_O
        fits = a.shape[0] == b.shape[1] == len(d) and len(self.b_O) <= len(b) and self.num_in <= a.shape[1]
        if not fits or (m is not None and m.shape != self.b_O.shape):
            raise DoraError(
                f"a layer of a bank A {tuple(a.shape)}, B {tuple(b.shape)} needs d (r,), b (out,) and m (out,), found "
                f"d {tuple(d.shape)}, b {tuple(self.b_O.shape)}" + ("" if m is None else f", m {tuple(m.shape)}")
            )

    @property
    def a_RI(self) -> Tensor:
        """``diag(d) A``, made anew."""
        return self.d_R[:, None] * self.bank[0][:, : self.num_in].to(self.d_R)

    @property
    def b_OR(self) -> Tensor:
        """``diag(b) B``, made anew."""
        return self.b_O[:, None] * self.bank[1][: len(self.b_O)].to(self.b_O)

    @property
    def rank(self) -> int:
        return len(self.d_R)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.b_O), self.num_in


@dataclass(frozen=True)
class FusedValues:
    """A, B and m of some parts of a fused projection.

    As a change of the whole weight they are of rank R times the number of parts: A stacked, B with a block for each
    part and zeros elsewhere, and the base's own lengths m = |w| of the rows that are left alone.
    """

    rows: tuple[Tensor, ...]
    """The row numbers of each part."""
    a_RI: Tensor
    """A of all parts, one below the other, (P R, I)."""
    parts_b_OR: Tensor
    """B of all parts, one below the other, (rows of all parts, R)."""
    parts_m_O: Tensor | None
    """(rows of all parts,)."""
    w_O: Tensor
    """Lengths of the frozen rows, (O,)."""

    @property
    def b_OR(self) -> Tensor:
        """B with a block for each part, (O, P R), made anew."""
        return blocks(self.parts_b_OR, self.rows, len(self.w_O))

    @property
    def m_O(self) -> Tensor | None:
        """Lengths of all rows, made anew."""
        if self.parts_m_O is None:
            return None
        return self.w_O.to(self.parts_m_O).index_copy(0, torch.cat(self.rows), self.parts_m_O)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.w_O), self.a_RI.shape[1]


def blocks(b_OR: Tensor, rows: Sequence[Tensor], num_rows: int) -> Tensor:
    """B of the parts at their rows, (O, P R): part p's in the columns of A's rows p R to (p + 1) R, zeros elsewhere."""
    diagonal = torch.block_diag(*b_OR.split([len(index) for index in rows]))
    return diagonal.new_zeros(num_rows, diagonal.shape[1]).index_copy(0, torch.cat(tuple(rows)), diagonal)


@dataclass(frozen=True)
class ExpertsValues:
    """Of a stack of weights, (E, O, I), of which each is a layer: A (E, R, I), B (E, O, R) and m (E, O).

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    a_RI: Tensor
    b_OR: Tensor
    m_O: Tensor | None

    def __post_init__(self) -> None:
        a, b, m = self.a_RI, self.b_OR, self.m_O
        fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
        if not fits or (m is not None and m.shape != b.shape[:2]):
            raise DoraError(f"experts need A (e, r, in), B (e, out, r) and m (e, out), found {_shapes(a, b, m)}")

    @property
    def rank(self) -> int:
        return self.a_RI.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.b_OR.shape[:2], self.a_RI.shape[2]


Values = LowRankValues | MovedValues | BankValues | FusedValues | ExpertsValues


def map_tensors(values: Values, change: Callable[[Tensor], Tensor]) -> Values:
    """The same values with every tensor changed, one field after the other."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return change(value) if isinstance(value, Tensor) else value

    return replace(values, **{each.name: changed(getattr(values, each.name)) for each in fields(values)})


def _shapes(a: Tensor, b: Tensor, m: Tensor | None) -> str:
    return f"A {tuple(a.shape)}, B {tuple(b.shape)}" + ("" if m is None else f", m {tuple(m.shape)}")


@dataclass(frozen=True, init=False)
class LayerAdapter:
    """The trained part of one layer, as a change of its rows; without ``m_O`` it is LoRA.

    A row of a convolution is all that makes one output channel; of an embedding, one dimension over the vocabulary.
    It is made of A, B and m, or of other values that A, B and m follow from.

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    values: Values
    """What is trained."""
    scale: float
    """s of ``s B A``: lora_alpha / r, or / sqrt(r) with rsLoRA."""
    kind: str
    """linear, convolution, transposed_convolution, embedding, token_embedding (rows are tokens) or experts."""

    def __init__(
        self,
        a_RI: Tensor | None = None,
        b_OR: Tensor | None = None,
        m_O: Tensor | None = None,
        scale: float = 1.0,
        kind: str = "",
        *,
        values: Values | None = None,
    ) -> None:
        if values is None:
            assert a_RI is not None
            assert b_OR is not None
            values = LowRankValues(a_RI, b_OR, m_O)
        elif any(t is not None for t in (a_RI, b_OR, m_O)):
            raise TypeError("A, B and m follow from the values of an adapter: replace those")
        by_shape = "linear" if len(values.shape) == 2 else "convolution"
        kind = kind or ("experts" if isinstance(values, ExpertsValues) else by_shape)
        for name, value in {"values": values, "scale": scale, "kind": kind}.items():
            object.__setattr__(self, name, value)

    @property
    def a_RI(self) -> Tensor:
        """(R, I), or (R, I / groups, taps...) for a convolution; any float dtype."""
        return self.values.a_RI

    @property
    def b_OR(self) -> Tensor:
        """(O, R), or (O, R, 1...) for a convolution."""
        return self.values.b_OR

    @property
    def m_O(self) -> Tensor | None:
        """(O,): the length of each output row."""
        return self.values.m_O

    @property
    def rank(self) -> int:
        """R."""
        return self.values.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) of the weight it belongs to, (O, I / groups, taps...), or (E, O, I) of a stack."""
        return self.values.shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's taps; () elsewhere."""
        return () if self.kind == "experts" else self.shape[2:]

    @property
    def turns_rows(self) -> bool:
        """Whether it changes the direction of any row."""
        return all(bool(factor.any()) for factor in self.factors)

    @property
    def magnitude_alone(self) -> bool:
        """Whether only lengths are trained, which in files is A and B of zeros."""
        if self.m_O is None or isinstance(self.values, BankValues):
            return False
        return not (self.a_RI.any() or self.b_OR.any())

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I · taps) and B (O, R) as matrices, views: s B A is the change of the weight's rows."""
        if self.kind == "experts":
            return self.a_RI, self.b_OR
        return self.a_RI.flatten(1), self.b_OR.flatten(1)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each weight of a stack, or of each adapted part of a fused one; views where they are trained."""
        values = self.values
        if isinstance(values, FusedValues):
            sizes = [len(rows) for rows in values.rows]
            return list(zip(values.a_RI.chunk(len(sizes)), values.parts_b_OR.split(sizes), strict=True))
        if isinstance(values, ExpertsValues):
            return list(zip(values.a_RI, values.b_OR, strict=True))
        return [(values.a_RI, values.b_OR)]

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by short names."""
        named = {_SHORT_NAMES.get(each.name, ""): getattr(self.values, each.name) for each in fields(self.values)}
        return {name: tensor for name, tensor in named.items() if name and tensor is not None}

    def narrowed(self, shape: tuple[int, ...]) -> "LayerAdapter":
        """The adapter for a weight of this shape: itself, where its own tensors say its shape."""
        values, O = self.values, self.shape[0]
        if not isinstance(values, BankValues) or len(shape) != 2 or O not in shape:
            return self
        num_in = shape[1] if shape[0] == O else shape[0]
        return replace(self, values=replace(values, num_in=num_in)) if num_in <= values.bank[0].shape[1] else self


@dataclass(frozen=True)
class RowValues:
    """Rows of an embedding or an output head that take the place of its own, as of tokens trained one by one.

    Raises:
        DoraError: if there is not one row for each index.
    """

    index_N: Tensor
    """Which rows, int64."""
    rows_ND: Tensor
    """Their values."""

    def __post_init__(self) -> None:
        if self.rows_ND.dim() != 2 or self.index_N.shape != self.rows_ND.shape[:1]:
            raise DoraError(f"{self.index_N.numel()} trained tokens, and rows of shape {tuple(self.rows_ND.shape)}")


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: layers by module name, and whole tensors trained beside them."""

    layers: Mapping[str, LayerAdapter]
    """By the module's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained tensors of modules_to_save and biases, by their name in the base model's state dict."""
    base_model: str | None = None
    """Hub name or path of the model it was trained on, if known."""
    rows: Mapping[str, RowValues] = field(default_factory=dict)
    """Tokens trained one by one, by the tensor's name in the base model's state dict."""
    resized: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen weights of adapted embeddings and heads, likewise; they count where the base has other sizes."""
    task_type: str | None = None
    """PEFT's word for a language model, CAUSAL_LM, an encoder-decoder, SEQ_2_SEQ_LM, or one whose head classifies,
    SEQ_CLS or TOKEN_CLS."""
