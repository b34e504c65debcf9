"""Diffusion pipelines: several models with a scheduler and tokenizers, loaded by diffusers."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from ..adapters.load import load_adapter
from ..errors import DoraError, UsageError
from ..extras import import_extra
from ..files import read_json, read_yaml
from ..formats.base import Hints
from ..formats.files import find_base_name, is_adapter
from ..formats.pipeline import COMPONENTS
from ..hub import find_hub_file, is_local, split_revision
from ..progress import quiet_transformers
from ..recipe import ModelSettings
from .explain import explaining_load
from .kind import find_pipeline_folder, is_pipeline
from .limits import check_sizes

_T5 = "text_encoder_3"
# what SD 1.5 looks at its own pictures with
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def import_diffusers() -> Any:
    """The package, which takes seconds to import.

    Raises:
        UsageError: if it is not installed.
    """
    return import_extra("diffusers", "a diffusion pipeline")


def read_pipeline_index(path: str) -> Mapping[str, Any]:
    """What a pipeline's model_index.json says: its class, and the class of each part.

    Raises:
        UsageError: if the folder, or what the hub has by the name, is no pipeline.
        DoraError: if the file is damaged, or a part of the pipeline would be larger than any model.
    """
    place = Path(path).expanduser()
    file = place / "model_index.json" if place.exists() or is_local(path) else find_hub_file(path, "model_index.json")
    if file is None or not file.is_file():
        raise UsageError(
            f"model: {path} is no diffusion pipeline, it has no model_index.json; give a folder or hub name"
        )
    check_sizes(place)
    index: dict[str, Any] = read_json(file)
    if not isinstance(index.get("_class_name"), str):
        raise DoraError(f"{file} names no class of diffusers'; download it again")
    return index


def load_pipeline(settings: ModelSettings, network: str | None = None, vae: str | None = None) -> Any:
    """Load a pipeline in evaluation mode on the CPU, frozen.

    Args:
        settings: Where it is and its dtype; auto is float32.
        network: The part that is quantized, where the settings ask for it.
        vae: Another VAE, a folder or hub name.

    Raises:
        UsageError: if there is no pipeline, or no weights in safetensors.
    """
    diffusers, index = import_diffusers(), read_pipeline_index(settings.path)
    where, revision = split_revision(
        str(Path(settings.path).expanduser()) if is_pipeline(settings.path) else settings.path
    )
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    common: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": revision or settings.revision}
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()  # bars are for a terminal
        disable_progress_bar()
    parts = _leave_out(index)
    if index.get("_class_name") == "StableDiffusion3Pipeline" and not any(index.get(_T5) or ()):
        # SD3 draws without its largest encoder, and loads only if told that it is left out
        parts |= {_T5: None, "tokenizer_3": None}
    with explaining_load(settings.path), quiet_transformers():
        if vae is not None:
            parts["vae"] = diffusers.AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)
        if settings.quantization and network is not None:
            parts[network] = _load_quantized(settings, where, network, index[network][1], common)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(where, **common, **parts)
    pipeline.set_progress_bar_config(disable=True)
    for part in list_modules(pipeline).values():
        part.requires_grad_(False).eval()
    return pipeline


def _leave_out(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline is told of parts that training has no use for."""
    # it would turn pictures of training black
    said = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    return said | ({"add_watermarker": False} if index.get("_class_name") == "StableDiffusionXLPipeline" else {})


