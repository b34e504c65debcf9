"""`doralib convert`: an adapter of any known format as any other, or as the nearest plain LoRA."""

import contextlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError, did_you_mean
from ..files import check_writable
from ..formats import FORMATS, tensorrt
from ..formats.base import Content, Format, Found, Given, config_for
from ..formats.files import is_one_file, one_part, read_any, refuse_component, write_content
from ..formats.peft import to_peft
from ..formats.pipeline import COMPONENTS
from ..state import AdapterState
from .adapter import adapted_lengths, knowing
from .gguf import local_base
from .load import load_model
from .lowrank import Approximation, low_rank
from .safetensors import Checkpoint
from .verify import compute_logits, logit_error

LORA = "lora"
TARGETS = (*(name for name, each in FORMATS.items() if each.write), "tensorrt", LORA)
# what the layers themselves say, or what only a fresh adapter needs
_IN_THE_LAYERS = (
    *("method", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "magnitude_modules", "modules_to_save", "bias"),
    *("d_initial", "projection_prng_key"),
)
_NEED_WEIGHTS = ("tensorrt", LORA)
_OF_PIPELINES = ("kohya", "ai-toolkit", "diffusers")


@dataclass(frozen=True)
class Request:
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
    given: Given = field(default_factory=Given)
    """alpha and component, for files that do not say them."""
    rank: int | None = None
    """Of the LoRA."""
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
    """What had to be assumed."""
    errors: tuple[Approximation, ...] = ()
    """Of each layer, where a LoRA was put in place of DoRA."""
    logits: float | None = None
    """Relative error of the logits, if it was asked for."""


def convert_adapter(request: Request) -> Conversion:
    """Read an adapter and write it in another format.

    Raises:
        UsageError: if the request cannot be right, e.g. a base model is needed.
        DoraError: if the adapter is damaged, or anything of it would be lost.
    """
    _check(request)
    with contextlib.ExitStack() as stack:
        given, base = request.given, None
        if request.base:
            base = stack.enter_context(local_base(request.base, request.out))
            given = knowing(given, base)
        source, found = read_any(request.adapter, given, request.source)
        _refuse_shared(found.config, request.to)
        component = request.given.component
        if component and request.to not in _OF_PIPELINES:
            refuse_component(found, component)
        if component or request.to not in _OF_PIPELINES:
            found = one_part(found, given.component)
        if request.to not in _NEED_WEIGHTS:
            writer = FORMATS[request.to]
            assert writer.write is not None
            written = write_content(
                writer.write(found.config, found.state, given), writer, request.out, overwrite=request.overwrite
            )
            notes = (*found.notes, *_not_kept(found, writer))
            return Conversion(written, source.name, len(found.state.layers), notes)
        if base is None:
            base = stack.enter_context(local_base(_base_of(found, request), request.out))
        done = _with_weights(request, found, base)
        return replace(done, source=source.name, notes=(*found.notes, *done.notes))


def _check(request: Request) -> None:
    check_writable(request.out, "--out", folder=not is_one_file(request.out))
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


def _refuse_shared(config: DoraConfig, to: str) -> None:
    if config.method not in ("dora", "lora") and to not in ("peft", LORA):
        raise UsageError(
            f"{config.method} shares its random matrices between layers, and {to} has no place for that: "
            "merge it, or take the nearest LoRA (--to lora)"
        )


def _not_kept(found: Found, into: Format) -> list[str]:
    """What the adapter says and the file it is written to does not, or says elsewhere."""
    config = found.config
    lost: list[str] = []
    values = {name: getattr(config, name) for name in type(config).model_fields if name not in _IN_THE_LAYERS}
    defaults = DoraConfig()
    for name, value in values.items():
        if name != "dropout_mode" and value != getattr(defaults, name) and name not in into.keeps:
            lost.append(f"{name} {value}")
    if config.lora_dropout and "lora_dropout" in into.keeps and config.dropout_mode != into.dropout_mode:
        lost.append(f"dropout_mode {config.dropout_mode}")
    alone = sum(layer.magnitude_alone for layer in found.state.layers.values())
    notes = []
    if lost:
        where = (
            "kept in doralib_config.json, which PEFT itself does not read"
            if into.name == "peft"
            else f"{into.title} files have no place for it, and training that goes on does without"
        )
        notes.append(f"{', '.join(lost)}: {where}")
    if alone and into.name != "peft":
        notes.append(f"{alone} layers of magnitude alone are written with A and B of zeros")
    if found.state.base_model and "base_model" not in into.keeps:
        notes.append(f"{into.title} files do not say which model they adapt: it is {found.state.base_model}")
    return notes


def _base_of(found: Found, request: Request) -> str:
    if not found.state.base_model:
        raise UsageError(
            f"--to {request.to} needs the base model's weights, and the adapter names none: give --base MODEL"
        )
    return found.state.base_model


def _with_weights(request: Request, found: Found, base: Path) -> Conversion:
    checkpoint = Checkpoint.open(base)
    peft, count = FORMATS["peft"], len(found.state.layers)
    if request.to == "tensorrt":
        content = tensorrt.write(found.config, found.state, adapted_lengths(checkpoint, found.state))
        written = write_content(content, FORMATS["tensorrt"], request.out, overwrite=request.overwrite)
        return Conversion(written, "", count, ("TensorRT-LLM ignores magnitudes without --dora_plugin=enable",))
    assert request.rank is not None
    state, errors = low_rank(found.state, checkpoint, request.rank)
    config = _lora_config(found.config, state)
    assert peft.write is not None
    content = peft.write(config, replace(state, base_model=request.base or state.base_model), request.given)
    written = write_content(content, peft, request.out, overwrite=request.overwrite)
    logits = _logit_error(found, (config, state), base, request.texts) if request.texts else None
    notes = tuple(_not_kept(replace(found, config=config, state=state), peft))
    return Conversion(written, "", count, notes, tuple(errors), logits)


def _lora_config(config: DoraConfig, state: AdapterState) -> DoraConfig:
    kept = ("bias", "modules_to_save", "lora_dropout", "dropout_mode")
    return config_for(state.layers, **{name: getattr(config, name) for name in kept})


def _logit_error(found: Found, other: tuple[DoraConfig, AdapterState], base: Path, texts: tuple[str, ...]) -> float:
    """How far another adapter's logits are from those of the one that was found."""
    return logit_error(_logits(*other, base, texts), _logits(found.config, found.state, base, texts))


def _logits(config: DoraConfig, state: AdapterState, base: Path, texts: tuple[str, ...]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        write_content(Content(*to_peft(config, state)), FORMATS["peft"], Path(folder))
        model, tokenizer = load_model(folder, base=str(base), dtype="float32")
    return compute_logits(model, (tokenizer(text, return_tensors="pt") for text in texts))
