"""DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""

from .config import DoraConfig as DoraConfig
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

__all__ = [
    "AdapterState",
    "DoraConfig",
    "DoraError",
    "LayerAdapter",
    "UsageError",
    "adapt",
    "disable",
    "disabled",
    "enable",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
]
__version__ = "0.1.0"
