"""What a model takes and gives, by its config.json: words, a label for a text, text for a picture or a sound."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from ..files import read_json

HeadKind = Literal["classify", "tokens", "audio-class"]
Kind = Literal["classify", "tokens", "seq2seq", "vl-bart", "image-text", "speech", "audio-class", "forecast"]
HEADS: dict[HeadKind, str] = {
    "classify": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "audio-class": "ForAudioClassification",
}

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""What makes the inputs of models that see or hear."""

# transformers' own tables of classes; a class that stands in several is of the first kind here
_TABLES: dict[Kind | None, tuple[str, ...]] = {
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC"),
    "audio-class": ("AUDIO_CLASSIFICATION",),
    None: ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "forecast": ("TIME_SERIES_PREDICTION",),
}
_AUTO: dict[Kind | None, str] = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-text": "AutoModelForImageTextToText",
    "speech": "AutoModelForSpeechSeq2Seq",
    "audio-class": "AutoModelForAudioClassification",
}
# prediction by these has no table of its own
_FORECASTERS = ("PatchTSTForPrediction", "PatchTSMixerForPrediction")


def find_kind(config: Mapping[str, Any]) -> Kind | None:
    """The kind of model that a config.json names; None for causal language models and what is not known."""
    names = _read_classes(config)
    classes = _list_classes()
    known: list[Kind | None] = [classes[name] for name in names if name in classes]
    return known[0] if known else find_label_kind(config) or _find_bare_kind(config)


def _find_bare_kind(config: Mapping[str, Any]) -> Kind | None:
    """Of an encoder-decoder whose files name the class without a head, as those of bart-base do."""
    if not config.get("is_encoder_decoder"):
        return None
    from transformers.models.auto import modeling_auto  # noqa: PLC0415  seconds

    kinds: tuple[Kind, ...] = ("speech", "seq2seq")
    types = {kind: getattr(modeling_auto, f"MODEL_FOR_{_TABLES[kind][0]}_MAPPING_NAMES") for kind in kinds}
    return next((kind for kind, table in types.items() if config.get("model_type") in table), None)


def name_auto_class(name: str) -> str:
    """The class of transformers by which everybody loads a model of this class."""
    kind = _list_classes().get(name)
    if kind == "speech" and name.endswith("ForCTC"):
        return "AutoModelForCTC"
    return _AUTO.get(kind, "AutoModelForCausalLM")


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder is a diffusion pipeline, which is several models."""
    return (Path(folder).expanduser() / "model_index.json").is_file()


def find_pipeline_folder(adapter: Path, base: str | None) -> Path | None:
    """The diffusion pipeline on this disk that is given, or that the adapter names."""
    # torch comes with it, and what is said of a recipe early needs none
    from ..formats.files import find_base_name, is_adapter  # noqa: PLC0415

    named = base or (find_base_name(adapter) if is_adapter(adapter) else None)
    if named is None:
        return None
    places = [Path(named).expanduser(), *([] if base else [above / named for above in adapter.resolve().parents])]
    return next((place for place in places if is_pipeline(place)), None)


def read_kind(path: str) -> Kind | None:
    """The kind of a local model, as for `find_kind`; None too where there is no such model."""
    config = _read_config(path)
    return find_kind(config) if config else None


def find_label_kind(config: Mapping[str, Any]) -> HeadKind | None:
    """The kind of head for labels that a config.json names; None for every other model."""
    names = _read_classes(config)
    return next((kind for kind, ending in HEADS.items() if any(name.endswith(ending) for name in names)), None)


def read_label_kind(path: str) -> HeadKind | None:
    """The kind of head of a local model, as for `find_label_kind`; None too where there is no such model."""
    config = _read_config(path)
    return find_label_kind(config) if config else None


def guess_kind(path: str) -> Kind | None:
    """The kind of a local model that is no language model of words, as far as its config.json tells it by itself.

    `read_kind` is sure, and imports transformers, which takes seconds.
    """
    config = _read_config(path) or {}
    if any(name.endswith("ForPrediction") for name in _read_classes(config)):
        return "forecast"
    return find_label_kind(config) or ("image-text" if "vision_config" in config else None)


def _read_classes(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _read_config(path: str) -> Mapping[str, Any] | None:
    file = Path(path).expanduser() / "config.json"
    return cast("Mapping[str, Any]", read_json(file)) if file.is_file() else None


@cache
def _list_classes() -> dict[str, Kind | None]:
    """The kind of each class in transformers' tables."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415  merging needs no transformers

    kinds: dict[str, Kind | None] = {"VLBart": "vl-bart", **dict.fromkeys(_FORECASTERS, "forecast")}
    for kind, tables in _TABLES.items():
        for table in tables:
            for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
                each: Iterable[str] = [names] if isinstance(names, str) else names
                kinds |= {name: kind for name in each if name not in kinds}
    return kinds
