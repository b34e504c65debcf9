"""An adapter as named tensors and a few numbers: the currency of files, merging and models."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .errors import DoraError


@dataclass(frozen=True)
class LayerAdapter:
    """The trained part of one linear layer.

    Without ``m_O`` it is LoRA.

    Raises:
        DoraError: if the shapes do not fit each other.
    """

    a_RI: Tensor
    """(R, I), any float dtype."""
    b_OR: Tensor
    """(O, R)."""
    m_O: Tensor | None
    """(O,): the length of each output row."""
    scale: float
    """s of ``s B A``: lora_alpha / r, or / sqrt(r) with rsLoRA."""

    def __post_init__(self) -> None:
        a, b, m = self.a_RI, self.b_OR, self.m_O
        fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and (m is None or m.shape == b.shape[:1])
        if not fits:
            found = f"A {tuple(a.shape)}, B {tuple(b.shape)}" + ("" if m is None else f", m {tuple(m.shape)}")
            raise DoraError(f"an adapter needs A (r, in), B (out, r) and m (out,), found {found}")

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight it belongs to."""
        return self.b_OR.shape[0], self.a_RI.shape[1]


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter: layers by module name, and whole tensors trained beside them."""

    layers: Mapping[str, LayerAdapter]
    """By the module's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained tensors of modules_to_save and biases, by their name in the base model's state dict."""
    base_model: str | None = None
    """Hub name or path of the model it was trained on, if known."""
