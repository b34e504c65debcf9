"""Adapters of any format on disk: which file of a folder, what is in it, and files written whole or not at all."""

import pickle
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .. import files
from ..errors import DoraError, UsageError
from ..state import AdapterState
from . import detect, format_named
from .components import component_of, within
from .content import Content, Format, Found, Given
from .parts import config_for

# of two files in one folder, the earlier is the adapter: torchtune writes both
_NAMES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "pytorch_lora_weights.bin",
    "model_state_dict.safetensors",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SETTINGS = "adapter_config.json"


def read_any(path: str | Path, given: Given, named: str | None = None) -> tuple[Format, Found]:
    """The adapter in a file or folder, in whichever format it is.

    Args:
        named: its format, where the file could be of several.

    Raises:
        UsageError: if there is no adapter, or what it leaves open has to be given.
        DoraError: if it is damaged, of no known format, or holds anything that would have to be dropped.
    """
    content = read_content(adapter_file(Path(path)))
    found = format_named(named) if named else detect(content)
    return found, found.read(content, given)


def one_part(found: Found, component: str | None = None) -> Found:
    """For what knows one model and no pipelines: the layers of one part, by their names inside it.

    Raises:
        UsageError: if the adapter is of several parts and none is named, or of others.
    """
    parts = {component_of(name) for name in found.state.layers}
    if parts == {None}:
        return found
    names = ", ".join(sorted(part for part in parts if part))
    if component is None and len(parts) > 1:
        raise UsageError(f"the adapter is of several parts of a pipeline ({names}); give --component, one of them")
    part = component or next(iter(parts))
    if part not in parts:
        raise UsageError(f"--component {part}: the adapter is of {names}")
    layers = {within(name, part): layer for name, layer in found.state.layers.items() if component_of(name) == part}
    left = len(found.state.layers) - len(layers)
    notes = (f"{left} layers of other parts were not asked for, and are not taken along",) * bool(left)
    config = config_for(layers, dropout_mode=found.config.dropout_mode)
    return Found(config, AdapterState(layers, {}, found.state.base_model), (*found.notes, *notes))


def adapter_file(path: Path) -> Path:
    """The file of tensors that a path means: itself, or the adapter in a folder.

    Raises:
        UsageError: if there is none, or several that could be.
    """
    if not path.is_dir():
        return files.existing(path)
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    lone = [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("model")]
    if len(lone) == 1:
        return lone[0]
    if lone:
        raise UsageError(f"{path} holds several: {', '.join(file.name for file in lone)}; name one of them")
    raise UsageError(f"{path} holds no adapter: {files.names_in(path)}")


def read_content(path: Path) -> Content:
    """The tensors of one file, the words in it and the settings beside it.

    Raises:
        DoraError: if either is damaged.
    """
    beside = path.parent / _SETTINGS
    settings: dict[str, Any] = dict(files.read_json(beside)) if beside.is_file() else {}
    if path.suffix in _PICKLED:
        return Content(_unpickled(path), settings)
    tensors = files.read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return Content(tensors, settings, metadata)


def write_content(content: Content, into: Format, out: Path, *, overwrite: bool = False) -> Path:
    """Write a format's files into a folder, or to the one file that ``out`` names; returns the file of tensors.

    Raises:
        UsageError: if something stands there and is not to be overwritten, or the format needs a folder.
    """
    lone = out.suffix in (".safetensors", *_PICKLED)
    if lone and (into.settings_file or out.suffix != Path(into.tensors_file).suffix):
        raise UsageError(f"{into.title} keeps its settings in a file beside the tensors: name a folder, not {out.name}")
    path = out if lone else out / into.tensors_file
    written = [path] + ([path.parent / into.settings_file] if into.settings_file else [])
    there = [str(file) for file in written if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{', '.join(there)} exists already; choose another name, or pass --overwrite")
    if path.suffix in _PICKLED:
        with files.replacing(path) as part:
            torch.save({name: tensor.detach().clone() for name, tensor in content.tensors.items()}, part)
    else:
        files.write_tensors(path, content.tensors, content.metadata)
    if into.settings_file:
        files.write_json(path.parent / into.settings_file, dict(content.settings))
    return path


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch.save file, which may run nothing while it is read."""
    files.existing(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DoraError(f"{path} is damaged or holds more than tensors, which may be a program: {why}") from None
    whole = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    strange = [key for key, each in value.items() if not isinstance(each, Tensor)] if whole else []
    if not whole or strange:
        found = f"{strange[0]} is {type(value[strange[0]]).__name__}" if strange else type(value).__name__
        raise DoraError(f"{path} is not tensors by name: {found}")
    return dict(value)
