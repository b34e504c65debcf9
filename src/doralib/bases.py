"""What a frozen linear layer can do, one short class per storage, found by dotted type name.

An adapter needs a base's shape, its product with an input and, for merging, its dense weight. A storage that nobody
registered still trains, through its own module call (`Opaque`).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .errors import DoraError
from .kernels import on_gpu


class Dense:
    """`nn.Linear`: the weight is a plain (O, I) tensor."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def W_OI(self) -> Tensor:
        """The weight itself, rows are output features; a view."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(O,)."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        O, I = self.W_OI.shape
        return O, I

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, or of the products of a storage that hides it."""
        return self.W_OI.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.W_OI.device

    def key(self) -> tuple[Any, ...]:
        """Differs once the weight has been changed, replaced or moved; `.data` writes to it are not seen."""
        W = self.W_OI
        return (W.data_ptr() if not W.is_meta else 0, W._version, W.dtype, W.device)

    def triton_weight(self) -> Tensor | None:
        """The weight, where Triton's kernels take it."""
        return self.W_OI if on_gpu(self.W_OI) else None

    def row_norm_sq(self) -> Tensor:
        return F.row_norm_sq(self.W_OI)

    def adapted_row_norm(self, W_sq_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        # with B = 0 both ways must give the same bits as the row norms of W alone, so a fresh layer takes the first
        if F.dense_is_cheaper(*self.shape, a_RI.shape[0]) and b_OR.any():
            return F.dense_row_norm(self.W_OI, a_RI, b_OR, s)
        return F.adapted_row_norm(W_sq_O, self.times_transposed(a_RI), a_RI, b_OR, s, self.dense_rows)

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.times_transposed(self.W_OI, a_RI)

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return F.transposed_times(self.W_OI, c_OR)

    def dense_rows(self, index: Tensor) -> Tensor:
        return self.W_OI.detach()[index]

    def replaced(self, W_OI: Tensor) -> nn.Module:
        """A plain layer of the same kind with this weight, cast once to the old one's dtype."""
        module = copy.copy(self.module)
        module._parameters = dict(self.module._parameters)
        weight = self._stored(W_OI.to(self.W_OI.dtype)).contiguous()
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI


class Transposed(Dense):
    """HF ``Conv1D`` (GPT-2): the weight is stored (I, O)."""

    @property
    def W_OI(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t()

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI.t()


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
        return tuple((t.data_ptr(), t._version, t.device) for t in self._tensors() if not t.is_meta)

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


STORAGES: dict[str, type[Dense]] = {
    "torch.nn.modules.linear.Linear": Dense,
    "transformers.pytorch_utils.Conv1D": Transposed,
}


def open_base(module: nn.Module) -> Dense | None:
    """The storage of a linear layer, or None when the module is not one.

    The nearest registered ancestor wins, unless the class below it computes in its own way: then the layer's weight
    need not be what its product says, and it is `Opaque`.
    """
    for cls in type(module).__mro__:
        storage = STORAGES.get(f"{cls.__module__}.{cls.__qualname__}")
        if storage is not None:
            own_call = type(module).forward is not cls.forward or "forward" in module.__dict__  # type: ignore[attr-defined]
            weight = getattr(module, "weight", None)
            plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
            return storage(module) if plain and not own_call else Opaque(module)
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Opaque(module)
    return None
