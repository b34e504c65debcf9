"""DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import peft as peft
    from .adapters.adapt import adapt as adapt
    from .adapters.adapt import add_adapter as add_adapter
    from .adapters.adapt import disable as disable
    from .adapters.adapt import disabled as disabled
    from .adapters.adapt import enable as enable
    from .adapters.adapt import remove as remove
    from .adapters.audit import audit as audit
    from .adapters.audit import probe as probe
    from .adapters.combine import add_weighted_adapter as add_weighted_adapter
    from .adapters.hotswap import hotswap_adapter as hotswap_adapter
    from .adapters.inference import unchanged as unchanged
    from .adapters.load import load_adapter as load_adapter
    from .adapters.merge import merge as merge
    from .adapters.merge import merge_adapter as merge_adapter
    from .adapters.merge import merge_report as merge_report
    from .adapters.merge import unmerge_adapter as unmerge_adapter
    from .adapters.multiple import active_adapter as active_adapter
    from .adapters.multiple import adapter_names as adapter_names
    from .adapters.multiple import adapter_rows as adapter_rows
    from .adapters.multiple import delete_adapter as delete_adapter
    from .adapters.multiple import set_adapter as set_adapter
    from .adapters.param_groups import parameter_groups as parameter_groups
    from .adapters.save import save_adapter as save_adapter
    from .checkpoints.load import load_model as load_model
    from .checkpoints.merge import Ingredient as Ingredient
    from .checkpoints.merge import merge_checkpoint as merge_checkpoint
    from .config import DoraConfig as DoraConfig
    from .errors import DoraError as DoraError
    from .errors import UsageError as UsageError
    from .state import AdapterState as AdapterState
    from .state import LayerAdapter as LayerAdapter

# where each public name lives: found when it is first used, so that `doralib --help` does not import torch
_HOMES = {
    "AdapterState": "state",
    "DoraConfig": "config",
    "DoraError": "errors",
    "Ingredient": "checkpoints.merge",
    "LayerAdapter": "state",
    "UsageError": "errors",
    "active_adapter": "adapters.multiple",
    "adapt": "adapters.adapt",
    "adapter_names": "adapters.multiple",
    "adapter_rows": "adapters.multiple",
    "add_adapter": "adapters.adapt",
    "add_weighted_adapter": "adapters.combine",
    "audit": "adapters.audit",
    "delete_adapter": "adapters.multiple",
    "disable": "adapters.adapt",
    "disabled": "adapters.adapt",
    "enable": "adapters.adapt",
    "hotswap_adapter": "adapters.hotswap",
    "load_adapter": "adapters.load",
    "load_model": "checkpoints.load",
    "merge": "adapters.merge",
    "merge_adapter": "adapters.merge",
    "merge_checkpoint": "checkpoints.merge",
    "merge_report": "adapters.merge",
    "parameter_groups": "adapters.param_groups",
    "probe": "adapters.audit",
    "remove": "adapters.adapt",
    "save_adapter": "adapters.save",
    "set_adapter": "adapters.multiple",
    "unchanged": "adapters.inference",
    "unmerge_adapter": "adapters.merge",
}
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "peft":
        return importlib.import_module(".peft", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'doralib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "peft"]
