"""An adapter as named tensors and a few numbers: the currency of files, merging and models."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .errors import DoraError


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
    """linear, convolution, transposed_convolution or embedding; "": linear or convolution, as A's shape says."""

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
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I · taps) and B (O, R) as matrices, views: s B A is the change of the weight's rows."""
        return self.a_RI.flatten(1), self.b_OR.flatten(1)


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: layers by module name, and whole tensors trained beside them."""

    layers: Mapping[str, LayerAdapter]
    """By the module's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained tensors of modules_to_save and biases, by their name in the base model's state dict."""
    base_model: str | None = None
    """Hub name or path of the model it was trained on, if known."""
