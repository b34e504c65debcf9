"""Models by their kind, from a hub name, a folder or a .gguf file; with weights, or without on the device meta."""

import importlib.util
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from ..data.turns import set_end_tokens
from ..errors import DoraError, UsageError, list_some
from ..files import list_folder, read_json
from ..formats.files import is_adapter
from ..functional import explain_nonfinite, is_finite
from ..hub import check_model_place, split_revision
from ..progress import quiet_transformers
from ..recipe import ModelSettings, VisualSettings
from .explain import explaining_load, first_line
from .heads import Head, is_of_head
from .kind import HeadKind, Kind, find_label_kind, read_label_kind
from .limits import check_sizes
from .quantize import choose_quantization
from .vl_bart import VLBart, extend_vocabulary
from .window import fit_positions, has_window

_on_cpu: ContextVar[bool] = ContextVar("_on_cpu", default=False)

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""A model and its tokenizer; beside models of pictures there is a processor, and of series a `SeriesForm`."""


@contextmanager
def loading_on_cpu() -> Iterator[None]:
    """Let quantized models begin on the CPU inside the block: a GPU that will hold a share cannot hold them whole."""
    token = _on_cpu.set(True)
    try:
        yield
    finally:
        _on_cpu.reset(token)


def load_base(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """Load a causal language model and its tokenizer, which pads with its end token if it has no other.

    The model's own generation ends where the chat template ends an answer, too.

    Args:
        empty: without weights, on the device `meta`; of the files only configuration and tokenizer are read.

    Raises:
        UsageError: if there is nothing of that name, or it is a folder of something else.
        DoraError: if its files are damaged.
    """
    tokenizer = load_tokenizer(settings)
    model = _make_empty(settings, AutoModelForCausalLM) if empty else load_language_model(settings)
    set_end_tokens(model, tokenizer)
    return model, tokenizer


def load_image_text(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """Load a model that takes pictures and text, and its processor, whose tokenizer has the processor's chat template.

    Args:
        empty: as for `load_base`.

    Raises:
        UsageError: as `load_base`, or if there is no processor, or a package is missing that it needs.
        DoraError: if its files are damaged.
    """
    where, options = _locate_with_options(settings)
    processor = load_processor(settings.path, where, **options)
    model = _load_whole(settings, AutoModelForImageTextToText, empty=empty)
    set_end_tokens(model, processor.tokenizer)
    return model, processor


def load_processor(path: str, where: str | Path, **options: Any) -> Any:
    """Load the processor of a model of pictures; its tokenizer gets the processor's chat template.

    Args:
        path: What the user calls it.
        where: Where it is; ``options`` go to transformers.

    Raises:
        UsageError: if there is none, or a package is missing that it needs.
        DoraError: if its files are damaged.
    """
    missing = [name for name in ("PIL", "torchvision", "num2words") if importlib.util.find_spec(name) is None]
    try:
        # pillow and torchvision come with it, which are extras
        from transformers import AutoProcessor  # noqa: PLC0415

        with explaining_load(path):
            processor = AutoProcessor.from_pretrained(where, **options)
    except (DoraError, ImportError) as error:
        # transformers' own words for what is missing are those of Python: no attribute, no such operator
        lacks = ", ".join({"PIL": "pillow"}.get(name, name) for name in missing)
        told = f"; not installed are {lacks}, which it may need: pip install 'doralib[vision]'" if lacks else ""
        if isinstance(error, DoraError) and not lacks:
            raise
        raise UsageError(f"model: the processor of {path} cannot be loaded: {first_line(error)}{told}") from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UsageError(
            f"model: {path} has no processor of pictures (no preprocessor_config.json beside it), only a "
            f"{type(processor).__name__}; to train it on text alone set model.kind: causal"
        )
    pad_with_end(processor.tokenizer)
    if isinstance(template := processor.chat_template, dict):
        template = template.get("default")
    if template:
        processor.tokenizer.chat_template = template
    return processor


def load_language_model(settings: ModelSettings) -> PreTrainedModel:
    """Load a causal language model alone; raises as `load_base`."""
    return _load_whole(settings, AutoModelForCausalLM)


def _load_whole(settings: ModelSettings, auto: Any, *, empty: bool = False, **more: Any) -> PreTrainedModel:
    """The model of a class, with more settings; none of its weights may be missing or left aside."""
    if empty:
        return _make_empty(settings, auto, **more)
    model, info = _load_weights(settings, auto, output_loading_info=True, **more)
    _check_loaded(settings.path, model, lacks=info["missing_keys"], leaves=info["unexpected_keys"])
    return model


def load_seq2seq(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """Load an encoder-decoder for texts and its tokenizer; arguments and errors as of `load_base`."""
    return _load_whole(settings, AutoModelForSeq2SeqLM, empty=empty), load_tokenizer(settings)


def load_speech(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """Load a model that writes what is spoken, and its processor; arguments and errors as of `load_base`."""
    names = load_config(settings).architectures or [""]
    auto = AutoModelForCTC if names[0].endswith("ForCTC") else AutoModelForSpeechSeq2Seq
    where, options = _locate_with_options(settings)
    with explaining_load(settings.path):
        processor = AutoProcessor.from_pretrained(where, **options)
    return _load_whole(settings, auto, empty=empty), processor


def load_hearing(model: PreTrainedModel, folder: Path, kind: Kind) -> Any:
    """Load what makes a sound a model's inputs, as it lies beside an adapter, to whose window the model is cut."""
    with explaining_load(str(folder)):
        found = (AutoFeatureExtractor if kind == "audio-class" else AutoProcessor).from_pretrained(folder)
    extractor = found if kind == "audio-class" else found.feature_extractor
    if has_window(extractor):
        fit_positions(model, extractor)
    return found


