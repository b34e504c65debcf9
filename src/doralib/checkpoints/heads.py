"""Heads that classify: what an adapter says of one, and how a model with it is called."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DoraError
from ..files import read_json, write_json
from ..formats.base import SETTINGS_FILE
from ..formats.files import find_adapter_file, read_raw_adapter
from ..state import AdapterState
from .kind import HEADS, HeadKind

LABELS_FILE = "doralib_labels.json"
TASKS: dict[str, HeadKind] = {"SEQ_CLS": "classify", "TOKEN_CLS": "tokens"}
# the last layer of a head, by the modules in which transformers' classes have it
_LAST = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classifier.out.weight")
_MODULES = (
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "pooler",
    "sequence_summary",
    "vocab_transform",
    "projector",
)


@dataclass(frozen=True)
class Head:
    """What has to be known of a head to build its model."""

    kind: HeadKind
    labels: tuple[str, ...]
    pad_token_id: int | None = None
    """What a decoder is padded with, whose head reads the last token before that."""

    def settings(self) -> dict[str, Any]:
        """What config.json says of it."""
        names = {str(i): label for i, label in enumerate(self.labels)}
        return {"id2label": names, "label2id": {label: i for i, label in enumerate(self.labels)}}


def find_head(adapter: Path) -> Head | None:
    """The head that an adapter's settings name, with its labels; None for other adapters.

    Raises:
        UsageError: if there is no adapter.
        DoraError: if its files are damaged.
    """
    file = find_adapter_file(adapter)
    settings, labels = file.parent / SETTINGS_FILE, file.parent / LABELS_FILE
    task = read_json(settings).get("task_type") if settings.is_file() else None
    said = read_json(labels) if labels.is_file() else {}
    # PEFT has no word for labels of sounds
    kind = said.get("kind", TASKS.get(str(task)))
    if kind is None:
        return None
    if not isinstance(kind, str) or kind not in HEADS:
        raise DoraError(f"{labels} is damaged: kind is {kind!r}, and heads are {', '.join(HEADS)}")
    if said:
        names, pad = said.get("labels"), said.get("pad_token_id")
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise DoraError(f"{labels} is damaged: labels is no list of names")
        if not isinstance(pad, int | None):
            raise DoraError(f"{labels} is damaged: pad_token_id is {pad!r} and no number")
        return Head(kind, tuple(names), pad)
    # only their number is in PEFT's file
    shapes = {key: tuple(tensor.shape) for key, tensor in read_raw_adapter(file).tensors.items()}
    last = next((shape for key, shape in shapes.items() if key.endswith(_LAST)), None)
    return None if last is None else Head(kind, name_labels(last[0]))


def name_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives to labels without any."""
    return tuple(f"LABEL_{i}" for i in range(count))


def write_labels(folder: Path, head: Head) -> None:
    """Keep the labels beside an adapter, whose own files have no place for them."""
    said = {"kind": head.kind, "labels": list(head.labels), "pad_token_id": head.pad_token_id}
    write_json(folder / LABELS_FILE, said)


def take_new_head(
    state: AdapterState, stored: Mapping[str, Sequence[int]], found: Mapping[str, str]
) -> dict[str, Tensor]:
    """Whole tensors of a head that the base does not have, or has for another number of labels."""
    if state.task_type not in (*TASKS, None):
        return {}
    return {
        name: value
        for name, value in state.extra.items()
        if is_of_head(name) and (name not in found or tuple(stored[found[name]]) != tuple(value.shape))
    }


def is_of_head(name: str) -> bool:
    """Whether a weight is one of a head that classifies, by its name."""
    return any(part in _MODULES for part in name.split("."))


def change_config(config: Mapping[str, Any], head: Head) -> dict[str, Any]:
    """The config.json of the same model with this head."""
    changed = {**config, **head.settings(), "architectures": [_name_class(config, head.kind)]}
    if changed.get("pad_token_id") is None and head.pad_token_id is not None:
        changed["pad_token_id"] = head.pad_token_id
    changed.pop("num_labels", None)
    return changed


def _name_class(config: Mapping[str, Any], kind: HeadKind) -> str:
    """transformers' class, asked of it where it is installed; its names go by a rule."""
    if importlib.util.find_spec("transformers") is not None:
        from transformers.models.auto import modeling_auto  # noqa: PLC0415  # seconds that heads alone pay

        named = {
            "classify": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "tokens": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            "audio-class": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        }[kind]
        if (name := named.get(config.get("model_type"))) is not None:
            return str(name)
    first = str(next(iter(config.get("architectures") or []), ""))
    return re.sub(r"(For[A-Z]\w+|LMHeadModel|Model|DoubleHeadsModel)$", "", first) + HEADS[kind]
