"""The place of a module that several adapters change: the frozen original once, each adapter's layer around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .layer import DoraLayer
from .wrapper import AdapterLayer, Place


class RowPlan:
    """Which adapter each row of a batch goes through."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.groups = tuple(dict.fromkeys(self.names))
        """Each adapter once, in the order of its first row."""
        self._indices: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    def indices(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """The rows of each group, and where the groups' rows, one group after the other, came from."""
        if device not in self._indices:
            rows = [torch.tensor([i for i, n in enumerate(self.names) if n == name]) for name in self.groups]
            back = torch.argsort(torch.cat(rows))
            self._indices[device] = [each.to(device) for each in rows], back.to(device)
        return self._indices[device]


class MultiAdapter(Place):
    """A module with several adapters: a call goes to the active one's layer, or to the original where it has none.

    The layers are the very ones that an adapter alone puts here, and share the frozen original; switching changes a
    name. Model code that reads a weight or a setting reads what the active layer would give it.
    """

    def __init__(self, base_layer: nn.Module, place: str, active: str | None, *, enabled: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.place = place
        self.active, self.enabled = active, enabled
        self.rows: RowPlan | None = None

    def add_layer(self, adapter_name: str, layer: AdapterLayer) -> None:
        """Take an adapter's layer; the original stays in the module tree once, as a child of this module."""
        layer._modules.pop("base_layer")
        layer.__dict__["base_layer"] = self.base_layer
        self.adapters[adapter_name] = layer

    def current(self) -> nn.Module:
        """What a call goes to when every row goes the same way."""
        if self.enabled and self.active is not None and self.active in self.adapters:
            return self.adapters[self.active]
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original takes and returns."""
        if self.rows is None or not self.enabled:
            return self.current()(*args, **kwargs)
        return self._by_rows(self.rows, *args, **kwargs)

    def adapter_layer(self, adapter_name: str | None) -> AdapterLayer | None:
        return self.adapters._modules.get(adapter_name or "")  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"active={self.active}, enabled={self.enabled}"

    def _by_rows(self, plan: RowPlan, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One product with the frozen weight for the whole batch; the rest by the rows of each adapter."""
        layers = {name: layer for name in plan.groups if name and (layer := self.adapter_layer(name)) is not None}
        if not layers:
            return self.base_layer(x, *args, **kwargs)
        x = self._one_row_each(plan, x, layers)
        if len(plan.groups) == 1:
            (layer,) = layers.values()
            return layer(x, *args, **kwargs)
        if not all(_shares_the_product(layer) for layer in layers.values()):
            return self._apart(plan, layers, x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        indices, back = plan.indices(x.device)
        parts = [
            layers[name].around(y[index], x[index], *args, **kwargs) if name in layers else y[index]  # type: ignore[operator]
            for name, index in zip(plan.groups, indices, strict=True)
        ]
        return torch.cat(parts)[back]

    def _apart(self, plan: RowPlan, layers: dict[str, AdapterLayer], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A call for each adapter's rows."""
        indices, back = plan.indices(x.device)
        parts = []
        for name, index in zip(plan.groups, indices, strict=True):
            part = None if args or kwargs else layers.get(name or "", self.base_layer)(x[index])
            if not isinstance(part, Tensor):
                raise UsageError(f"{self.place} takes or returns more than one tensor: it cannot go by rows")
            parts.append(part)
        return torch.cat(parts)[back]

    def _one_row_each(self, plan: RowPlan, x: Tensor, layers: dict[str, AdapterLayer]) -> Tensor:
        """The input, once its first dimension is the batch's rows."""
        bases = [layer.base for layer in layers.values() if isinstance(layer, DoraLayer)]
        kind, batched = "", 1
        if bases:
            kind = bases[0].kind
            batched = {"linear": 2, "embedding": 1, "token_embedding": 1}.get(kind, len(bases[0].row_shape))
        # positions are often given once for all rows
        if kind.endswith("embedding") and x.dim() > 1 and len(x) == 1:
            return x.expand(len(plan.names), *x.shape[1:])
        if x.dim() < batched or len(x) != len(plan.names):
            raise UsageError(
                f"{self.place} is called with {tuple(x.shape)}, whose first dimension is not the {len(plan.names)} "
                "rows that adapters were named for; it cannot go by rows"
            )
        return x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapters" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.current(), name)


def _shares_the_product(layer: nn.Module) -> bool:
    """Whether its `around` says what its forward computes: below it, a class has no forward of its own."""
    first = next(c for c in type(layer).__mro__ if "forward" in vars(c) or "around" in vars(c))
    return "around" in vars(first)
