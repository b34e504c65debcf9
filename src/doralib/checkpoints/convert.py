"""Convert an adapter of any known format into any other, or into the nearest plain LoRA."""

import contextlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..config import DoraConfig
from ..disk import check_writable
from ..errors import UsageError, did_you_mean
from ..formats import FORMATS
from ..formats.base import Format, Hints, ParsedAdapter, RawAdapter
from ..formats.files import is_tensors_file, read_any_format, write_raw_adapter
from ..formats.peft import to_peft
from ..formats.pipeline import COMPONENTS, check_component, take_component
from ..formats.tensors import make_config
from .adapter import describe_base
from .gguf import open_base_folder
from .lowrank import Approximation, approximate
from .merge import Ingredient, merge_checkpoint
from .safetensors import Checkpoint, find_variant
from .serving import MERGED, Form, choose_form, find_server, make_uniform

LORA = "lora"
TARGETS = (*(name for name, each in FORMATS.items() if each.write), LORA)
# what the layers themselves say, or what only a fresh adapter needs
_IN_THE_LAYERS = (
    *("method", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "magnitude_modules", "modules_to_save", "bias"),
    "trainable_token_indices",
    *("d_initial", "projection_prng_key"),
)


@dataclass(frozen=True)
class ConversionRequest:
    """What to convert into what."""

    adapter: Path
    """A file, or a folder that holds one."""
    to: str | None
    """A format's name, or ``lora``; None: what ``server`` needs."""
    out: Path
    """A folder, or one .safetensors file for the formats that are one."""
    source: str | None = None
    """The format it is in, where its file could be of several."""
    base: str | None = None
    """The base model, for formats that need its names, its heads or its weights."""
    given: Hints = field(default_factory=Hints)
    """alpha and component, for files that do not say them."""
    rank: int | None = None
    """With ``lora``, ``gguf`` or a server: the rank of the nearest LoRA."""
    texts: tuple[str, ...] = ()
    """With ``lora``: compare the logits on these."""
    overwrite: bool = False
    server: str | None = None
    """The server that it is for, in place of a format."""
    variant: str | None = None
    """Which weights of the base, where its folder holds several."""


@dataclass(frozen=True)
class Conversion:
    """What was read and written."""

    out: Path
    source: str
    """The format it was in."""
    to: str
    """The form that was written: a format, ``lora``, or a merged checkpoint."""
    layers: int
    notes: tuple[str, ...]
    """What had to be assumed, and what the written file does not say."""
    errors: tuple[Approximation, ...] = ()
    """How well the LoRA stands for each layer, with ``lora``."""
    logits: float | None = None
    """Relative error of the logits, where texts were given."""


def convert_adapter(request: ConversionRequest) -> Conversion:
    """Read an adapter and write it in another format.

    Raises:
        UsageError: if the request cannot be right, e.g. a base model is needed.
        DoraError: if the adapter is damaged, or anything of it would be lost.
    """
    _check(request)
    with contextlib.ExitStack() as stack:
        hints, base = request.given, None
        if request.base:
            base = stack.enter_context(open_base_folder(request.base, request.out))
            hints = describe_base(hints, base, request.variant)
        source, adapter = read_any_format(request.adapter, hints, request.source)
        form = _choose_form(request, adapter)
        if base is None and (form.shrink or form.to == MERGED or _find_target(form).needs_weights):
            base = stack.enter_context(open_base_folder(_find_base(request, adapter), request.out))
            hints = describe_base(hints, base, request.variant)
        if form.to == MERGED:
            assert base is not None
            return _merge(request, source.name, base, form)
        return _write(request, source, adapter, form, hints, base)


def _choose_form(request: ConversionRequest, adapter: ParsedAdapter) -> Form:
    """The form that was asked for, or that the server needs.

    Raises:
        UsageError: if that form has no place for the method.
    """
    if request.server:
        return choose_form(find_server(request.server), adapter, request.rank)
    form = Form(request.to or "", (), shrink=request.rank is not None)
    if not form.shrink and adapter.config.method not in _find_target(form).methods:
        raise UsageError(_explain_method(adapter.config.method, form.to))
    return form


def _find_target(form: Form) -> Format:
    return FORMATS["peft" if form.to == LORA else form.to]


def _find_base(request: ConversionRequest, adapter: ParsedAdapter) -> str:
    if not adapter.state.base_model:
        asked = f"--for {request.server}" if request.server else f"--to {request.to}"
        raise UsageError(f"{asked} needs the base model, and the adapter names none: give --base MODEL")
    return adapter.state.base_model


def _merge(request: ConversionRequest, source: str, base: Path, form: Form) -> Conversion:
    if request.out.suffix in (".safetensors", ".gguf"):
        raise UsageError(f"--out {request.out}: a merged model is a folder; name one, or give --rank R")
    one = Ingredient(request.adapter, given=request.given)
    done = merge_checkpoint([one], _choose_weights(base, request), request.out, overwrite=request.overwrite)
    return Conversion(request.out, source, "a merged checkpoint", done.layers, (*form.notes, *done.notes))


def _choose_weights(base: Path, request: ConversionRequest) -> Path:
    return find_variant(base, request.variant) if request.variant and base.is_dir() else base