def _check_loaded(path: str, model: PreTrainedModel, *, lacks: Collection[str], leaves: Collection[str] = ()) -> None:
    """Refuse a model of which a part would be random, or left aside: transformers only logs it.

    Raises:
        UsageError: naming the class that its files are of.
    """
    if not (lacks or leaves):
        return
    loaded = type(model).__name__
    wrong = [f"has no weights for {list_some(sorted(lacks), 3, ', ')}, which would be random"] if lacks else []
    wrong += [f"has weights that {loaded} has no place for: {list_some(sorted(leaves), 3, ', ')}"] if leaves else []
    file, kind = Path(path).expanduser() / "config.json", read_label_kind(path)
    said = (read_json(file).get("architectures") or [""])[0] if file.is_file() else ""
    fits = f"set model.kind: {kind}" if kind else f"give the whole files of a {loaded}"
    of = f"; its files are of a {said}" if said else ""
    raise UsageError(f"model: {path} {'; it '.join(wrong)}\n  it was loaded as a {loaded}{of}: {fits}")


def _make_empty(settings: ModelSettings, auto: Any, **more: Any) -> PreTrainedModel:
    """The model without weights, on the device `meta`, with its own settings of generation."""
    where, options = _locate_with_options(settings)
    with explaining_load(settings.path):
        config = AutoConfig.from_pretrained(where, **options, **more)
        dtype = getattr(config, "dtype", None) if settings.dtype == "auto" else getattr(torch, settings.dtype)
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=settings.attn_implementation
            )
    if model.can_generate() and not options.get("gguf_file"):
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(where, revision=settings.revision)
    return model


def load_classifier(settings: ModelSettings, head: Head | None = None, *, empty: bool = False) -> Loaded:
    """Load a model with a head that classifies, and its tokenizer.

    Args:
        head: the head that it gets, where it has none for these labels: the new modules start at random, and
            `find_head_modules` names them. None: the one that it has.
        empty: as for `load_base`.

    Raises:
        UsageError: if there is nothing of that name, or no such model of this type.
        DoraError: if its files are damaged.
    """
    tokenizer = load_tokenizer(settings)
    model = _load_head(settings, head, empty=empty)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_sound_classifier(settings: ModelSettings, head: Head | None = None, *, empty: bool = False) -> Loaded:
    """Load a model with a head that gives a sound a label, and its feature extractor; as `load_classifier`."""
    where, options = _locate_with_options(settings)
    with explaining_load(settings.path):
        extractor = AutoFeatureExtractor.from_pretrained(where, **options)
    return _load_head(settings, head, "audio-class", empty=empty), extractor


