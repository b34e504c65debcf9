"""The weights of an ONNX file, and a DINOv2 in one written as a folder that transformers loads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from ..errors import DoraError
from ..files import write_json

_FLOAT32 = 1
_HEAD = 64
"""The width of an attention head in every DINOv2."""
# transformers' names since its version 5
_RENAMED = {f"attention.attention.{name}.": f"attention.{name[0]}_proj." for name in ("query", "key", "value")}
_RENAMED |= {"attention.output.dense.": "attention.o_proj."}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures, as every DINOv2 sees them."""


def read_weights(data: bytes) -> dict[str, Tensor]:
    """The float32 weights of an ONNX model by the names of the modules that it was exported from.

    A matrix that an exporter has transposed for its product, and left without its name, is turned back, and gets the
    name of the bias that is added to the product.

    Raises:
        DoraError: if the file is damaged, or is no ONNX model.
    """
    try:
        model = list(_read_fields(memoryview(data)))
        graph = list(_read_fields(next(value for number, value in model if number == _GRAPH)))
        tensors = dict(_read_tensor(value) for number, value in graph if number == _TENSOR)
        made = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        nodes = [_Node.of(value) for number, value in graph if number == _NODE]
        products = {node.outputs[0]: node for node in nodes if node.kind == "MatMul"}
        for node in nodes:
            parts = [name for name in node.inputs if name in products] if node.kind == "Add" else []
            bias = next((name for name in node.inputs if name.endswith(".bias")), None)
            if parts and bias and (matrix := tensors.get(products[parts[0]].inputs[1])) is not None:
                made[f"{bias.removesuffix('.bias')}.weight"] = matrix.T.contiguous()
    except (StopIteration, IndexError, TypeError, ValueError) as error:
        raise DoraError(f"this is no whole ONNX model: {str(error) or 'it has no graph'}") from None
    return made


# numbers of fields in onnx.proto: of a model its graph, of a graph its nodes and tensors
_GRAPH, _NODE, _TENSOR = 7, 1, 5


@dataclass(frozen=True)
class _Node:
    """One operation of the graph, with the names of what goes in and comes out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, data: memoryview) -> "_Node":
        fields = list(_read_fields(data))
        named = {number: tuple(str(value, "utf-8") for at, value in fields if at == number) for number in (1, 2, 4)}
        return cls(named[4][0], named[1], named[2])


def _read_fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a message of protocol buffers: numbers, or the bytes of what is longer."""
    at = 0

    def take() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = take()
        if (form := key & 7) == 0:
            yield key >> 3, take()
            continue
        if form not in (1, 2, 5):
            raise ValueError(f"there is no form {form} of a field")
        size = take() if form == 2 else {1: 8, 5: 4}[form]
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _read_tensor(data: memoryview) -> tuple[str, Tensor | None]:
    """A tensor by its name; None: it is of whole numbers, or of another dtype."""
    fields = list(_read_fields(data))
    found = dict(fields)
    name = str(found[8], "utf-8") if 8 in found else ""
    if found.get(2) != _FLOAT32 or 9 not in found:
        return name, None
    # dims: one by one, or packed
    shape = [size for number, value in fields if number == 1 for size in ([value] if isinstance(value, int) else value)]
    return name, torch.from_numpy(np.frombuffer(found[9], np.dtype("<f4")).reshape(shape).copy())


def write_dinov2(data: bytes, side: int, folder: Path) -> None:
    """Write the DINOv2 in an ONNX model, with what makes its inputs, for pictures of a size.

    Args:
        data: The model; its tower's names begin with ``backbone.``.
        side: Pixels of a side: the positions are interpolated to it once.
        folder: Is there, and empty.

    Raises:
        DoraError: if it holds no DINOv2.
    """
    try:
        model = _make_dinov2(read_weights(data))
    except (KeyError, RuntimeError) as error:
        raise DoraError(f"there is no DINOv2 in this ONNX model: {str(error).splitlines()[0]}") from None
    patch = model.config.patch_size
    seen = torch.empty(1, (side // patch) ** 2 + 1, model.config.hidden_size)
    with torch.no_grad():
        fitted = model.embeddings.interpolate_pos_encoding(seen, side, side)
    model.embeddings.position_embeddings = torch.nn.Parameter(fitted)
    model.config.image_size = side
    model.save_pretrained(folder)
    size = {"height": side, "width": side}
    look: dict[str, Any] = {"image_processor_type": "BitImageProcessor", "image_mean": _MEAN, "image_std": _STD}
    look |= {"size": {"shortest_edge": side}, "crop_size": size, "do_convert_rgb": True, "resample": 3}
    write_json(folder / "preprocessor_config.json", look)


def _make_dinov2(weights: Mapping[str, Tensor]) -> Dinov2Model:
    state = {_rename(name): value for name, value in weights.items() if name.startswith("backbone.")}
    kernel = state["embeddings.patch_embeddings.projection.weight"]
    width, patch = len(kernel), kernel.shape[-1]
    # constants of the graph: the positions of the class and of the patches
    first, others = (
        next(value for name, value in weights.items() if name.startswith("onnx::") and fits(tuple(value.shape)))
        for fits in (lambda shape: shape == (1, 1, width), lambda shape: len(shape) == 3 and shape[1] > 1)
    )
    state["embeddings.position_embeddings"] = torch.cat((first, others), dim=1)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        num_attention_heads=width // _HEAD,
        mlp_ratio=len(state["encoder.layer.0.mlp.fc1.weight"]) // width,
        patch_size=patch,
        image_size=round(others.shape[1] ** 0.5) * patch,
        use_mask_token=False,
    )
    model = Dinov2Model(config)
    model.load_state_dict(state)
    return model.eval()


def _rename(name: str) -> str:
    name = name.removeprefix("backbone.")
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
