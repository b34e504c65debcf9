"""A model for use, with what lies beside it: a base, an adapter on its base, or a run."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..adapters.load import load_adapter
from ..adapters.multiple import set_adapter
from ..data.encoding import count_embeddings, find_largest_id
from ..data.prompt_form import read_form
from ..data.series_form import SeriesForm, read_series_form
from ..data.turns import set_end_tokens
from ..errors import Note, UsageError
from ..files import read_json, read_yaml
from ..formats.base import SETTINGS_FILE, Hints
from ..formats.files import find_base_name, is_adapter
from ..hub import add_revision, fetch_folder, find_hub_adapter
from ..recipe import ModelSettings
from .adapter import find_other_base, locate_base, telling_places
from .explain import explaining_load, first_line
from .heads import find_head
from .kind import PROCESSOR_FILES, Kind, find_kind, read_kind
from .models import (
    Loaded,
    load_base,
    load_classifier,
    load_config,
    load_forecaster,
    load_hearing,
    load_image_text,
    load_language_model,
    load_processor,
    load_seq2seq,
    load_sound_classifier,
    load_speech,
    load_tokenizer,
    load_vl_bart,
    load_with_head,
    pad_with_end,
)
from .tokenizer import explain_misfit, find_own_tokenizer
from .visual_file import read_visual

log = logging.getLogger(__name__)


def load_model(
    path: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    given: Hints | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a model for use, in evaluation mode, and its tokenizer.

    The base of an adapter is loaded as it is stored; the base that a run names is quantized as it was in training. The
    tokenizer and chat template in an adapter's folder come before the base's, if they fit the model.

    Args:
        path: a run, an adapter of any format (a file or a folder), a model's folder, a .gguf file, or a hub name of an
            adapter or a model.
        base: the model that an adapter goes on, where it is not the one that the adapter names.
        dtype: of the base's weights: float32, bfloat16 or float16; auto: as stored. An adapter's own are float32.
        given: alpha and component, which an adapter's file may not say; and whether NaN is taken.
        revision: a branch, tag or commit, where ``path`` is a hub name.

    Raises:
        UsageError: if there is nothing of that name, an adapter names no base and none is given, or base or alpha is
            given for a model.
        DoraError: if a file is damaged, or the adapter does not fit the base.
    """
    path = add_revision(path, revision)
    folder = find_hub_adapter(path) or Path(path)
    if is_adapter(folder):
        model, beside = _load_adapted(path, folder, base, dtype, given)
        return model.eval(), beside
    said = {"--base": base, "--alpha": given and given.alpha, "--component": given and given.component}
    if unread := [option for option, value in said.items() if value is not None]:
        raise UsageError(f"{', '.join(unread)}: {path} is a model and no adapter, so nothing reads it; leave it out")
    if (folder / "model" / "config.json").exists():
        folder = folder / "model"
    allow = given is not None and given.allow_nonfinite
    settings = ModelSettings(path=str(folder) if folder.exists() else path, dtype=dtype, allow_nonfinite=allow)
    kind = find_model_kind(settings)
    model, beside = _load_kind(kind)(settings)
    if kind == "image-text":
        _set_picture_size(model, folder)
    return model.eval(), read_series_form(folder) if kind == "forecast" else beside


def _load_adapted(path: str, folder: Path, base: str | None, dtype: str, given: Hints | None) -> Loaded:
    """The base of an adapter with it, and what belongs beside it; arguments as of `load_model`."""
    named = base or find_base_name(folder)
    if not named:
        raise UsageError(f"{path} does not say which model it adapts; name it with --base MODEL")
    quantized: dict[str, Any] = {} if base else _read_quantization(folder)
    where, head, visual = base or locate_base(folder, named), find_head(folder), read_visual(folder)
    allow = given is not None and given.allow_nonfinite
    settings = ModelSettings(path=where, dtype=dtype, allow_nonfinite=allow, **quantized)
    with nullcontext() if base else telling_places(folder, where):
        kind = "vl-bart" if visual is not None else head.kind if head else _find_base_kind(settings, folder)
        if visual is not None:
            model, beside = load_vl_bart(settings.model_copy(update={"visual": visual}))
        elif head is not None:
            model, beside = load_with_head(settings, head)
        else:
            # the adapter may have a tokenizer of its own, and the base none
            model, beside = (load_language_model(settings), None) if kind is None else _load_kind(kind)(settings)
    load_adapter(model, folder, given=given)
    _warn_other_base(path, folder, where, depth=4)
    return model, _take_own(model, beside, folder, kind, settings)


def _load_kind(kind: Kind | None) -> Callable[[ModelSettings], Loaded]:
    """What loads a model of a kind, and what belongs beside it."""
    loaders: dict[Kind | None, Callable[[ModelSettings], Loaded]] = {
        "classify": load_classifier,
        "tokens": load_classifier,
        "seq2seq": load_seq2seq,
        "vl-bart": load_vl_bart,
        "image-text": load_image_text,
        "speech": load_speech,
        "audio-class": load_sound_classifier,
        "forecast": lambda settings: (load_forecaster(settings), SeriesForm()),
    }
    return loaders.get(kind, load_base)


