"""TensorRT-LLM: PEFT's files with each magnitude divided by the length it is for, so that the engine need not know it.

What its own examples/dora/normalize_weights.py makes. The base model's weights give m back.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, UsageError
from ..functional import gain
from ..state import AdapterState, LayerAdapter
from .base import Content, Found, Given, only_layers, refuse
from .peft import from_peft, to_peft

# nothing else would tell these files from PEFT's, which would then be far off
MARK = "magnitudes_divided_by_norm"


def detect(content: Content) -> bool:
    """Whether it is one that we wrote."""
    return bool(content.settings.get(MARK))


def read(content: Content, given: Given) -> Found:
    """The adapter, with each magnitude multiplied by the length that it was divided by.

    Raises:
        UsageError: without the base model.
        DoraError: if the base has no such layers, or the adapter is no DoRA.
    """
    if given.lengths is None:
        raise UsageError(
            "this adapter was written for TensorRT-LLM: its magnitudes are divided by the rows' lengths, which only "
            "the base model's weights tell; give --base MODEL"
        )
    config, state = from_peft(content.tensors, {k: v for k, v in content.settings.items() if k != MARK})
    if config.method != "dora":
        raise DoraError(f"this adapter is {config.method}, which has no divided magnitudes; leave --from out")
    lengths, named = given.lengths(state), state.layers.items()
    absent = [f"{name} {layer.shape}: not in the base model" for name, layer in named if name not in lengths]
    refuse("the TensorRT-LLM adapter", absent)
    layers = {}
    for name, layer in named:
        assert layer.m_O is not None
        m_O = layer.m_O * lengths[name].to(layer.m_O)
        layers[name] = LayerAdapter(layer.a_RI, layer.b_OR, m_O, layer.scale, layer.kind)
    return Found(config, replace(state, layers=layers), ("magnitudes are m / n times the rows' lengths in the base",))


def write(config: DoraConfig, state: AdapterState, norms: Mapping[str, Tensor]) -> Content:
    """The adapter for TensorRT-LLM; needs --dora_plugin=enable there, or the magnitudes are ignored.

    Args:
        norms: length of each output row of W + s B A, by layer.

    Raises:
        UsageError: for LoRA, whole tensors, or ranks and alphas of several kinds, of which its reader knows one.
    """
    only_layers(state, "TensorRT-LLM")
    if config.method != "dora":
        raise UsageError("TensorRT-LLM reads a plain LoRA as PEFT writes it: convert --to peft")
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError("TensorRT-LLM reads one rank and one alpha for all layers; this adapter has patterns")
    divided = {}
    for name, layer in state.layers.items():
        assert layer.m_O is not None
        g_O = gain(layer.m_O.to(norms[name].dtype), norms[name]).to(layer.m_O.dtype)
        divided[name] = LayerAdapter(layer.a_RI, layer.b_OR, g_O, layer.scale, layer.kind)
    tensors, settings = to_peft(config, AdapterState(divided, {}, state.base_model))
    return Content(tensors, {**settings, MARK: True})
