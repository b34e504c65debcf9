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

from .names import Spelling, StoredPart

log = logging.getLogger(__name__)


def find_live_spelling(model: nn.Module) -> Spelling | None:
    """How files may name the tensors of a live model; None where it is no model of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    read = _make_reader(model)
    return Spelling(_rename_alone(read), split=lambda name: read(name)[1] or ())


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
        read = _make_reader(model)
        names = {name: read(name) for name in stored}
    except Exception as error:  # noqa: BLE001  # whatever a model's class raises, its names are not to be had
        log.debug(f"the names of {config.get('model_type')} could not be asked of transformers: {error}")
        return None
    parts = {
        new: StoredPart(name, i, len(targets))
        for name, (_, targets) in names.items()
        if targets
        for i, new in enumerate(targets)
    }
    # what else is put together or turned on the way is no tensor of the model's under another name
    return Spelling(_rename_alone(read), {new: name for name, (new, also) in names.items() if also is None}, parts)


# a tensor's name in the model, and where its numbers change too the tensors that its rows are shared out to, if any
_Reader = Callable[[str], tuple[str, tuple[str, ...] | None]]


def _rename_alone(read: _Reader) -> Callable[[str], str]:
    """The renaming alone: a tensor whose numbers would change too keeps its name, and is not found under another."""

    def rename(name: str) -> str:
        new, also = read(name)
        return new if also is None else name

    return rename


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


def _make_reader(model: nn.Module) -> _Reader:
    """The function that says what becomes of a stored tensor, as transformers loads the model."""
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
    by_pattern = {pattern: converter for converter in reversed(converters) for pattern in converter.source_patterns}
    names = each.state_dict()

    def read(name: str) -> tuple[str, tuple[str, ...] | None]:
        new, pattern = rename_source_key(name, renamings, converters, each.base_model_prefix, names)
        if pattern is None:
            return new, None
        converter = by_pattern[pattern]
        if not _is_shared_out(converter):
            return new, ()
        first, *_ = converter.target_patterns
        return new, tuple(new.replace(first, target, 1) for target in converter.target_patterns)

    return read


def _is_shared_out(converter: Any) -> bool:
    """Whether it gives each of its targets an equal share of one tensor's rows, in their order."""
    if len(converter.operations) != 1 or len(converter.source_patterns) != 1:
        return False
    (operation,) = converter.operations
    own = type(operation).__name__ == "Chunk" and operation.dim == 0
    return own and getattr(operation, "num_shards_attribute", None) is None
