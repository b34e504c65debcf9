"""A checkpoint in the shape of LLaMA-3-8B and an adapter for it, of random numbers, written to be merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.safetensors import Slot, lay_out, write_at
from ...config import DoraConfig
from ...files import replacing, write_json, write_tensors
from ...formats.peft import to_peft
from ...functional import BLOCK_ELEMENTS, row_blocks
from ...state import AdapterState, LayerAdapter
from .subjects import TARGETS

HIDDEN, INNER, KV, VOCAB, LAYERS = 4096, 14336, 1024, 128256, 32
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SHARD_BYTES = 5 * 10**9
RANK = 16


def write_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """A random model and adapter of LLaMA-3-8B's shapes, written unless they are there: (base, adapter) folders."""
    base, adapter = folder / "base", folder / "adapter"
    if not (base / "model.safetensors.index.json").is_file():
        _write_base(base, layers)
    if not (adapter / "adapter_config.json").is_file():
        _write_adapter(adapter, layers, base)
    return base, adapter


def layer_numbers() -> int:
    """How many numbers one layer holds."""
    return sum(out * in_ for out, in_ in PROJECTIONS.values()) + 2 * HIDDEN


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(layers):
        for name, shape in PROJECTIONS.items():
            yield f"model.layers.{i}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _write_base(base: Path, layers: int) -> None:
    slots = [Slot(name, "BF16", shape, base, 0, 0).cast("BF16") for name, shape in _shapes(layers)]
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(each.nbytes for each in groups[-1]) + slot.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(slot)
    files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    weight_map = {slot.name: file for file, group in zip(files, groups, strict=True) for slot in group}
    total = sum(slot.nbytes for slot in slots)
    with replacing(base, total) as part:
        part.mkdir()
        for file, group in zip(files, groups, strict=True):
            _write_shard(part / file, group)
        write_json(part / "config.json", _config(layers))
        write_json(part / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, slots: list[Slot]) -> None:
    header, placed = lay_out(slots, path, {"format": "pt"})
    path.write_bytes(header)
    # the same noise in every block: neither copying nor merging looks at the numbers
    noise = torch.randn(BLOCK_ELEMENTS).mul_(0.02).bfloat16()
    for slot in placed:
        for rows in row_blocks(*slot.matrix):
            count = (rows.stop - rows.start) * slot.matrix[1]
            write_at(path, slot.start + rows.start * slot.row_bytes, noise[:count])


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _write_adapter(adapter: Path, layers: int, base: Path) -> None:
    adapted = {
        f"model.layers.{i}.{name}": _layer(*shape)
        for i in range(layers)
        for name, shape in PROJECTIONS.items()
        if name.endswith(TARGETS)
    }
    config = DoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    tensors, settings = to_peft(config, AdapterState(adapted, {}, str(base)))
    write_tensors(adapter / "adapter_model.safetensors", tensors)
    write_json(adapter / "adapter_config.json", settings)


def _layer(out: int, in_: int) -> LayerAdapter:
    a_RI, b_OR = torch.randn(RANK, in_) / in_**0.5, torch.randn(out, RANK) * 0.02
    m_O: Tensor = torch.full((out,), 0.02 * in_**0.5) * (1 + 0.01 * torch.randn(out))
    return LayerAdapter(a_RI, b_OR, m_O, 2.0)
