"""Names as transformers changes them between a checkpoint and a live model; transformers is asked, and only if needed.

Its conversion mapping is by model and version, so no table of ours would stay right. A checkpoint's names need the
model's own, which its class tells on the meta device: no weights, no memory.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .names import Spelling

log = logging.getLogger(__name__)


def find_live_spelling(model: nn.Module) -> Spelling | None:
    """How files may name the tensors of a live model; None where it is no model of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    return Spelling(_keep_changed(_make_rename(model)))


def find_stored_spelling(config: Mapping[str, Any], stored: Iterable[str]) -> Spelling | None:
    """How transformers would name a checkpoint's tensors; None where it is not installed or does not know the model.

    Args:
        config: the model's config.json.
        stored: the names of the checkpoint's tensors.
    """
    if not config.get("model_type") or importlib.util.find_spec("transformers") is None:
        return None
    try:
        model = _make_empty(config)
        rename = _make_rename(model)
        names = {name: rename(name) for name in stored}
    except Exception as error:  # noqa: BLE001  # whatever a model's class raises, its names are not to be had
        log.debug(f"the names of {config.get('model_type')} could not be asked of transformers: {error}")
        return None
    # what is put together, taken apart or turned on the way is no tensor of the model's under another name
    return Spelling(_keep_changed(rename), {new: name for name, (new, changed) in names.items() if not changed})


def _keep_changed(rename: Callable[[str], tuple[str, bool]]) -> Callable[[str], str]:
    """The renaming alone: a tensor whose numbers would change too keeps its name, and is not found under another."""

    def rename_alone(name: str) -> str:
        new, changed = rename(name)
        return name if changed else new

    return rename_alone


def _make_empty(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json, on the meta device."""
    import transformers  # noqa: PLC0415  # seconds that only those pay whose names do not match

    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    made = transformers.AutoConfig.for_model(**settings)
    name = next(iter(config.get("architectures") or []), None)
    with torch.device("meta"):
        if name is not None and hasattr(transformers, name):
            return getattr(transformers, name)(made)
        return transformers.AutoModel.from_config(made)


def _make_rename(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """The function from a stored name to the model's, as transformers loads it, and whether the numbers change too."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    each: Any = model
    changes = get_model_conversion_mapping(each)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    names = each.state_dict()

    def rename(name: str) -> tuple[str, bool]:
        new, converted = rename_source_key(name, renamings, converters, each.base_model_prefix, names)
        return new, converted is not None

    return rename
