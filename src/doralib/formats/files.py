"""Adapters of any format on disk: which file of a folder it is, what is in it, and how it is written."""

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .. import disk, files
from ..config import DoraConfig
from ..errors import DoraError, UsageError
from ..hub import add_revision, is_hub_name
from . import detect_format, explain_mismatch, find_format
from .base import SETTINGS_FILE, Format, Hints, ParsedAdapter, RawAdapter
from .leftovers import remove_leftovers
from .tensors import check_alpha, check_tensors, widen_bytes

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
_OWN_SETTINGS = "doralib_config.json"
_LONGEST_NAME = 255
"""Bytes of a part of a path that file systems take."""
# of an adapter's settings, those that are looked up or are paths
_TEXTS = ("peft_type", "base_model_name_or_path", "model", "task_type", "fine_tune_type")
# what PEFT's settings say too: where the two differ, the adapter was written again by another tool
_SAID_TWICE = ("method", "r", "lora_alpha", "use_rslora", "alpha_pattern")


def read_any_format(path: str | Path, hints: Hints, named: str | None = None) -> tuple[Format, ParsedAdapter]:
    """Read the adapter in a file or folder, in whichever format it is; also the format.

    Args:
        named: the format's name, where the file could be of several.

    Raises:
        UsageError: if there is no adapter, or what it leaves open has to be given.
        DoraError: if it is damaged, of no known format, or holds anything that would have to be dropped.
    """
    if hints.alpha is not None and not 0 < hints.alpha < math.inf:
        raise UsageError(f"--alpha {hints.alpha:g}: lora_alpha is a number above 0")
    file = find_adapter_file(Path(path))
    raw = remove_leftovers(read_raw_adapter(file))
    check_tensors(str(file), raw.tensors, allow_nonfinite=hints.allow_nonfinite)
    raw = replace(raw, tensors=widen_bytes(raw.tensors))
    form = find_format(named) if named else detect_format(raw)
    try:
        adapter = form.read(raw, hints)
    except DoraError as error:
        # the details of a format that the file is not in would lead astray
        if likely := explain_mismatch(form, raw):
            raise UsageError(f"{file}: {likely}\n  read as {form.name}: {str(error).splitlines()[0]}") from None
        raise
    adapter = replace(adapter, notes=(*raw.notes, *adapter.notes))
    if form.own_settings and raw.own:
        adapter = _add_own_settings(adapter, raw.own, file.parent)
    return form, adapter if hints.alpha is None else check_alpha(adapter, hints.alpha)


def is_tensors_file(path: Path) -> bool:
    """Whether a path's ending means a file of tensors and not a folder."""
    return path.suffix in (".safetensors", *_PICKLED)


def is_adapter(path: Path) -> bool:
    """Whether a path means an adapter and not a model: a file of tensors, or a folder with an adapter's files."""
    if path.is_file():
        return is_tensors_file(path)
    if (path / SETTINGS_FILE).is_file():
        return True
    whole = (path / "config.json").is_file() or (path / "model_index.json").is_file()
    return not whole and (any((path / name).is_file() for name in _NAMES) or bool(_list_unnamed(path)))


def find_base_name(path: Path) -> str | None:
    """The base model that the settings beside an adapter name, one of the hub with its revision; no tensor is read.

    Raises:
        UsageError: if there is no adapter.
    """
    file = find_adapter_file(path)
    # beside a file of another name they may be another adapter's
    settings = _read_beside(file, SETTINGS_FILE) if file.name in _NAMES else {}
    named = settings.get("base_model_name_or_path") or settings.get("model")  # the latter is MLX's
    revision = settings.get("revision") if named and is_hub_name(str(named)) and "@" not in str(named) else None
    return add_revision(str(named), revision) if named else None


def find_adapter_file(path: Path) -> Path:
    """The file of tensors that a path means: itself, or the adapter in a folder.

    Raises:
        UsageError: if there is none, or several that could be.
    """
    if not path.is_dir():
        return files.find_file(path)
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    lone = _list_unnamed(path)
    if len(lone) == 1:
        return lone[0]
    if lone:
        raise UsageError(f"{path} holds several: {', '.join(file.name for file in lone)}; name one of them")
    if (path / "model" / "config.json").is_file():
        raise UsageError(f"{path} is a full fine-tune, which has no adapter; its whole model is {path / 'model'}")
    # PEFT saves every adapter but the default one in a folder of its name
    inside = [each.parent for each in sorted(path.glob(f"*/{SETTINGS_FILE}"))]
    hint = f"; {' and '.join(map(str, inside[:5]))} does" if inside else ""
    raise UsageError(f"{path} holds no adapter: {files.list_folder(path)}{hint}")


def _list_unnamed(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("model")]


def read_raw_adapter(path: Path) -> RawAdapter:
    """Read the tensors and metadata of one file, and the settings beside it.

    Raises:
        DoraError: if either is damaged.
    """
    if path.suffix == ".gguf":
        raise UsageError(f"{path} is a .gguf file; adapters in that form are written, not read")
    settings, own = (_read_beside(path, name) for name in (SETTINGS_FILE, _OWN_SETTINGS))
    notes = _note_byte_order_mark(path.parent / SETTINGS_FILE)
    if path.suffix in _PICKLED:
        return RawAdapter(_read_pickled(path), settings, own=own, notes=notes)
    tensors = files.read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return RawAdapter(tensors, settings, metadata, own, notes)


