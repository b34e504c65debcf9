"""What a quantised layer's storage can do."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Rows


class Storage:
    """What is known of one quantised layer."""

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
        """What the weight was quantised from, where the storage remembers it."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device

    def rows(self) -> Rows:
        """The dense weight, (O, I), by blocks of its rows."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that the weight is made of."""
        raise NotImplementedError

    def quantize_again(self, W_OI: Tensor) -> nn.Module:
        """A layer of the same kind and settings with another weight, quantised anew."""
        raise NotImplementedError

    def keep_readable(self) -> None:
        """Stop the layer from changing its own storage."""

    def _copied(self, weight: nn.Parameter) -> Any:
        module = copy.copy(self.module)
        module._parameters = {**self.module._parameters, "weight": weight}
        return module
