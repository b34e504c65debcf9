"""What a frozen layer can do, one short class per storage, found by dotted type name.

Every one is a linear map of rows: a convolution's rows are its output channels, an embedding's its dimensions.

An adapter needs a base's shape, its product with an input and, for merging, its dense weight. A storage that nobody
registered still trains, through its own module call (`Opaque`).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import functional as F
from .dense import Dense as Dense
from .dense import version
from .errors import DoraError
from .quantised import storage_of
from .quantised.storage import Storage


class Transposed(Dense):
    """HF ``Conv1D`` (GPT-2): the weight is stored (I, O)."""

    @property
    def W_OI(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t()

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI.t()


class Embedding(Transposed):
    """`nn.Embedding`: a row is one dimension over the whole vocabulary, as in PEFT; the weight is stored (I, O)."""

    kind = "embedding"

    @property
    def factor(self) -> Tensor | None:
        """What the layer multiplies its rows by (Gemma's embed_scale), or None."""
        factor = getattr(self.module, "embed_scale", None)
        return factor if factor is None or isinstance(factor, Tensor) else torch.tensor(float(factor))

    @property
    def bias(self) -> Tensor | None:
        return None

    def triton_weight(self) -> Tensor | None:
        return None

    # by blocks of tokens: a block of dimensions would read the whole table
    def row_norm_sq(self) -> Tensor:
        sums_O = torch.zeros(self.shape[0], dtype=F.sum_dtype(self.dtype), device=self.device)
        for tokens in F.row_blocks(*self._weight.shape):
            sums_O += self._weight.detach()[tokens].to(sums_O.dtype).square().sum(0)
        return sums_O

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.transposed_times(self._weight.detach(), a_RI.detach().T).T

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return F.times_transposed(self._weight.detach(), c_OR.detach().T).T


class TokenEmbedding(Embedding):
    """`nn.Embedding` with tokens as rows, as MLX has it: the weight as it is stored, (V, dimensions)."""

    kind = "token_embedding"

    @property
    def W_OI(self) -> Tensor:
        return self._weight

    def row_norm_sq(self) -> Tensor:
        return F.row_norm_sq(self.W_OI)

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.times_transposed(self.W_OI, a_RI)

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return F.transposed_times(self.W_OI, c_OR)

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI


class Opaque(Dense):
    """Any storage with `in_features` and `out_features`, by its own module call alone."""

    @property
    def W_OI(self) -> Tensor:
        raise DoraError(
            f"{type(self.module).__qualname__} is a storage that doralib does not know: its dense weight cannot be "
            "read. It trains as it is; merge the saved adapter into the unquantised model instead"
        )

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def key(self) -> tuple[Any, ...]:
        return tuple((t.data_ptr(), version(t), t.device) for t in self._tensors() if not t.is_meta)

    def triton_weight(self) -> Tensor | None:
        return None

    def row_norm_sq(self) -> Tensor:
        O, I = self.shape
        sums_O = torch.zeros(O, dtype=F.sum_dtype(self.dtype), device=self.device)
        for columns in F.row_blocks(I, O):
            sums_O += self._columns(columns).to(sums_O.dtype).square().sum(0)
        return sums_O

    def adapted_row_norm(self, W_sq_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        return F.adapted_row_norm(W_sq_O, self.times_transposed(a_RI), a_RI, b_OR, s, self.dense_rows)

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return self._product(a_RI.to(self.dtype)).T.to(F.sum_dtype(self.dtype))

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        with torch.enable_grad():
            x_RI = torch.zeros(c_OR.shape[1], self.shape[1], dtype=self.dtype, device=self.device)
            x_RI.requires_grad_()
            y_RO = self.module(x_RI)
        (out_RI,) = torch.autograd.grad(y_RO, x_RI, c_OR.T.to(y_RO.dtype))
        return out_RI.to(c_OR.dtype)

    def dense_rows(self, index: Tensor) -> Tensor:
        columns = [self._columns(block)[:, index] for block in F.row_blocks(self.shape[1], self.shape[0])]
        return torch.cat(columns).T

    def replaced(self, W_OI: Tensor) -> nn.Module:  # noqa: ARG002
        raise DoraError(
            f"{type(self.module).__qualname__}: doralib does not know how to put a merged weight back into this "
            "storage; merge the saved adapter into the unquantised model instead"
        )

    @torch.no_grad()
    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    def _columns(self, block: slice) -> Tensor:
        """Columns of W as rows, (K, O): what the layer makes of unit vectors."""
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)[block]
        return self._product(eye)

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    @property
    def dtype(self) -> torch.dtype:
        named = getattr(self.module, "compute_dtype", None)
        if isinstance(named, torch.dtype):
            return named
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self._tensors()), torch.device("cpu"))


