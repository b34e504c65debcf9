"""llama.cpp: a LoRA adapter as one .gguf file, by llama.cpp's names of the tensors. Write only.

Its runtime adds alpha / r B A to each weight; r is that of the tensors, alpha one number for the file. Names and orders
of rows are those of its convert_lora_to_gguf.py, which takes no magnitudes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError, list_some
from ..extras import import_extra
from ..state import AdapterState, LayerAdapter
from .base import Format, Hints, ParsedAdapter, RawAdapter
from .rotary import to_pairs
from .tensors import check_only_layers, compute_alpha, find_commonest

# llama.cpp's architecture by transformers' model_type: those whose linear weights it only renames, and ...
_ARCHITECTURES = {
    **{name: name.upper() for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "starcoder2")},
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "granite": "GRANITE",
    "smollm3": "SMOLLM3",
    "gemma3_text": "GEMMA3",
}
# ... those whose rows of q and k it takes in another order
_PAIRED = frozenset({"llama", "mistral", "granite", "smollm3"})
_ARCHITECTURE, _ALPHA = "general.architecture", "adapter.lora.alpha"


def detect(_raw: RawAdapter) -> bool:
    """No: these files are not read."""
    return False


def read(_raw: RawAdapter, _hints: Hints) -> ParsedAdapter:
    """Nothing.

    Raises:
        UsageError: always.
    """
    raise UsageError("adapters in .gguf are written, not read; give the adapter that it was made of")


def write(config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter for llama.cpp, which must be LoRA; of unequal scales, what differs from the commonest goes into B.

    Raises:
        UsageError: for magnitudes, whole tensors, layers that llama.cpp has no name for, an output head that is tied
            to the embedding, or a model of another architecture than those known.
    """
    if config.has_magnitude or config.has_bank:
        raise UsageError(
            f"llama.cpp runs LoRA alone, this adapter is {config.method}: give --rank R for the nearest LoRA"
        )
    check_only_layers(state, "llama.cpp", ("linear", "embedding"))
    model = {**hints.config, **hints.config.get("text_config", {})}
    kind = model.get("model_type")
    if kind not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise UsageError(f"the base is of type {kind!r}, of which llama.cpp's names are not known here; known: {known}")
    heads = _count_heads(model) if kind in _PAIRED else {}
    names = _name_layers(list(state.layers), _ARCHITECTURES[kind], int(model["num_hidden_layers"]), hints)
    alphas = {name: compute_alpha(layer) for name, layer in state.layers.items()}
    alpha = find_commonest(alphas)
    tensors: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        b_OR = layer.b_OR if alphas[name] == alpha else layer.b_OR * (alphas[name] / alpha)
        if count := heads.get(name.rpartition(".")[2]):
            b_OR = to_pairs(b_OR, count)
        tensors |= _name_factors(names[name], layer, b_OR)
    return RawAdapter(tensors, {}, {_ARCHITECTURE: _find_architecture(_ARCHITECTURES[kind])[1], _ALPHA: repr(alpha)})


def write_file(raw: RawAdapter, path: Path) -> None:
    """Write the adapter as one .gguf file, in float32."""
    gguf = import_extra("gguf", "writing for llama.cpp")
    writer = gguf.GGUFWriter(path, raw.metadata[_ARCHITECTURE])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(raw.metadata[_ALPHA]))
    for name, tensor in raw.tensors.items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name_factors(name: str, layer: LayerAdapter, b_OR: Tensor) -> dict[str, Tensor]:
    # a token's row of A is looked up there, so an embedding's is stored (vocabulary, r)
    a = layer.a_RI.T if layer.kind == "embedding" else layer.a_RI
    return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b_OR}


def _name_layers(layers: list[str], architecture: str, blocks: int, hints: Hints) -> dict[str, str]:
    """llama.cpp's name of each layer's weight.

    Raises:
        UsageError: naming the layers that have none, and a head that llama.cpp's file of the base would not have.
    """
    known = import_extra("gguf", "writing for llama.cpp").get_tensor_name_map(
        _find_architecture(architecture)[0], blocks
    )
    found = {name: known.get_name(_strip_wrapper(name)) for name in layers}
    if unknown := [name for name, own in found.items() if own is None]:
        raise UsageError(f"llama.cpp has no tensor for {list_some(unknown, 5, ', ')}; merge the adapter")
    if tied := [name for name in layers if name.endswith("lm_head") and name not in hints.shapes]:
        raise UsageError(f"{tied[0]} is tied to the embedding in the base, and llama.cpp has no such tensor; merge it")
    return found


def _strip_wrapper(name: str) -> str:
    """A name inside a vision-language model as the language model alone has it."""
    return name.replace("model.language_model.", "model.", 1).removeprefix("language_model.")


def _find_architecture(name: str) -> tuple[Any, str]:
    """gguf's member of this name, and the word for it in files."""
    gguf = import_extra("gguf", "writing for llama.cpp")
    member = getattr(gguf.MODEL_ARCH, name)
    return member, gguf.MODEL_ARCH_NAMES[member]


def _count_heads(model: Mapping[str, Any]) -> dict[str, int]:
    heads = int(model["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(model.get("num_key_value_heads") or heads)}


FORMAT = Format(
    "gguf",
    "llama.cpp",
    detect,
    read,
    write,
    "adapter.gguf",
    methods=("lora",),
    needs_weights=True,
    save=write_file,
    note="llama-cli and llama-server load it with --lora",
)