def _take_own(model: PreTrainedModel, beside: Any, folder: Path, kind: Kind | None, settings: ModelSettings) -> Any:
    """What lies beside an adapter, in place of what lies beside its base; the model is fitted to it."""
    if kind == "forecast":
        return read_series_form(folder)
    has_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    if kind == "image-text":
        if has_processor:
            beside = load_processor(str(folder), folder)
        _set_picture_size(model, folder)
        set_end_tokens(model, beside.tokenizer)
        return beside
    if kind in ("speech", "audio-class"):
        beside = load_hearing(model, folder, kind) if has_processor else beside
    else:
        beside = load_own_tokenizer(model, folder, lambda: beside or load_tokenizer(settings))
    if kind in ("seq2seq", "speech"):
        _take_generation(model, folder)
    elif kind is None:
        set_end_tokens(model, beside)
    return beside


def _set_picture_size(model: PreTrainedModel, folder: Path) -> None:
    """Let the model know how large its pictures were in training, and how many frames of a video it saw."""
    form = read_form(folder)
    model.doralib_image_pixels = None if form is None else form.image_pixels
    model.doralib_video_frames = None if form is None else form.video_frames


def _find_base_kind(settings: ModelSettings, adapter: Path) -> Kind | None:
    """The kind of an adapter's base; PEFT's word for it comes first, as a model's files may name no head."""
    file = adapter / SETTINGS_FILE
    if file.is_file() and read_json(file).get("task_type") == "SEQ_2_SEQ_LM":
        return "seq2seq"
    return find_model_kind(settings)


def find_model_kind(settings: ModelSettings) -> Kind | None:
    """The kind of a model by its config.json, on the hub too; None for language models, and .gguf files are such."""
    if (Path(settings.path).expanduser() / "config.json").is_file():
        return read_kind(settings.path)
    return None if settings.path.endswith(".gguf") else find_kind(load_config(settings).to_dict())


def _take_generation(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the settings of generation that lie beside its adapter: with what a target begins."""
    if (folder / "generation_config.json").is_file():
        with explaining_load(str(folder)):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def load_own_tokenizer(
    model: PreTrainedModel, adapter: Path, base: Callable[[], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in an adapter's folder, or the base's with the adapter's template; which is logged.

    It is the base's too where the adapter's cannot be read, or has ids that the model has no embedding for.
    """
    own = find_own_tokenizer(adapter)
    if own is None:
        return base()
    if not own.is_whole:
        log.info(f"with the base's tokenizer and the {own.words()}")
        tokenizer = base()
        tokenizer.chat_template = own.template
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(own.folder), config=model.config)
    except Exception as error:  # noqa: BLE001 - tokenizers raise bare classes of their own
        log.info(f"the base's tokenizer is used: that of {own.folder} cannot be read, {first_line(error)}")
        return base()
    count, largest = count_embeddings(model), find_largest_id(tokenizer)
    if count is not None and largest >= count:
        why = explain_misfit(str(tokenizer.convert_ids_to_tokens(largest)), largest, count)
        log.info(f"the base's tokenizer is used: that of {own.folder} does not fit, {why}")
        return base()
    log.info(f"with the {own.words()}")
    if not tokenizer.chat_template:
        tokenizer.chat_template = base().chat_template
    return pad_with_end(tokenizer)


def _warn_other_base(adapter: str, folder: Path, base: str, depth: int = 3) -> None:
    """Warn if an adapter names another base; only once its names and shapes are known to fit."""
    for note in find_other_base(find_base_name(folder), base):
        warnings.warn(f"{adapter} {note}", Note, stacklevel=depth)


def _read_quantization(run: Path) -> dict[str, Any]:
    """How the base of a run was quantized, by its recipe."""
    if not (run / "config.yaml").is_file():
        return {}
    recipe = read_yaml(run / "config.yaml")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    said = model if isinstance(model, dict) else {}
    return {key: said[key] for key in ("quantization", "double_quantization") if key in said}


def read_named_adapters(named: Sequence[str]) -> dict[str, Path]:
    """The places of adapters by their names, each given as NAME=PATH; those of the hub are fetched.

    Raises:
        UsageError: if one is not given so, or two have one name.
    """
    pairs = [each.partition("=") for each in named]
    if bad := [each for each, (name, _, path) in zip(named, pairs, strict=True) if not (name and path)]:
        raise UsageError(f"--adapter {bad[0]}: give a name and a path, NAME=PATH")
    names = [name for name, _, _ in pairs]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UsageError(f"--adapter: {', '.join(twice)} is given twice; give each adapter a name of its own")
    return {name: fetch_folder(path) for name, _, path in pairs}


def load_named_adapters(model: PreTrainedModel, named: Mapping[str, Path]) -> None:
    """Put adapters on a model, each under its name, and make the first one active."""
    for name, path in named.items():
        load_adapter(model, path, name)
        _warn_other_base(str(path), path, model.name_or_path)
    if named:
        set_adapter(model, next(iter(named)))
