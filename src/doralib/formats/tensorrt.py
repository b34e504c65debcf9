"""TensorRT-LLM: PEFT's files with each magnitude divided by the length it is for, so that the engine need not know it.

What its own examples/dora/normalize_weights.py makes. The base model's weights give m back.
"""

from dataclasses import replace

from ..config import DoraConfig
from ..errors import DoraError, UsageError, raise_problems
from ..functional import gain
from ..state import AdapterState, LayerAdapter
from .base import Hints, ParsedAdapter, RawAdapter, check_only_layers
from .peft import from_peft, to_peft

# nothing else would tell these files from PEFT's, which would then be far off
MARK = "magnitudes_divided_by_norm"


def detect(raw: RawAdapter) -> bool:
    """Whether it is one that we wrote."""
    return bool(raw.settings.get(MARK))


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """The adapter, with each magnitude multiplied by the length that it was divided by.

    Raises:
        UsageError: without the base model.
        DoraError: if the base has no such layers, or the adapter is no DoRA.
    """
    if hints.lengths is None:
        raise UsageError(
            "this adapter was written for TensorRT-LLM: its magnitudes are divided by the rows' lengths, which only "
            "the base model's weights tell; give --base MODEL"
        )
    config, state = from_peft(raw.tensors, {k: v for k, v in raw.settings.items() if k != MARK})
    if config.method != "dora":
        raise DoraError(f"this adapter is {config.method}, which has no divided magnitudes; leave --from out")
    lengths, named = hints.lengths(state), state.layers.items()
    absent = [f"{name} {layer.shape}: not in the base model" for name, layer in named if name not in lengths]
    raise_problems("the TensorRT-LLM adapter", absent)
    layers = {}
    for name, layer in named:
        assert layer.m_O is not None
        m_O = layer.m_O * lengths[name].to(layer.m_O)
        layers[name] = LayerAdapter(layer.a_RI, layer.b_OR, m_O, layer.scale, layer.kind)
    return ParsedAdapter(
        config, replace(state, layers=layers), ("magnitudes are m / n times the rows' lengths in the base",)
    )


def write(config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter for TensorRT-LLM, each magnitude divided by the length of its row of W + s B A.

    Raises:
        UsageError: for LoRA, whole tensors, or ranks and alphas of several kinds, of which its reader knows one.
        DoraError: if the adapter does not fit the base.
    """
    check_only_layers(state, "TensorRT-LLM")
    if config.method != "dora":
        raise UsageError("TensorRT-LLM reads a plain LoRA as PEFT writes it: convert --to peft")
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError("TensorRT-LLM reads one rank and one alpha for all layers; this adapter has patterns")
    assert hints.lengths is not None
    divided, lengths = {}, hints.lengths(state)
    for name, layer in state.layers.items():
        assert layer.m_O is not None
        g_O = gain(layer.m_O.to(lengths[name].dtype), lengths[name]).to(layer.m_O.dtype)
        divided[name] = LayerAdapter(layer.a_RI, layer.b_OR, g_O, layer.scale, layer.kind)
    tensors, settings = to_peft(config, AdapterState(divided, {}, state.base_model))
    return RawAdapter(tensors, {**settings, MARK: True})
