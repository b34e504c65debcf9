"""An adapter as named tensors and a few numbers: the currency of files, merging and models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import DoraError
from .functional import difference

# PEFT's key, and a live layer's parameter of that name
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class LayerAdapter:
    """The trained part of one layer, as a change of its rows; without ``m_O`` it is LoRA.

    A row of a convolution is all that makes one output channel; of an embedding, one dimension over the vocabulary.

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    a_RI: Tensor
    """(R, I), or (R, I / groups, taps...) for a convolution; any float dtype."""
    b_OR: Tensor
    """(O, R), or (O, R, 1...) for a convolution."""
    m_O: Tensor | None
    """(O,): the length of each output row."""
    scale: float
    """s of ``s B A``: lora_alpha / r, or / sqrt(r) with rsLoRA."""
    kind: str = ""
    """linear, convolution, transposed_convolution, embedding, token_embedding (rows are tokens) or experts; "":
    linear or convolution, as A's shape says."""

    def __post_init__(self) -> None:
        a, b, m = self.a_RI, self.b_OR, self.m_O
        pointwise = a.dim() == b.dim() >= 2 and set(b.shape[2:]) <= {1}
        if not (pointwise and a.shape[0] == b.shape[1] and (m is None or m.shape == b.shape[:1])):
            found = f"A {tuple(a.shape)}, B {tuple(b.shape)}" + ("" if m is None else f", m {tuple(m.shape)}")
            raise DoraError(f"an adapter needs A (r, in), B (out, r) and m (out,), found {found}")
        if not self.kind:
            object.__setattr__(self, "kind", "convolution" if self.kernel else "linear")

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's taps; () elsewhere."""
        return tuple(self.a_RI.shape[2:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) of the weight it belongs to, or (O, I / groups, taps...)."""
        return self.b_OR.shape[0], *self.a_RI.shape[1:]

    @property
    def magnitude_alone(self) -> bool:
        """Whether only lengths are trained, which in files is A and B of zeros."""
        return self.m_O is not None and not (self.a_RI.any() or self.b_OR.any())

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I · taps) and B (O, R) as matrices, views: s B A is the change of the weight's rows."""
        return self.a_RI.flatten(1), self.b_OR.flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by short names."""
        named = {"A": self.a_RI, "B": self.b_OR, "m": self.m_O}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def narrowed(self, shape: tuple[int, ...]) -> "LayerAdapter":  # noqa: ARG002
        """The adapter for a weight of this shape: itself, where its own tensors say its shape."""
        return self


class MovedAdapter(LayerAdapter):
    """A layer of which A and B started as a part of the weight: the change ``s (B A - B0 A0)``, of rank 2 r.

    ``a_RI`` and ``b_OR`` are the factors of that, made when they are asked for; what is trained is A, B and m.
    """

    scale = 1.0

    def __init__(
        self, A: Tensor, B: Tensor, m_O: Tensor | None, scale: float, kind: str, start: tuple[Tensor, Tensor]
    ) -> None:
        for name, value in {"trained": (A, B), "start": start, "m_O": m_O, "scale": scale, "kind": kind}.items():
            object.__setattr__(self, name, value)

    trained: tuple[Tensor, Tensor]
    start: tuple[Tensor, Tensor]

    @property
    def a_RI(self) -> Tensor:
        """``[A; A - A0]``, made anew."""
        return difference(*self.trained, *self.start)[0]

    @property
    def b_OR(self) -> Tensor:
        """``[B - B0, B0]``, made anew."""
        return difference(*self.trained, *self.start)[1]

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, and where it started."""
        names = ("A", "B", "start A", "start B")
        named: dict[str, Tensor | None] = dict(zip(names, (*self.trained, *self.start), strict=True))
        return {name: tensor for name, tensor in {**named, "m": self.m_O}.items() if tensor is not None}


class BankAdapter(LayerAdapter):
    """A layer of VeRA or DVoRA: ``diag(b) B diag(d) A`` with A and B random and shared by all layers.

    A and B are the whole bank's, views; the layer takes as many of their columns and rows as its weight has, and its
    own ``a_RI`` and ``b_OR`` are products made when they are asked for.
    """

    kind = "linear"
    scale = 1.0
    magnitude_alone = False

    def __init__(self, bank: tuple[Tensor, Tensor], d_R: Tensor, b_O: Tensor, m_O: Tensor | None, num_in: int) -> None:
        values = {"bank": bank, "d_R": d_R, "b_O": b_O, "m_O": m_O, "num_in": num_in}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        a, b = bank
        fits = a.shape[0] == b.shape[1] == len(d_R) and len(b_O) <= len(b) and num_in <= a.shape[1]
        if not fits or (m_O is not None and m_O.shape != b_O.shape):
            raise DoraError(
                f"a layer of a bank A {tuple(a.shape)}, B {tuple(b.shape)} needs d (r,), b (out,) and m (out,), found "
                f"d {tuple(d_R.shape)}, b {tuple(b_O.shape)}" + ("" if m_O is None else f", m {tuple(m_O.shape)}")
            )

    bank: tuple[Tensor, Tensor]
    d_R: Tensor
    b_O: Tensor
    num_in: int

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
    def kernel(self) -> tuple[int, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.b_O), self.num_in

    def tensors(self) -> dict[str, Tensor]:
        named = {"d": self.d_R, "b": self.b_O, "m": self.m_O}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def narrowed(self, shape: tuple[int, ...]) -> LayerAdapter:
        O = len(self.b_O)
        if len(shape) != 2 or O not in shape:
            return self
        num_in = shape[1] if shape[0] == O else shape[0]
        return BankAdapter(self.bank, self.d_R, self.b_O, self.m_O, num_in) if num_in <= self.bank[0].shape[1] else self


class ExpertsAdapter(LayerAdapter):
    """A stack of weights, (E, O, I), of which each is a layer: A (E, R, I), B (E, O, R) and m (E, O)."""

    def __post_init__(self) -> None:
        a, b, m = self.a_RI, self.b_OR, self.m_O
        fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
        if not fits or (m is not None and m.shape != b.shape[:2]):
            found = f"A {tuple(a.shape)}, B {tuple(b.shape)}" + ("" if m is None else f", m {tuple(m.shape)}")
            raise DoraError(f"experts need A (e, r, in), B (e, out, r) and m (e, out), found {found}")
        object.__setattr__(self, "kind", "experts")

    @property
    def rank(self) -> int:
        return self.a_RI.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.b_OR.shape[:2], self.a_RI.shape[2]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a_RI, self.b_OR


class FusedAdapter(LayerAdapter):
    """Some parts of a fused projection, each with A, B and m of its own.

    As a change of the whole weight it is one layer of rank R times the number of parts: A stacked, B with a block for
    each part and zeros elsewhere, and the base's own lengths m = |w| of the rows that are left alone.
    """

    kind = "linear"

    def __init__(
        self, rows: tuple[Tensor, ...], a_PRI: Tensor, b_OR: Tensor, m_O: Tensor | None, scale: float, w_O: Tensor
    ) -> None:
        values = {"rows": rows, "stacked_A": a_PRI, "stacked_B": b_OR, "stacked_m": m_O, "scale": scale, "w_O": w_O}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    rows: tuple[Tensor, ...]
    """The row numbers of each part."""
    stacked_A: Tensor
    """(P R, I)."""
    stacked_B: Tensor
    """(rows of all parts, R)."""
    stacked_m: Tensor | None
    w_O: Tensor
    """Lengths of the frozen rows, (O,)."""

    @property
    def a_RI(self) -> Tensor:
        """A of all parts, (P R, I)."""
        return self.stacked_A

    @property
    def b_OR(self) -> Tensor:
        """B with a block for each part, (O, P R), made anew."""
        return blocks(self.stacked_B, self.rows, len(self.w_O))

    @property
    def m_O(self) -> Tensor | None:
        """Lengths of all rows, made anew."""
        if self.stacked_m is None:
            return None
        return self.w_O.to(self.stacked_m).index_copy(0, torch.cat(self.rows), self.stacked_m)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.w_O), self.stacked_A.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        named = {"A": self.stacked_A, "B": self.stacked_B, "m": self.stacked_m}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def blocks(b_OR: Tensor, rows: Sequence[Tensor], num_rows: int) -> Tensor:
    """B of the parts at their rows, (O, P R): part p's in the columns of A's rows p R to (p + 1) R, zeros elsewhere."""
    diagonal = torch.block_diag(*b_OR.split([len(index) for index in rows]))
    return diagonal.new_zeros(num_rows, diagonal.shape[1]).index_copy(0, torch.cat(tuple(rows)), diagonal)


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: layers by module name, and whole tensors trained beside them."""

    layers: Mapping[str, LayerAdapter]
    """By the module's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained tensors of modules_to_save and biases, by their name in the base model's state dict."""
    base_model: str | None = None
    """Hub name or path of the model it was trained on, if known."""
