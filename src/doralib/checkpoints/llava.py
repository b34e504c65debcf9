"""LLaVA as it was begun: a language model, a vision tower and a projector between them, written as one checkpoint."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

from ..data.pictures import import_pillow
from ..disk import replacing
from ..errors import DoraError, UsageError
from ..files import read_tensors
from .explain import explaining_load
from .limits import check_sizes

_PLACE = "<image>"
_TABLE_MULTIPLE = 64
"""The embedding's rows are filled up to a multiple, as in llava-hf's checkpoints."""
_PROJECTOR = {"0": "linear_1", "2": "linear_2"}
VICUNA = (
    "{% set told = messages[0]['role'] == 'system' %}"
    "{% macro say(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% if told %}{{ say(messages[0]['content']) }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for message in (messages[1:] if told else messages) %}{% if message['role'] == 'assistant' %}"
    "ASSISTANT: {{ say(message['content']) }}</s>{% else %}USER: {{ say(message['content']) }}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The conversation of LLaVA-1.5 (vicuna_v1), pictures first in their turn."""


def compose_llava(
    language: str,
    vision: str,
    out: str | Path,
    *,
    projector: str | Path | None = None,
    layer: int = -2,
    dtype: str = "auto",
    empty: bool = False,
) -> Path:
    """Write a LLaVA of these parts as a checkpoint with its processor; returns its folder.

    Pictures are filled up to squares with the tower's mean color, and conversations are written as LLaVA-1.5 does.

    Args:
        language: A causal language model.
        vision: CLIP, or another vision transformer with a class token.
        projector: LLaVA's own mm_projector.bin or .safetensors; None: it starts at random, from torch's generator.
        layer: The layer of the tower whose patches the projector gets.
        empty: Write configuration and processor alone, for which no weights are read.

    Raises:
        UsageError: if a part is not there or of another kind, the tower has no class token, or the projector is of
            another shape.
        DoraError: if a file is damaged, or `out` is there already.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"out: {out} is there already; choose another folder")
    import_pillow()
    from transformers import AutoImageProcessor  # noqa: PLC0415  pillow comes with it

    for path in (vision, language):
        check_sizes(path)
    with explaining_load(vision):
        whole = AutoConfig.from_pretrained(vision)
        seeing = getattr(whole, "vision_config", whole)
        own = AutoImageProcessor.from_pretrained(vision)
    with explaining_load(language):
        told, tokenizer = AutoConfig.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    processor = _make_processor(tokenizer, own, seeing)
    rows = math.ceil(len(processor.tokenizer) / _TABLE_MULTIPLE) * _TABLE_MULTIPLE
    text = tower = None
    if empty:
        told.vocab_size = rows
    else:
        if not sys.stderr.isatty():
            disable_progress_bar()  # bars of transformers are for a terminal
        with explaining_load(language):
            text = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
        with explaining_load(vision):
            kind = CLIPVisionModel if seeing is not whole else AutoModel
            tower = kind.from_pretrained(vision, dtype=text.dtype)
        text.resize_token_embeddings(rows, mean_resizing=False)
        told, seeing = text.config, tower.config
    config = LlavaConfig(
        vision_config=seeing,
        text_config=told,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(_PLACE),
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
    )
    if text is None:
        config.architectures, config.dtype = [LlavaForConditionalGeneration.__name__], told.dtype
        written: tuple[Any, ...] = (config, processor)
    else:
        written = (_join(config, text, tower, projector), processor)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        for each in written:
            each.save_pretrained(part)
    return out


def _join(config: LlavaConfig, text: Any, tower: Any, projector: str | Path | None) -> Any:
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    between = _start_projector(config, text.dtype)
    if projector is not None:
        _fill_projector(between, Path(projector))
    model.model.vision_tower, model.model.multi_modal_projector = tower, between
    model.model.language_model, model.lm_head = text.get_decoder(), text.get_output_embeddings()
    model.generation_config = text.generation_config
    return model


def _make_processor(tokenizer: Any, own: Any, config: Any) -> Any:
    # pillow comes with it, which is an extra
    from transformers import LlavaProcessor  # noqa: PLC0415
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil  # noqa: PLC0415

    tokenizer.add_special_tokens({"additional_special_tokens": [_PLACE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    side = config.image_size
    look = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=own.image_mean,
        image_std=own.image_std,
        do_pad=True,
    )
    return LlavaProcessor(
        look,
        tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def _start_projector(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector  # noqa: PLC0415

    return LlavaMultiModalProjector(config).to(dtype)


def _fill_projector(projector: nn.Module, file: Path) -> None:
    """Put LLaVA's own names of a projector's tensors, ``model.mm_projector.0.weight``, into their places."""
    if not file.is_file():
        raise UsageError(f"projector: there is no file {file}")
    found = {name.rpartition("mm_projector.")[2]: value for name, value in _read(file).items()}
    named = {
        f"{_PROJECTOR.get(name.partition('.')[0], name)}.{name.rpartition('.')[2]}": v for name, v in found.items()
    }
    wanted = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    if {name: tuple(value.shape) for name, value in named.items()} != wanted:
        has = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
        needs = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise UsageError(f"projector: {file} is of other parts: it has {has}; this one has {needs}")
    projector.load_state_dict(named)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return dict(read_tensors(file))
    try:
        made: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DoraError(f"projector: {file} cannot be read: {error}") from error
    return made