def write_raw_adapter(raw: RawAdapter, into: Format, out: Path, *, overwrite: bool = False) -> Path:
    """Write a format's files into a folder, or to the one file that ``out`` names; returns the file of tensors.

    Raises:
        UsageError: if something stands there and is not to be overwritten, or the format needs a folder.
    """
    lone = is_tensors_file(out) or out.suffix == Path(into.tensors_file).suffix
    if lone and (into.settings_file or out.suffix != Path(into.tensors_file).suffix):
        raise UsageError(f"{into.title} keeps its settings in a file beside the tensors: name a folder, not {out.name}")
    path = out if lone else out / into.tensors_file
    if into.settings_file == SETTINGS_FILE and (path.parent / "config.json").is_file():
        raise UsageError(
            f"{path.parent} is a model's folder, and transformers would load the model that an adapter in it names "
            "instead; choose a folder of its own for the adapter"
        )
    beside = {path.parent / into.settings_file: raw.settings} if into.settings_file else {}
    if raw.own:
        beside[path.parent / _OWN_SETTINGS] = raw.own
    there = [str(file) for file in (path, *beside) if file.exists()]
    if there and not overwrite and not disk.was_cut_short(path):
        raise UsageError(f"{', '.join(there)} exists already; choose another name, or pass --overwrite")
    need = sum(tensor.nbytes for tensor in raw.tensors.values())
    if not beside:
        with disk.replacing(path, need) as part:
            _write_file(part, path.suffix, raw, into)
        return path
    # the tensors come last: where they stand, their settings do
    with disk.replacing_together([*beside, path], need) as (*settings, part):
        for file, value in zip(settings, beside.values(), strict=True):
            files.write_json(file, dict(value))
        _write_file(part, path.suffix, raw, into)
    return path


def _write_file(part: Path, kind: str, raw: RawAdapter, into: Format) -> None:
    if into.save:
        into.save(raw, part)
    elif kind in _PICKLED:
        torch.save({name: tensor.detach().clone() for name, tensor in raw.tensors.items()}, part)
    else:
        files.write_tensors(part, raw.tensors, raw.metadata)


def _read_beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    settings = dict(files.read_json(file)) if file.is_file() else {}
    for key in _TEXTS:
        text = "" if settings.get(key) is None else settings[key]
        if not isinstance(text, str):
            raise DoraError(f"{file}: {key} should be a text, and {text!r:.40} stands there; write it again")
        if any(len(part.encode()) > _LONGEST_NAME for part in re.split(r"[/\\]", text)):
            raise DoraError(f"{file}: {key} should be a name, and {text[:40]!r}... stands there; write it again")
    return settings


def _note_byte_order_mark(file: Path) -> tuple[str, ...]:
    marked = file.is_file() and files.has_byte_order_mark(file)
    return (f"{file.name} begins with a byte order mark, and PEFT does not read it so",) if marked else ()


def _add_own_settings(adapter: ParsedAdapter, own: Mapping[str, Any], folder: Path) -> ParsedAdapter:
    """Add the settings that PEFT's file has no word for, if they are this adapter's."""
    try:
        ours = DoraConfig(**own)
    except UsageError as error:
        raise DoraError(f"{folder / _OWN_SETTINGS}: {error}") from None
    said_twice = _SAID_TWICE[: 2 if ours.has_bank else None]
    if other := [
        field for field in said_twice if _get_setting(ours, field, ours) != _get_setting(adapter.config, field, ours)
    ]:
        note = f"{_OWN_SETTINGS} is of another adapter (it differs in {', '.join(other)}) and is left aside"
        return replace(adapter, notes=(*adapter.notes, note))
    return replace(adapter, config=ours.model_copy(update={"lora_dropout": adapter.config.lora_dropout}))


def _get_setting(config: DoraConfig, field: str, ours: DoraConfig) -> Any:
    """A setting; of fused projections PEFT's file has an alpha of all ranks together, which ours does not say."""
    value = getattr(config, field)
    if field != "alpha_pattern":
        return value
    return {name: alpha for name, alpha in value.items() if ours.fused_parts(name) is None}


def _check_archive(path: Path) -> None:
    """Check the checksums of a torch.save file, which torch itself does not; older files are no archives.

    Raises:
        DoraError: if one is wrong, or the archive is packed, which torch never does.
    """
    bad: str | None = "its list of contents"
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            bad = packed[0] if packed else archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError):
        pass
    if bad:
        raise DoraError(f"{path} is damaged ({bad} is not what torch wrote); copy or download it again")


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a torch.save file, of which nothing may run while it is read."""
    files.find_file(path)
    _check_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged pickle ends in any kind of error
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DoraError(f"{path} is damaged or holds more than tensors, which may be a program: {why}") from None
    whole = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    strange = [key for key, each in value.items() if not isinstance(each, Tensor)] if whole else []
    if not whole or strange:
        found = f"{strange[0]} is {type(value[strange[0]]).__name__}" if strange else type(value).__name__
        raise DoraError(f"{path} is not tensors by name: {found}")
    return dict(value)