def _load_head(
    settings: ModelSettings, head: Head | None, kind: HeadKind | None = None, *, empty: bool = False
) -> PreTrainedModel:
    config = load_config(settings)
    kind = kind or (find_label_kind(config.to_dict()) if head is None else head.kind)
    more: dict[str, Any] = {}
    if head is not None and tuple(config.id2label.values()) != head.labels:
        labels = dict(enumerate(head.labels))
        more = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    auto = _WITH_HEADS[kind or "classify"]
    if empty:
        model = _make_empty(settings, auto, **more)
        last = {name for name, _ in model.named_parameters() if is_of_head(name)}
        model.doralib_new = sorted({name.rpartition(".")[0] for name in last})
        return model
    with quiet_transformers():
        model, info = _load_weights(settings, auto, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    wrong = [name for name, *_ in info.get("mismatched_keys") or []]
    _check_loaded(settings.path, model, lacks=_find_missing(model, info["missing_keys"], whole=head is None))
    model.doralib_new = sorted({name.rpartition(".")[0] for name in (*info["missing_keys"], *wrong)})
    return model


_WITH_HEADS: dict[HeadKind, Any] = {
    "classify": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "audio-class": AutoModelForAudioClassification,
}


def _find_missing(model: PreTrainedModel, missing: Collection[str], *, whole: bool) -> list[str]:
    """What may not be missing: nothing of a model with its head; without it, nothing below the head."""
    below = f"{model.base_model_prefix}."
    return [name for name in missing if whole or (name.startswith(below) and not is_of_head(name))]


def load_with_head(settings: ModelSettings, head: Head) -> Loaded:
    """Load a model with this head, of texts or of sounds, and what makes its inputs; raises as `load_classifier`."""
    return (load_sound_classifier if head.kind == "audio-class" else load_classifier)(settings, head)


def load_vl_bart(settings: ModelSettings, *, seed: int = 0, empty: bool = False) -> Loaded:
    """Load a BART with a visual embedding, and its tokenizer with the extra tokens.

    Args:
        seed: What a visual embedding is drawn from that the files do not hold.
        empty: as for `load_base`.

    Raises:
        UsageError: if there is nothing of that name, or it is no BART, or one for other features.
        DoraError: if its files are damaged.
    """
    tokenizer, config = load_tokenizer(settings), load_config(settings)
    if config.model_type != "bart":
        raise UsageError(
            f"model.kind vl-bart: {settings.path} is a {config.model_type}; give a BART, such as facebook/bart-base"
        )
    asked = settings.visual.model_dump()
    config.visual = VisualSettings(**(getattr(config, "visual", None) or asked)).model_dump()
    if "visual" in settings.model_fields_set and config.visual != asked:
        raise UsageError(f"model.visual: {settings.path} was made for {config.visual}, and {asked} is asked for")
    if empty:
        with torch.device("meta"), quiet_transformers():
            model = VLBart._from_config(config)
    else:
        with quiet_transformers():
            model, info = _load_weights(settings, VLBart, config=config, output_loading_info=True)
        fresh = [name for name in info["missing_keys"] if name.startswith("visual_embedding.")]
        _check_loaded(settings.path, model, lacks=set(info["missing_keys"]).difference(fresh))
        if fresh:
            model.visual_embedding.reset(config.init_std, seed)
    extend_vocabulary(model, tokenizer)
    return model, tokenizer


def find_head_modules(model: nn.Module) -> tuple[str, ...]:
    """What of a loaded classifier is trained whole: its last layers, and all else that its files do not have."""
    fresh: list[str] | None = model.__dict__.get("doralib_new")
    if fresh is None:
        return ()
    new = [*fresh, *(name for name in ("score", "classifier") if hasattr(model, name))]
    return tuple(name for name in dict.fromkeys(new) if not any(name.startswith(f"{other}.") for other in new))


def load_forecaster(settings: ModelSettings, *, empty: bool = False) -> PreTrainedModel:
    """Load a model of series over time, which takes one series at a time.

    Raises:
        UsageError: if there is nothing of that name, or it takes several series together.
        DoraError: if its files are damaged.
    """
    # two that stand in none of transformers' tables; nobody else needs their modules
    import transformers  # noqa: PLC0415

    auto = AutoModelForTimeSeriesPrediction
    for name in ("PatchTST", "PatchTSMixer"):
        auto.register(
            getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForPrediction"), exist_ok=True
        )
    return _load_whole(settings, auto, empty=empty, **_take_one_channel(settings.path, load_config(settings)))


def _take_one_channel(path: str, config: PreTrainedConfig) -> dict[str, int]:
    """The settings by which a model of several series side by side takes one: it has the same weights for each.

    Raises:
        UsageError: if it has not.
    """
    if getattr(config, "num_input_channels", 1) == 1:
        return {}
    shared = getattr(config, "share_embedding", True) and getattr(config, "share_projection", True)
    together = getattr(config, "channel_attention", False) or getattr(config, "mode", "") == "mix_channel"
    if together or not shared or getattr(config, "prediction_channel_indices", None):
        raise UsageError(
            f"model: {path} reads {config.num_input_channels} series together, and doralib trains on one series at a "
            "time; take a model of one channel, or one with the same weights for every channel"
        )
    return {"num_input_channels": 1}


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; raises as `load_base`."""
    where, options = _locate_with_options(settings)
    with explaining_load(settings.path):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    return pad_with_end(tokenizer)


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """Load a model's configuration alone; raises as `load_base`."""
    where, options = _locate_with_options(settings)
    with explaining_load(settings.path):
        return AutoConfig.from_pretrained(where, **options)


def pad_with_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads with its end token if it has no other."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(settings: ModelSettings, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    where, options = _locate_with_options(settings)
    if not sys.stderr.isatty():
        disable_progress_bar()  # bars of transformers are for a terminal
    for_model: dict[str, Any] = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    if _on_cpu.get():
        for_model["device_map"] = {"": "cpu"}
    with explaining_load(settings.path):
        if (quantization := choose_quantization(settings, where, options)) is not None:
            for_model["quantization_config"] = quantization
        loaded = auto.from_pretrained(where, **options, **for_model, **more)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.doralib_revision = options["revision"]
    if not settings.allow_nonfinite:
        _check_finite(settings.path, model)
    return loaded


def _check_finite(path: str, model: nn.Module) -> None:
    """Check that the weights are numbers; quantized ones are not looked at.

    Raises:
        DoraError: naming those that are NaN or infinite.
    """
    plain = {name: p for name, p in model.named_parameters() if type(p) is nn.Parameter and not p.is_meta}
    if wrong := [f"{name}: {explain_nonfinite(p)}" for name, p in plain.items() if not is_finite(p)]:
        raise DoraError(
            f"model: {path} is damaged:\n  {list_some(wrong, 5, chr(10) + '  ')}\n"
            "download it again, or take it as it is with --allow-nonfinite (in a recipe: model.allow_nonfinite: true)"
        )


def _locate_with_options(settings: ModelSettings) -> tuple[str, dict[str, Any]]:
    """What to hand to transformers for every part of a model."""
    where, extra = _locate(settings.path)
    return where, {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code} | extra


def _locate(path: str) -> tuple[str, dict[str, str]]:
    """What to hand to transformers for a path or a name."""
    place = Path(path).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise UsageError(f"model: there is no file {path}")
        return str(place.parent), {"gguf_file": place.name}
    if place.is_dir():
        if not (place / "config.json").exists():
            if is_adapter(place):
                raise UsageError(
                    f"model: {path} is an adapter, and no model: give the model that it adapts, or one that it is "
                    "merged into (doralib merge)"
                )
            if (place / "config.yaml").is_file() and (place / "checkpoints").is_dir():
                raise UsageError(
                    f"model: the run {path} has not been trained to its end: doralib train {place / 'config.yaml'} "
                    f"--resume, or give one of {place / 'checkpoints'}"
                )
            raise UsageError(
                f"model: {path} holds no config.json, so it is no model folder; it holds: {list_folder(place)}"
            )
        check_sizes(place)
        return str(place), {}
    check_model_place(path)
    if place.exists():
        raise UsageError(f"model: {path} is neither a model folder nor a .gguf file")
    name, revision = split_revision(path)
    return name, {"revision": revision} if revision else {}
