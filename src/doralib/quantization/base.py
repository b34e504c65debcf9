"""What a quantized layer's storage can do."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Rows


class Storage:
    """What is known of one quantized layer."""

    name: str
    """For a person: ``"bitsandbytes nf4"``."""
    refuses_backward: str = ""
    """Why no gradient passes through the layer, where none does."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return torch.float32

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """What the weight was quantized from, where the storage remembers it."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device

    def rows(self) -> Rows:
        """The dense weight, (O, I), by blocks of its rows."""
        raise NotImplementedError

    def multiplies(self, dtype: torch.dtype) -> bool:  # noqa: ARG002
        """Whether the layer's product with inputs of this dtype is that of its weight made `dense` in the dtype."""
        return False

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, (O, I), made dense anew as the layer's own product does it."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that the weight is made of."""
        raise NotImplementedError

    def quantize_again(self, W_OI: Tensor) -> nn.Module:
        """A layer of the same kind and settings with another weight, quantized anew."""
        raise NotImplementedError

    def keep_readable(self) -> None:
        """Stop the layer from changing its own storage."""

    def _copy_with(self, weight: nn.Parameter) -> Any:
        module = copy.copy(self.module)
        module._parameters = {**self.module._parameters, "weight": weight}
        return module