class Quantised(Opaque):
    """A quantised storage that is known: dense by row blocks; the forward pass is the layer's own."""

    row_norm_sq, adapted_row_norm = Dense.row_norm_sq, Dense.adapted_row_norm
    times_transposed, transposed_times = Dense.times_transposed, Dense.transposed_times

    def __init__(self, module: nn.Module, storage: Storage) -> None:
        super().__init__(module)
        self.storage = storage

    @property
    def rows(self) -> F.Rows:
        return self.storage.rows()

    @property
    def W_OI(self) -> Tensor:
        """Dequantised anew, whole."""
        return self.rows[:]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def key(self) -> tuple[Any, ...]:
        return tuple((t.data_ptr(), version(t), t.device) for t in self.storage.tensors() if not t.is_meta)

    def dense_rows(self, index: Tensor) -> Tensor:
        W, out = self.rows, torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        for rows in F.row_blocks(*self.shape):
            inside = (index >= rows.start) & (index < rows.stop)
            if inside.any():
                out[inside] = W[rows][index[inside] - rows.start]
        return out

    def refuse_backward(self, x: Tensor) -> None:
        if x.requires_grad and (why := self.storage.refuses_backward):
            raise DoraError(why)

    def replaced(self, W_OI: Tensor) -> nn.Module:
        """A layer of the same kind and settings, quantised anew from this weight."""
        return self.storage.requantised(W_OI)


class Convolution(Dense):
    """`nn.Conv1d`, 2d, 3d: a row is all that makes one output channel, (I / groups · taps,)."""

    kind = "convolution"

    @property
    def W_OI(self) -> Tensor:
        return self._weight.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        O, *row = self.row_shape
        return O, math.prod(row)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self._weight.shape)

    def triton_weight(self) -> Tensor | None:
        return super().triton_weight() if self._weight.is_contiguous() else None

    def product(self, x: Tensor, weight_OIK: Tensor, *output_size: Any) -> Tensor:  # noqa: ARG002
        """The layer's own operator with another weight, of any number of output channels, and no bias."""
        # the module's method knows stride, dilation, groups and every padding mode
        return self.module._conv_forward(x, weight_OIK, None)  # type: ignore[operator]

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(self.row_shape)


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose1d`, 2d, 3d: stored (I, O / groups, taps...); rows are output channels all the same."""

    kind = "transposed_convolution"

    @property
    def W_OI(self) -> Tensor:
        # a copy: these layers are small and few
        return F.swapped_channels(self._weight, self._groups).flatten(1)

    @property
    def row_shape(self) -> tuple[int, ...]:
        I, O, *kernel = self._weight.shape
        return O * self._groups, I // self._groups, *kernel

    def triton_weight(self) -> Tensor | None:
        return None

    def product(self, x: Tensor, weight_OIK: Tensor, *output_size: Any) -> Tensor:
        module: Any = self.module
        size, count = output_size[0] if output_size else None, len(self._weight.shape) - 2
        geometry = (module.stride, module.padding, module.kernel_size)
        extra = module._output_padding(x, size, *geometry, count, module.dilation)
        operator = (nnf.conv_transpose1d, nnf.conv_transpose2d, nnf.conv_transpose3d)[count - 1]
        stored = F.swapped_channels(weight_OIK, self._groups)
        return operator(x, stored, None, module.stride, module.padding, extra, self._groups, module.dilation)

    @property
    def _groups(self) -> int:
        return self.module.groups  # type: ignore[return-value]

    def _stored(self, W_OI: Tensor) -> Tensor:
        return F.swapped_channels(W_OI.reshape(self.row_shape), self._groups)


STORAGES: dict[str, type[Dense]] = {
    "torch.nn.modules.linear.Linear": Dense,
    "transformers.pytorch_utils.Conv1D": Transposed,
    "torch.nn.modules.sparse.Embedding": Embedding,
    **{f"torch.nn.modules.conv.Conv{n}d": Convolution for n in (1, 2, 3)},
    **{f"torch.nn.modules.conv.ConvTranspose{n}d": TransposedConvolution for n in (1, 2, 3)},
}


def open_base(module: nn.Module) -> Dense | None:
    """The storage of a layer that can be adapted, or None when the module is not one.

    The nearest registered ancestor wins, unless the class below it computes in its own way: then the layer's weight
    need not be what its product says, and it is `Opaque`, or None where the layer is not linear.
    """
    quantised = storage_of(module)
    if quantised is not None:
        return Quantised(module, quantised)
    for cls in type(module).__mro__:
        storage = STORAGES.get(f"{cls.__module__}.{cls.__qualname__}")
        if storage is not None:
            own_call = any(
                getattr(type(module), call, None) is not getattr(cls, call, None) or call in module.__dict__
                for call in ("forward", "_conv_forward")
            )
            weight = getattr(module, "weight", None)
            plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
            if plain and (not own_call or (storage is Embedding and _only_scales(module))):
                return storage(module)
            return Opaque(module) if storage.kind == "linear" else None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Opaque(module)
    return None


def _only_scales(module: nn.Module) -> bool:
    """Whether an embedding with a call of its own is one of transformers' scaled ones, by what it does to a few."""
    factor, weight = Embedding(module).factor, module.weight.detach()  # type: ignore[operator]
    if factor is None or factor.numel() != 1:
        return False
    if weight.is_meta:
        return True
    tokens = torch.arange(min(8, len(weight)), device=weight.device)
    with torch.no_grad():
        return torch.allclose(module(tokens).float(), weight[: len(tokens)].float() * factor.float(), rtol=0.02)
