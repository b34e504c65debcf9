"""A model in the shape of LLaMA-3-8B, and a checkpoint and an adapter of it, of random numbers, to be merged."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ...checkpoints.safetensors import Slot, lay_out, write_at
from ...config import DoraConfig
from ...disk import replacing
from ...files import write_json, write_tensors
from ...formats.peft import to_peft
from ...functional import BLOCK_ELEMENTS, row_blocks
from ...state import AdapterState, LayerAdapter
from .subjects import TARGETS

VOCAB, LAYERS, RANK = 128256, 32, 16
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def make_llama(layers: int, **settings: int) -> PreTrainedModel:
    """The model in bfloat16 on the meta device; settings are those of `LlamaConfig` that differ."""
    shape = {"vocab_size": VOCAB, "num_hidden_layers": layers, **LLAMA, **settings}
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def count_numbers(layers: int) -> int:
    """How many numbers a model holds."""
    return sum(p.numel() for p in make_llama(layers).parameters())


def is_target(name: str) -> bool:
    """Whether a parameter is the weight of an adapted layer."""
    return name.removesuffix(".weight").endswith(TARGETS)


def write_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """A random model and adapter of LLaMA-3-8B's shapes, written unless they are there: (base, adapter) folders."""
    base, adapter = folder / "base", folder / "adapter"
    model = make_llama(layers)
    if not (base / "model.safetensors.index.json").is_file():
        _write_base(base, model)
    if not (adapter / "adapter_config.json").is_file():
        _write_adapter(adapter, model, base)
    return base, adapter


def _write_base(base: Path, model: PreTrainedModel) -> None:
    tensors = model.state_dict()
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors")
    with replacing(base, plan.metadata["total_size"]) as part:
        part.mkdir()
        for file, names in plan.filename_to_tensors.items():
            _write_shard(part / file, {name: tensors[name] for name in names})
        model.config.save_pretrained(part)
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(part / "model.safetensors.index.json", index)


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    slots = [Slot(name, "BF16", tuple(tensor.shape), path, 0, tensor.nbytes) for name, tensor in tensors.items()]
    header, placed = lay_out(slots, path, {"format": "pt"})
    path.write_bytes(header)
    # the same noise in every block: neither copying nor merging looks at the numbers
    noise = torch.randn(BLOCK_ELEMENTS).mul_(0.02).bfloat16()
    for slot in placed:
        for rows in row_blocks(*slot.matrix):
            count = (rows.stop - rows.start) * slot.matrix[1]
            write_at(path, slot.start + rows.start * slot.row_bytes, noise[:count])


def _write_adapter(adapter: Path, model: PreTrainedModel, base: Path) -> None:
    shapes = {name.removesuffix(".weight"): p.shape for name, p in model.named_parameters() if is_target(name)}
    config = DoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    state = AdapterState({name: _make_layer(*shape) for name, shape in shapes.items()}, {}, str(base))
    tensors, settings = to_peft(config, state)
    write_tensors(adapter / "adapter_model.safetensors", tensors)
    write_json(adapter / "adapter_config.json", settings)


def _make_layer(out: int, in_: int) -> LayerAdapter:
    a_RI, b_OR = torch.randn(RANK, in_) / in_**0.5, torch.randn(out, RANK) * 0.02
    m_O = torch.full((out,), 0.02 * in_**0.5) * (1 + 0.01 * torch.randn(out))
    return LayerAdapter(a_RI, b_OR, m_O, 2.0)
