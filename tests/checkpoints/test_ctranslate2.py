"""Whisper in CTranslate2's layout: a file made here by its description, and one by the tool itself."""

import json
import struct
import types

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("soundfile", reason="sounds are an extra")

from speech_kinds import save_whisper, tone

from doralib.checkpoints.ctranslate2 import read_binary, rename_weights, write_whisper
from doralib.errors import DoraError

SETTINGS = {"suppress_ids": [3, 5], "suppress_ids_begin": [7]}
# a head is 64 wide in every Whisper, a window 1,500 frames, a text 448 tokens
SHAPE = {
    "d_model": 128,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "encoder_layers": 2,
    "encoder_ffn_dim": 96,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper") / "base", layers=1, **SHAPE)


@pytest.fixture(scope="module")
def model(base):
    return transformers.WhisperForConditionalGeneration.from_pretrained(base).eval()


def lay_out(model):
    """The weights by the names and in the blocks that CTranslate2 has."""
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    laid = {}
    for side, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        take = lambda name, side=side: state[f"{side}.{name}"]
        laid[f"{side}/position_encodings/encodings"] = take("embed_positions.weight")
        laid |= {f"{side}/layer_norm/{ct}": take(f"layer_norm.{hf}") for ct, hf in NORM}
        for i in range(layers):
            here, there = f"{side}/layer_{i}", f"layers.{i}"
            for ct, names in BLOCKS.items():
                if f"{side}.{there}.{names[0]}.weight" not in state:
                    continue
                for ct_field, field in NORM if "norm" in ct else PLAIN:
                    pieces = [
                        # keys have no bias, and the file zeros in its place
                        take(f"{there}.{name}.{field}")
                        if f"{side}.{there}.{name}.{field}" in state
                        else torch.zeros(model.config.d_model)
                        for name in names
                    ]
                    laid[f"{here}/{ct}/{ct_field}"] = torch.cat(pieces)
    for conv in ("conv1", "conv2"):
        laid |= {f"encoder/{conv}/{field}": state[f"encoder.{conv}.{field}"] for _, field in PLAIN}
    laid["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return laid


NORM, PLAIN = (("gamma", "weight"), ("beta", "bias")), (("weight", "weight"), ("bias", "bias"))
BLOCKS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}


def pack(tensors, aliases=types.MappingProxyType({}), version=6, dtype=np.float32, code=0):
    """The bytes of a model.bin."""
    text = lambda value: struct.pack("<H", len(value) + 1) + value.encode() + b"\0"
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(tensors) + 1)]
    # a number is of rank 0, and says nothing of the weights
    parts += [text("encoder/num_heads"), struct.pack("<BBIh", 0, 2, 2, 2)]
    for name, tensor in tensors.items():
        values = tensor.numpy().astype(dtype)
        shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        parts += [text(name), shape, struct.pack("<BI", code, values.nbytes), values.tobytes()]
    # other names of weights that stand above
    parts += [struct.pack("<I", len(aliases)), *(text(name) for pair in aliases.items() for name in pair)]
    return b"".join(parts)


def test_a_whisper_comes_out_as_it_was(base, model, tmp_path):
    tokenizer = (base / "tokenizer.json").read_bytes()
    laid = lay_out(model)
    # the tool writes weights that are equal once
    same = {name: "encoder/layer_norm/beta" for name in laid if name.endswith("layer_norm/beta")}
    laid = {name: tensor for name, tensor in laid.items() if name not in same or name == same[name]}
    same |= {"decoder/projection/weight": "decoder/embeddings/weight"}
    write_whisper(pack(laid, {n: other for n, other in same.items() if n != other}), SETTINGS, tokenizer, tmp_path)
    made = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: (a - made.state_dict()[name]).abs().max().item() for name, a in model.state_dict().items()} == (
        dict.fromkeys(model.state_dict(), 0.0)
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    ours = processor(tone("unu doi"), sampling_rate=16_000, return_tensors="pt")["input_features"]
    theirs = transformers.WhisperFeatureExtractor()(tone("unu doi"), sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(ours, theirs["input_features"])
    assert processor.tokenizer("unu").input_ids == transformers.AutoTokenizer.from_pretrained(base)("unu").input_ids
    generation = made.generation_config
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([3, 5], [7])
    assert generation.lang_to_id["<|ro|>"] == processor.tokenizer.convert_tokens_to_ids("<|ro|>")
    assert (made.config.encoder_attention_heads, made.config.encoder_ffn_dim) == (2, 96)


def test_half_precision_is_read(model):
    tensors = lay_out(model)
    read = dict(read_binary(pack(tensors, dtype=np.float16, code=4)))
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], tensor.half()) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda tensors: pack(tensors, version=5), "version 5"),
        (lambda tensors: pack(tensors)[:-9], "cut short"),
        (lambda tensors: pack(tensors)[:40], "cut short"),
        (lambda tensors: b"", "cut short"),
        (lambda tensors: pack(tensors, dtype=np.int8, code=1), "quantized"),
        (lambda tensors: pack({name: t for name, t in tensors.items() if "conv2" not in name}), "conv2.weight"),
        (lambda tensors: pack({name: t for name, t in tensors.items() if "conv1" not in name}), "not the files of"),
        (lambda tensors: pack({**tensors, "encoder/conv2/bias": torch.zeros(3)}), "not the files of a Whisper"),
        (lambda tensors: pack({**tensors, "encoder/layer_0/rotary/weight": torch.zeros(3)}), "rotary"),
    ],
)
def test_what_is_no_whisper_is_told(base, model, tmp_path, damage, why):
    with pytest.raises(DoraError, match=why):
        write_whisper(damage(lay_out(model)), SETTINGS, (base / "tokenizer.json").read_bytes(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.interop
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_of_the_tools_own(base, model, tmp_path, dtype):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    # its converter reads the settings of generation by their old places
    generation = {"suppress_tokens": [3, 5], "begin_suppress_tokens": [7], "alignment_heads": [[0, 0]]}
    model.generation_config.update(**generation)
    model.save_pretrained(tmp_path / "base")
    transformers.AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "base")
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "base"))
    converter.convert(str(tmp_path / "theirs"), quantization=dtype)
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    read = rename_weights(dict(read_binary((tmp_path / "theirs" / "model.bin").read_bytes())))
    expected = {n: t for n, t in model.state_dict().items() if n != "proj_out.weight"}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], t.to(read[name].dtype)) for name, t in expected.items())
    (tmp_path / "ours").mkdir()
    weights = (tmp_path / "theirs" / "model.bin").read_bytes()
    write_whisper(weights, settings, (base / "tokenizer.json").read_bytes(), tmp_path / "ours")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    made = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours")
    features = processor(tone("unu doi"), sampling_rate=16_000, return_tensors="pt")["input_features"]
    start = processor.tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|ro|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    ids = made.generate(
        features, decoder_input_ids=torch.tensor([start]), max_new_tokens=8, do_sample=False, language="ro"
    )
    theirs = ctranslate2.models.Whisper(str(tmp_path / "theirs"), compute_type="float32")
    heard = theirs.generate(ctranslate2.StorageView.from_array(features.numpy()), [start], beam_size=1, max_length=12)
    assert heard[0].sequences_ids[0][:8] == ids[0].tolist()[-len(heard[0].sequences_ids[0]) :][:8]
