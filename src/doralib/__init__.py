"""DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DoraConfig as DoraConfig
    from .dequantised import merge_report as merge_report
    from .errors import DoraError as DoraError
    from .errors import UsageError as UsageError
    from .inject import adapt as adapt
    from .inject import disable as disable
    from .inject import disabled as disabled
    from .inject import enable as enable
    from .inject import load_adapter as load_adapter
    from .inject import merge as merge
    from .inject import remove as remove
    from .inject import save_adapter as save_adapter
    from .state import AdapterState as AdapterState
    from .state import LayerAdapter as LayerAdapter

# where each public name lives: found when it is first used, so that `doralib --help` does not import torch
_HOMES = {
    "AdapterState": "state",
    "DoraConfig": "config",
    "DoraError": "errors",
    "LayerAdapter": "state",
    "UsageError": "errors",
    "adapt": "inject",
    "disable": "inject",
    "disabled": "inject",
    "enable": "inject",
    "load_adapter": "inject",
    "merge": "inject",
    "merge_report": "dequantised",
    "remove": "inject",
    "save_adapter": "inject",
}
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'doralib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
