"""DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import peft as peft
    from .combination import add_weighted_adapter as add_weighted_adapter
    from .config import DoraConfig as DoraConfig
    from .dequantised import merge_report as merge_report
    from .errors import DoraError as DoraError
    from .errors import UsageError as UsageError
    from .groups import parameter_groups as parameter_groups
    from .held import unchanged as unchanged
    from .hotswap import hotswap_adapter as hotswap_adapter
    from .inject import adapt as adapt
    from .inject import add_adapter as add_adapter
    from .inject import disable as disable
    from .inject import disabled as disabled
    from .inject import enable as enable
    from .inject import load_adapter as load_adapter
    from .inject import merge as merge
    from .inject import remove as remove
    from .inject import save_adapter as save_adapter
    from .merging import Ingredient as Ingredient
    from .merging import merge_checkpoint as merge_checkpoint
    from .models import load_any
    from .several import active_adapter as active_adapter
    from .several import adapter_names as adapter_names
    from .several import adapter_rows as adapter_rows
    from .several import delete_adapter as delete_adapter
    from .several import set_adapter as set_adapter
    from .state import AdapterState as AdapterState
    from .state import LayerAdapter as LayerAdapter
    from .unmerge import merge_adapter as merge_adapter
    from .unmerge import unmerge_adapter as unmerge_adapter

    load_model = load_any

# where each public name lives, as module or module:name there; found when it is first used, so that `doralib --help`
# does not import torch
_HOMES = {
    "AdapterState": "state",
    "DoraConfig": "config",
    "DoraError": "errors",
    "Ingredient": "merging",
    "LayerAdapter": "state",
    "UsageError": "errors",
    "active_adapter": "several",
    "adapt": "inject",
    "adapter_names": "several",
    "adapter_rows": "several",
    "add_adapter": "inject",
    "add_weighted_adapter": "combination",
    "delete_adapter": "several",
    "disable": "inject",
    "disabled": "inject",
    "enable": "inject",
    "hotswap_adapter": "hotswap",
    "load_adapter": "inject",
    "load_model": "models:load_any",
    "merge": "inject",
    "merge_adapter": "unmerge",
    "merge_checkpoint": "merging",
    "merge_report": "dequantised",
    "parameter_groups": "groups",
    "remove": "inject",
    "save_adapter": "inject",
    "set_adapter": "several",
    "unchanged": "held",
    "unmerge_adapter": "unmerge",
}
_MODULES = ("peft",)
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'doralib' has no attribute {name!r}")
    module, _, renamed = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), renamed or name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
