"""Whisper in CTranslate2's layout, as faster-whisper has it, written as a folder that transformers loads."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ..errors import DoraError
from ..files import write_json

# codes of dtypes that a weight may have; int8 would need its scales
_DTYPES = {0: np.float32, 4: np.float16}
_VERSION = 6
_HEAD = 64
"""The width of an attention head in every Whisper."""
_PARTS = {
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
    # several matrices, one below the other
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
_WHOLE = {"position_encodings/encodings": "embed_positions.weight", "embeddings/weight": "embed_tokens.weight"}
_FIELDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def read_binary(data: bytes) -> Iterator[tuple[str, Tensor]]:
    """The weights of a CTranslate2 ``model.bin`` by their names there.

    Raises:
        DoraError: if the file is of another version, cut short, or holds quantized weights.
    """
    place = 0

    def take(form: str) -> Any:
        nonlocal place
        found = struct.unpack_from(form, data, place)
        place += struct.calcsize(form)
        return found if len(found) != 1 else found[0]

    def text() -> str:
        return take(f"{take('<H')}s").rstrip(b"\0").decode()

    try:
        if (version := take("<I")) != _VERSION:
            raise DoraError(f"model.bin is of version {version} of CTranslate2's format, and {_VERSION} is read")
        text(), take("<I")
        found: dict[str, Tensor] = {}
        for _ in range(take("<I")):
            name, rank = text(), take("<B")
            shape = struct.unpack_from(f"<{rank}I", data, place)
            place += 4 * rank
            code, nbytes = take("<B"), take("<I")
            values = data[place : place + nbytes]
            place += nbytes
            if rank == 0:
                continue
            if code not in _DTYPES:
                raise DoraError(f"model.bin: {name} is quantized; give the float16 conversion")
            found[name] = torch.from_numpy(np.frombuffer(values, _DTYPES[code]).reshape(shape).copy())
            yield name, found[name]
        # weights that are equal are written once
        for _ in range(take("<I")):
            name, other = text(), text()
            if other in found:
                yield name, found[other]
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise DoraError(f"model.bin is damaged or cut short: {error}") from None


def rename_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names, without those that are made of others."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        side, _, rest = name.partition("/")
        front = f"model.{side}."
        if rest in _WHOLE:
            made[front + _WHOLE[rest]] = tensor
        elif match := re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest):
            parts = _PARTS.get(match[2], (match[2],))
            made |= {
                f"{front}layers.{match[1]}.{part}.{_FIELDS.get(match[3], match[3])}": piece.contiguous()
                for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True)
                # Whisper's keys have no bias, and the file zeros in its place
                if not (part.endswith("k_proj") and match[3] == "bias")
            }
        elif match := re.fullmatch(r"(conv[12]|layer_norm)/(\w+)", rest):
            made[f"{front}{match[1]}.{_FIELDS[match[2]]}"] = tensor
    return made


def write_whisper(weights: bytes, settings: Mapping[str, Any], tokenizer: bytes, folder: Path) -> None:
    """Write a multilingual Whisper, its tokenizer and its settings, in float32.

    Args:
        weights: ``model.bin``.
        settings: ``config.json``: which tokens are never written.
        tokenizer: ``tokenizer.json``.
        folder: Is there, and empty.

    Raises:
        DoraError: if the files are not those of a Whisper.
    """
    state = {name: tensor.float() for name, tensor in rename_weights(dict(read_binary(weights))).items()}
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    try:
        vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
        start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
        layers = {
            side: len({n.split(".")[3] for n in state if n.startswith(f"model.{side}.layers.")}) for side in _SIDES
        }
        config = WhisperConfig(
            vocab_size=vocabulary,
            d_model=width,
            num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
            **{f"{side}_layers": count for side, count in layers.items()},
            **{f"{side}_attention_heads": width // _HEAD for side in _SIDES},
            **{f"{side}_ffn_dim": len(state[f"model.{side}.layers.0.fc1.weight"]) for side in _SIDES},
            decoder_start_token_id=start,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
            architectures=["WhisperForConditionalGeneration"],
        )
        model = WhisperForConditionalGeneration(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (KeyError, RuntimeError) as error:
        raise DoraError(f"these are not the files of a Whisper: {str(error).splitlines()[0]}") from None
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise DoraError(f"model.bin lacks {', '.join(missing) or 'nothing'}, and has besides {', '.join(unexpected)}")
    model.generation_config = _make_generation(settings, ids, start, end)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor", **special},
    )


_SIDES = ("encoder", "decoder")


def _make_generation(settings: Mapping[str, Any], ids: Mapping[str, int], start: int, end: int) -> GenerationConfig:
    """The settings of generation that OpenAI's models come with, by the tokens that there are."""
    return GenerationConfig(
        decoder_start_token_id=start,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        suppress_tokens=list(settings.get("suppress_ids") or []) or None,
        begin_suppress_tokens=list(settings.get("suppress_ids_begin") or []) or None,
        is_multilingual=True,
        lang_to_id={token: i for token, i in ids.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", token)},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_length=448,
        return_timestamps=False,
    )