def _write(
    request: ConversionRequest, source: Format, adapter: ParsedAdapter, form: Form, hints: Hints, base: Path | None
) -> Conversion:
    into, asked = _find_target(form), request.given.component
    assert into.write is not None
    if asked and not into.pipelines:
        check_component(adapter, asked)
    if asked or (source.pipelines and (form.shrink or not into.pipelines)):
        adapter = take_component(adapter, hints.component)
    written, errors, logits = adapter, list[Approximation](), None
    if form.shrink:
        assert base is not None
        written, errors = _approximate(adapter, Checkpoint.open(_choose_weights(base, request)), request)
    if form.one_scale:
        written = make_uniform(written)
    raw = into.write(written.config, written.state, hints)
    out = write_raw_adapter(raw, into, request.out, overwrite=request.overwrite)
    if base and request.texts:
        from .verify import compute_logit_error  # noqa: PLC0415  all else needs no transformers

        want, got = (_read_logits(each, base, request.texts) for each in (adapter, written))
        logits = compute_logit_error(got, want)
    notes = (*form.notes, *adapter.notes, *_describe_losses(written, into), *([into.note] if into.note else []))
    return Conversion(out, source.name, form.to, len(adapter.state.layers), notes, tuple(errors), logits)


def _explain_method(method: str, to: str) -> str:
    """Why a format cannot hold a method's adapter, and what can be done."""
    if to == "gguf":
        return f"llama.cpp runs LoRA alone, this adapter is {method}: give --rank R for the nearest LoRA, or merge it"
    return (
        f"{method} shares its random matrices between layers, and {to} has no place for that: merge it, or take the "
        "nearest LoRA (--to lora)"
    )


def _check(request: ConversionRequest) -> None:
    """Raise UsageError for a request that cannot be right, whatever the adapter is."""
    check_writable(request.out, "--out", folder=not is_tensors_file(request.out) and request.out.suffix != ".gguf")
    if (request.to is None) == (request.server is None):
        raise UsageError("give either --to FORMAT or --for SERVER")
    if request.server:
        find_server(request.server)
    elif request.to not in TARGETS:
        readable = f"{request.to} is read, not written; " if request.to in FORMATS else ""
        hint = did_you_mean(str(request.to), TARGETS)
        raise UsageError(f"--to {request.to}: {readable}known: {', '.join(TARGETS)}{hint}")
    if request.to == LORA and request.rank is None:
        raise UsageError("--to lora needs --rank R: the change of a DoRA layer has no rank of its own")
    if request.to not in (LORA, "gguf", None) and (request.rank is not None or request.texts):
        raise UsageError(f"--rank and texts belong to --to lora; {request.to} keeps the adapter as it is")
    if request.texts and request.rank is None:
        raise UsageError("--texts shows what the nearest LoRA loses: give --rank R too")
    if request.rank is not None and request.rank < 1:
        raise UsageError(f"--rank {request.rank} is no rank; give 1 or more")
    if request.given.component is not None and request.given.component not in COMPONENTS:
        raise UsageError(f"--component {request.given.component}: known: {', '.join(COMPONENTS)}")


def _describe_losses(adapter: ParsedAdapter, into: Format) -> list[str]:
    """What the adapter says and the file it is written to does not, or says elsewhere."""
    config, defaults = adapter.config, DoraConfig()
    told = {*_IN_THE_LAYERS, "dropout_mode", *into.keeps}
    lost = [f"{name} {value}" for name, value in config if name not in told and value != getattr(defaults, name)]
    if config.lora_dropout and "lora_dropout" in into.keeps and config.dropout_mode != into.dropout_mode:
        lost.append(f"dropout_mode {config.dropout_mode}")
    alone = sum(layer.magnitude_alone for layer in adapter.state.layers.values())
    notes = []
    if lost:
        where = (
            "kept in doralib_config.json, which PEFT itself does not read"
            if into.own_settings
            else f"{into.title} files have no place for it, and training that goes on does without"
        )
        notes.append(f"{', '.join(lost)}: {where}")
    if alone and not into.own_settings:
        notes.append(f"{alone} layers of magnitude alone are written with A and B of zeros")
    if adapter.state.base_model and "base_model" not in into.keeps:
        notes.append(f"{into.title} files do not say which model they adapt: it is {adapter.state.base_model}")
    return notes


def _approximate(
    adapter: ParsedAdapter, checkpoint: Checkpoint, request: ConversionRequest
) -> tuple[ParsedAdapter, list[Approximation]]:
    assert request.rank is not None
    state, errors = approximate(adapter.state, checkpoint, request.rank)
    kept = ("bias", "modules_to_save", "trainable_token_indices", "lora_dropout", "dropout_mode")
    config = make_config(state.layers, **{name: getattr(adapter.config, name) for name in kept})
    return ParsedAdapter(config, replace(state, base_model=request.base or state.base_model)), errors


def _read_logits(adapter: ParsedAdapter, base: Path, texts: tuple[str, ...]) -> Tensor:
    """The logits of the base with this adapter, (positions of all texts, vocabulary)."""
    from .load import load_model  # noqa: PLC0415  as above
    from .verify import compute_logits  # noqa: PLC0415

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_raw_adapter(RawAdapter(*to_peft(adapter.config, adapter.state)), FORMATS["peft"], Path(folder))
        model, tokenizer = load_model(folder, base=str(base), dtype="float32")
    return compute_logits(model, (tokenizer(text, return_tensors="pt") for text in texts))
