"""Convert an adapter of any known format into any other, or into the nearest plain LoRA."""

import contextlib
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError, did_you_mean
from ..files import check_writable
from ..formats import FORMATS
from ..formats.base import Format, Hints, ParsedAdapter, RawAdapter
from ..formats.files import is_tensors_file, read_any_format, write_raw_adapter
from ..formats.peft import to_peft
from ..formats.pipeline import COMPONENTS, check_component, take_component
from ..formats.tensors import make_config
from .adapter import compute_adapted_lengths, describe_base
from .gguf import open_base_folder
from .load import load_model
from .lowrank import Approximation, approximate
from .safetensors import Checkpoint
from .verify import compute_logit_error, compute_logits

LORA = "lora"
TARGETS = (*(name for name, each in FORMATS.items() if each.write), LORA)
# what the layers themselves say, or what only a fresh adapter needs
_IN_THE_LAYERS = (
    *("method", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "magnitude_modules", "modules_to_save", "bias"),
    *("d_initial", "projection_prng_key"),
)


@dataclass(frozen=True)
class ConversionRequest:
    """What to convert into what."""

    adapter: Path
    """A file, or a folder that holds one."""
    to: str
    """A format's name, or ``lora``."""
    out: Path
    """A folder, or one .safetensors file for the formats that are one."""
    source: str | None = None
    """The format it is in, where its file could be of several."""
    base: str | None = None
    """The base model, for formats that need its names, its heads or its weights."""
    given: Hints = field(default_factory=Hints)
    """alpha and component, for files that do not say them."""
    rank: int | None = None
    """With ``lora``: its rank."""
    texts: tuple[str, ...] = ()
    """With ``lora``: compare the logits on these."""
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was read and written."""

    out: Path
    source: str
    """The format it was in."""
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
    is_lora = request.to == LORA
    into = FORMATS["peft" if is_lora else request.to]
    assert into.write is not None
    with contextlib.ExitStack() as stack:
        hints, base = request.given, None
        if request.base:
            base = stack.enter_context(open_base_folder(request.base, request.out))
            hints = describe_base(hints, base)
        source, adapter = read_any_format(request.adapter, hints, request.source)
        if adapter.config.method not in into.methods:
            raise UsageError(
                f"{adapter.config.method} shares its random matrices between layers, and {request.to} has no place for "
                "that: merge it, or take the nearest LoRA (--to lora)"
            )
        asked = request.given.component
        if asked and not into.pipelines:
            check_component(adapter, asked)
        if asked or (source.pipelines and not into.pipelines):
            adapter = take_component(adapter, hints.component)
        written, logits = adapter, None
        errors: list[Approximation] = []
        if is_lora or into.needs_weights:
            named = request.base or adapter.state.base_model
            if not named:
                raise UsageError(
                    f"--to {request.to} needs the base model's weights, and the adapter names none: give --base MODEL"
                )
            base = base or stack.enter_context(open_base_folder(named, request.out))
            checkpoint = Checkpoint.open(base)
            hints = replace(hints, lengths=partial(compute_adapted_lengths, checkpoint))
            if is_lora:
                written, errors = _approximate(adapter, checkpoint, request)
        raw = into.write(written.config, written.state, hints)
        out = write_raw_adapter(raw, into, request.out, overwrite=request.overwrite)
        if base and request.texts:
            want, got = (_read_logits(each, base, request.texts) for each in (adapter, written))
            logits = compute_logit_error(got, want)
    notes = (*adapter.notes, *_describe_losses(written, into), *([into.note] if into.note else []))
    return Conversion(out, source.name, len(adapter.state.layers), notes, tuple(errors), logits)


def _check(request: ConversionRequest) -> None:
    """Raise UsageError for a request that cannot be right, whatever the adapter is."""
    check_writable(request.out, "--out", folder=not is_tensors_file(request.out))
    if request.to not in TARGETS:
        readable = f"{request.to} is read, not written; " if request.to in FORMATS else ""
        hint = did_you_mean(request.to, TARGETS)
        raise UsageError(f"--to {request.to}: {readable}known: {', '.join(TARGETS)}{hint}")
    if request.to == LORA and request.rank is None:
        raise UsageError("--to lora needs --rank R: the change of a DoRA layer has no rank of its own")
    if request.to != LORA and (request.rank is not None or request.texts):
        raise UsageError(f"--rank and texts belong to --to lora; {request.to} keeps the adapter as it is")
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
    kept = ("bias", "modules_to_save", "lora_dropout", "dropout_mode")
    config = make_config(state.layers, **{name: getattr(adapter.config, name) for name in kept})
    return ParsedAdapter(config, replace(state, base_model=request.base or state.base_model)), errors


def _read_logits(adapter: ParsedAdapter, base: Path, texts: tuple[str, ...]) -> Tensor:
    """The logits of the base with this adapter, (positions of all texts, vocabulary)."""
    with tempfile.TemporaryDirectory() as folder:
        write_raw_adapter(RawAdapter(*to_peft(adapter.config, adapter.state)), FORMATS["peft"], Path(folder))
        model, tokenizer = load_model(folder, base=str(base), dtype="float32")
    return compute_logits(model, (tokenizer(text, return_tensors="pt") for text in texts))
