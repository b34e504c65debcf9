"""Frozen layers whose weight is not a plain tensor: quantized storages, and those known by their product alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...errors import DoraError
from ...quantization.base import Storage
from .linear import Dense, version
from .memory import Memory


class Opaque(Dense):
    """Any storage with `in_features` and `out_features`, by its own module call alone.

    Its dense weight is what the call makes of unit vectors, which no rounding touches but that of the call itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._memories: list[Memory] = []

    @property
    def W_OI(self) -> Tensor:
        """Made anew, whole.

        Raises:
            DoraError: if the layer cannot be called where it is.
        """
        O, I = self.shape
        W_OI = torch.empty(O, I, dtype=self.dtype, device=self.device)
        try:
            for columns in F.row_blocks(I, O):
                W_OI[:, columns] = self._columns(columns).T.to(self.dtype)
        except Exception as error:  # whatever a foreign module raises
            raise DoraError(
                f"the dense weight of a {type(self.module).__qualname__} cannot be read, its own call fails: {error}; "
                "merge the saved adapter into the unquantized model instead"
            ) from error
        return W_OI

    @property
    def hides_weight(self) -> bool:
        """Whether the module has no plain weight to read."""
        weight = getattr(self.module, "weight", None)
        return not (type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point())  # type: ignore[union-attr]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def key(self) -> tuple[Any, ...]:
        return self._key_of(self._tensors())

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

    def with_weight(self, W_OI: Tensor) -> nn.Module:  # noqa: ARG002
        raise DoraError(
            f"{type(self.module).__qualname__}: doralib does not know how to put a merged weight back into this "
            "storage; merge into plain layers: doralib.merge(model, dequantise=True), or merge the saved adapter into "
            "the unquantized model"
        )

    @torch.no_grad()
    def _product(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is None:
            return self.module(x)
        if "bias" in self.module._parameters or "bias" in self.module._buffers:
            # taken off afterwards it would leave its rounding behind
            y: Tensor = torch.func.functional_call(self.module, {"bias": torch.zeros_like(bias)}, (x,))
            return y
        y = self.module(x)
        return y - bias.to(y.dtype)

    def _columns(self, block: slice) -> Tensor:
        """Columns of W as rows, (K, O): what the layer makes of unit vectors."""
        return self._product(torch.eye(self.shape[1], dtype=self.dtype, device=self.device)[block])

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    def _key_of(self, tensors: Iterable[Tensor]) -> tuple[Any, ...]:
        here = [t for t in tensors if not t.is_meta]
        self._memories += [Memory() for _ in here[len(self._memories) :]]
        return tuple((memory.number(t), version(t), t.device) for memory, t in zip(self._memories, here, strict=False))

    @property
    def dtype(self) -> torch.dtype:
        named = getattr(self.module, "compute_dtype", None)
        if isinstance(named, torch.dtype):
            return named
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self._tensors()), torch.device("cpu"))


class Quantized(Opaque):
    """A quantized storage that is known: dense by row blocks; the forward pass is the layer's own."""

    row_norm_sq, adapted_row_norm = Dense.row_norm_sq, Dense.adapted_row_norm
    transposed_times = Dense.transposed_times

    def __init__(self, module: nn.Module, storage: Storage) -> None:
        super().__init__(module)
        self.storage = storage
        self._at_hand: Tensor | None = None

    def find_maker(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        return partial(self.storage.dense, dtype) if self.storage.multiplies(dtype) else None

    @contextmanager
    def at_hand(self, W_OI: Tensor) -> Iterator[None]:
        """Inside the block norms are made with the weight that a product has just been made dense for."""
        self._at_hand = W_OI
        try:
            yield
        finally:
            self._at_hand = None

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.times_transposed(self.rows if self._at_hand is None else self._at_hand, a_RI)

    @property
    def rows(self) -> F.Rows:
        return self.storage.rows()

    @property
    def W_OI(self) -> Tensor:
        """Dequantized anew, whole."""
        return self.rows[:]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def key(self) -> tuple[Any, ...]:
        return self._key_of(self.storage.tensors())

    @property
    def hides_weight(self) -> bool:
        return True

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

    def with_weight(self, W_OI: Tensor) -> nn.Module:
        """A layer of the same kind and settings, quantized anew from this weight."""
        return self.storage.quantize_again(W_OI)