def _load_quantized(settings: ModelSettings, where: str, part: str, kind: str, common: Mapping[str, Any]) -> nn.Module:
    """One part of a pipeline, quantized by bitsandbytes while it is loaded."""
    diffusers = import_diffusers()
    make = diffusers.BitsAndBytesConfig
    if settings.quantization not in ("nf4", "fp4", "int8"):
        raise UsageError(f"model.quantization: diffusers takes nf4, fp4 and int8 here, not {settings.quantization}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"model.quantization: {settings.quantization!r} needs bitsandbytes: pip install bitsandbytes")
    if settings.quantization == "int8":
        quantized = make(load_in_8bit=True)
    else:
        quantized = make(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=common["dtype"],
        )
    cls: Any = getattr(diffusers, kind)
    try:
        return cls.from_pretrained(where, subfolder=part, quantization_config=quantized, **common)
    except (RuntimeError, ImportError) as error:
        raise UsageError(f"model.quantization: diffusers refuses: {error}") from error


def make_empty_parts(settings: ModelSettings, names: Sequence[str]) -> dict[str, nn.Module]:
    """Parts of a pipeline without weights, on the device `meta`."""
    with explaining_load(settings.path):
        found = _make_parts(settings, names)
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def make_empty_pipeline(settings: ModelSettings) -> Any:
    """A pipeline whose models have no weights, on the device `meta`, with its tokenizers and its scheduler.

    Raises:
        UsageError: if there is no pipeline.
        DoraError: if its files are damaged.
    """
    index = read_pipeline_index(settings.path)
    # a part that is left out is given as None
    parts: dict[str, Any] = {name: None for name, said in index.items() if isinstance(said, list)}
    with explaining_load(settings.path), quiet_transformers():
        cls = getattr(import_diffusers(), index["_class_name"])
        parts |= _make_parts(settings, [name for name in parts if name not in _UNUSED])
        made = cls(**{**parts, **_leave_out(index)})
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    for part in list_modules(made).values():
        # diffusers' own `to` would warn of a cast
        nn.Module.to(part, dtype=dtype)
        part.requires_grad_(False).eval()
    return made


def _make_parts(settings: ModelSettings, names: Sequence[str]) -> dict[str, Any]:
    index = read_pipeline_index(settings.path)
    where, revision = split_revision(settings.path)
    found: dict[str, Any] = {}
    for name in names:
        library, kind = index.get(name) or (None, None)
        if library is None or kind is None:
            continue
        # a tokenizer without files would be an empty one
        if Path(where).is_dir() and not (Path(where) / name).is_dir():
            raise DoraError(f"model: {settings.path} has no folder {name}, which its model_index.json names")
        cls = getattr(importlib.import_module(library), kind)
        options: dict[str, Any] = {"subfolder": name, "revision": revision or settings.revision}
        if not issubclass(cls, nn.Module):
            found[name] = cls.from_pretrained(where, **options)
            continue
        with torch.device("meta"):
            if library == "transformers":
                found[name] = cls(cls.config_class.from_pretrained(where, **options))
            else:
                found[name] = cls.from_config(cls.load_config(where, **options))
    return found


def list_modules(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by the names of its parts."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def add_tokens(pipeline: Any, tokens: Sequence[str], encoders: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Give text encoders and their tokenizers new tokens; the ids by the encoder's name.

    Their rows begin at random, as far from zero as the other rows are.

    Raises:
        UsageError: if a tokenizer has one of them already.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in encoders:
        encoder, tokenizer = getattr(pipeline, name), getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        before = len(tokenizer)
        if old := [token for token in tokens if token in tokenizer.get_vocab()]:
            raise UsageError(f"model.new_tokens: {', '.join(map(repr, old))}: {name} knows it already")
        tokenizer.add_tokens(list(tokens))
        found[name] = tuple(range(before, len(tokenizer)))
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = encoder.get_input_embeddings().weight
        if not weight.is_meta:
            _begin_rows(weight, before)
        encoder.requires_grad_(False)
    return found


@torch.no_grad()
def _begin_rows(weight: Tensor, before: int) -> None:
    drawn = torch.randn(len(weight) - before, weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight[before:] = (drawn * weight[:before].float().std().cpu()).to(weight)


def join_parts(pipeline: Any) -> nn.ModuleDict:
    """The parts that an adapter can have layers in, as one model whose layers are named by part."""
    return nn.ModuleDict({name: part for name, part in list_modules(pipeline).items() if name in COMPONENTS})


def find_pipeline(path: str, base: str | None = None, *, assume: bool = False) -> str | None:
    """The pipeline that a run, an adapter or a folder means; None if it means another kind of model.

    Args:
        base: The model that the adapter goes on, where that is not the one that it names.
        assume: Take a hub name for a pipeline; else it is one where a run's recipe says so.
    """
    place = Path(path).expanduser()
    if is_pipeline(place):
        return path
    if not place.exists():
        return path if assume else None
    if (folder := find_pipeline_folder(place, base)) is not None:
        return str(folder)
    said = _read_model_group(place)
    if is_pipeline(str(said.get("path"))):
        # a run that has no adapter yet
        return str(said["path"])
    named = base or (find_base_name(place) if is_adapter(place) else None)
    return named if assume or said.get("kind") == "text-to-image" else None


def _read_model_group(run: Path) -> Mapping[str, Any]:
    """What a run's recipe says of its model; nothing of what is no run."""
    file = run.expanduser() / "config.yaml"
    said = read_yaml(file) if file.is_file() else None
    model = said.get("model") if isinstance(said, dict) else None
    return model if isinstance(model, dict) else {}


def find_network(index: Mapping[str, Any]) -> str:
    """The part that draws."""
    return "transformer" if index.get("transformer") else "unet"


def find_clip_encoders(pipeline: Any) -> list[str]:
    """The text encoders of CLIP's kind, by the names of their parts."""
    return [name for name, part in list_modules(pipeline).items() if type(part).__name__.startswith("CLIPText")]


def load_empty_parts(path: str) -> nn.ModuleDict:
    """The parts of a pipeline that an adapter can have layers in, without weights, on the device `meta`.

    Raises:
        UsageError: if there is no pipeline.
    """
    return nn.ModuleDict(make_empty_parts(ModelSettings(path=path), COMPONENTS))


def load_adapted_pipeline(path: str, base: str, *, dtype: str = "auto", given: Hints | None = None) -> Any:
    """Load a pipeline for use, with the adapter on it unless the path is the pipeline itself.

    Args:
        path: A run, an adapter of any format, or a pipeline's folder.
        base: The pipeline.
        dtype: Of its weights; auto: float32.
        given: What an adapter's file may not say.

    Raises:
        UsageError: if there is no such pipeline.
        DoraError: if the adapter does not fit it.
    """
    said = _read_model_group(Path(path))
    kept = {name: said[name] for name in ("quantization", "double_quantization", "revision") if said.get(name)}
    pipeline = load_pipeline(ModelSettings(path=base, dtype=dtype, **kept), find_network(read_pipeline_index(base)))
    if Path(path).expanduser() == Path(base).expanduser():
        return pipeline
    if tokens := said.get("new_tokens"):
        add_tokens(pipeline, tokens, find_clip_encoders(pipeline))
    load_adapter(join_parts(pipeline), Path(path), given=given)
    return pipeline
