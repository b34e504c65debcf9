"""Tiny models of every architecture of transformers: their settings shrunk by name, and inputs that they take."""

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# what a model is built for, best known first; the first that an architecture has stands for it
KINDS = {
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "sequence-class": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-class": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "audio-class": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "image-class": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "encoder": "MODEL_MAPPING",
}
VOCABULARY = 160
_WIDTH, _INNER, _LAYERS, _HEADS, _PIXELS = 32, 48, 2, 4, 32
_BY_NAME = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim", "model_dim", "width"),
        _WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"),
        _INNER,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ff_expert_dim"), 24),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), _LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        _HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "attention_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions"), 128),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_expand", "mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("rotary_dim",), 8),
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("first_k_dense_replace",), 1),
    "vocab_size": VOCABULARY,
    "image_size": _PIXELS,
    "patch_size": 8,
    "num_labels": 3,
    "use_cache": False,
}
# what a type needs beside
_MLA = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu"),
    *("kimi_k25", "kimi_vl", "kimi_k25_text", "longcat_flash", "mistral4", "mistral4_text", "deepseek_v4"),
)
_BY_TYPE: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": _HEADS} for name in _MLA},
    "esmc": {"num_key_value_heads": _HEADS},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "flaubert": {"n_words": VOCABULARY, "emb_dim": _WIDTH},
    "xlm": {"n_words": VOCABULARY, "emb_dim": _WIDTH},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "minicpm3": {"num_key_value_heads": _HEADS, "head_dim": 16},
    "deepseek_v2": {"num_key_value_heads": _HEADS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "kimi_linear": {"num_experts_per_token": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "token_dropout": False},
    "layoutlmv3": {"input_size": _PIXELS},
    **{
        name: {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
        for name in ("swin", "swinv2", "donut-swin")
    },
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"layer_types": ["linear_attention", "hybrid"], "mamba_dt_rank": 4, "n_mamba_heads": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1},
}
_ROPE_SECTIONS = [1, 1, 2]


def list_architectures() -> dict[str, tuple[str, type[PreTrainedModel]]]:
    """By model type: the kind that stands for it, and the class."""
    found: dict[str, tuple[str, type[PreTrainedModel]]] = {}
    for kind, name in KINDS.items():
        mapping = getattr(modeling_auto, name)
        for model_type, config_class in CONFIG_MAPPING.items():
            if model_type in found:
                continue
            try:
                classes = mapping[config_class]
            except (KeyError, ValueError, ImportError, AttributeError):
                continue
            found[model_type] = kind, (classes[0] if isinstance(classes, tuple | list) else classes)
    return dict(sorted(found.items()))


def shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The smallest settings of this class that its model is likely to take."""
    config = config_class()
    for changes in (_changes(config), _changes(config, lists=False)):
        try:
            return config_class(**changes)
        except Exception:  # noqa: BLE001  settings check themselves in their own ways
            continue
    return config_class(**{key: value for key, value in _changes(config).items() if not isinstance(value, dict)})


def _changes(config: PreTrainedConfig, *, lists: bool = True) -> dict[str, Any]:
    values, changes = dict(vars(config)), {}
    for name, value in values.items():
        if (
            name.startswith("_")
            or name in ("model_type",)
            or name in ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")
        ):
            continue
        if isinstance(value, PreTrainedConfig):
            changes[name] = {**_changes(value, lists=lists), "model_type": value.model_type}
        elif name in _BY_NAME and isinstance(value, int | list | tuple):
            small = _BY_NAME[name]
            if isinstance(value, list | tuple):
                if lists and value and all(isinstance(each, int) for each in value):
                    changes[name] = type(value)(min(each, small) for each in value)
                continue
            changes[name] = min(value, small) if value else value
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY - 20:
            changes[name] = VOCABULARY - 1 - len([each for each in changes if each.endswith("token_id")])
        elif name.endswith("token_index") and isinstance(value, int) and value >= VOCABULARY - 20:
            changes[name] = VOCABULARY - 1
        elif isinstance(value, dict) and "mrope_section" in value:
            changes[name] = {**value, "mrope_section": _ROPE_SECTIONS}
    return {**changes, **_BY_TYPE.get(config.model_type, {})}


def build(kind: str, model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> PreTrainedModel:
    """A model of a few thousand weights, with random values."""
    torch.manual_seed(0)
    config = shrink(config_class)
    for each in _configs(config):
        each.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > 30_000_000:
        raise ValueError(f"its smallest settings still have {size:,} weights")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all():
                p.normal_(std=0.02)
    return model.eval()


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(each for part in inner for each in _configs(part))]


def make_inputs(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What the model may take, the likeliest first."""
    given = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    configs = _configs(model.config)
    first = lambda name, default: next((v for c in configs if (v := getattr(c, name, None)) is not None), default)
    ids = torch.randint(3, 100, (2, 12), generator=generator)
    pixels = first("image_size", _PIXELS)
    height, width = pixels if isinstance(pixels, list | tuple) else (pixels, pixels)
    image = torch.randn(2, first("num_channels", 3), height, width, generator=generator)
    feature = first("num_mel_bins", first("feature_size", 80))
    texts: dict[str, Any] = {}
    if "input_ids" in given:
        texts = {"input_ids": ids}
    if "decoder_input_ids" in given:
        texts["decoder_input_ids"] = ids[:, :7]
    if "attention_mask" in given and "input_ids" in given:
        texts["attention_mask"] = torch.ones_like(ids)
    choices = [texts] if texts else []
    with_image = {**texts, "pixel_values": image} if "pixel_values" in given else None
    if with_image is not None:
        choices.append(with_image)
        choices.append({"pixel_values": image})
    if "input_values" in given:
        choices += [{"input_values": torch.randn(2, 4000, generator=generator)}]
        choices += [{"input_values": torch.randn(2, first("max_length", 64), feature, generator=generator)}]
    if "input_features" in given:
        decoder = {name: texts[name] for name in ("decoder_input_ids",) if name in texts}
        frames = first("max_source_positions", 64)
        for shape in ((2, feature, 2 * frames), (2, 64, feature), (2, feature, 64)):
            choices.append({"input_features": torch.randn(*shape, generator=generator), **decoder})
    if "pixel_values" in given and first("num_frames", None):
        clip = torch.randn(1, first("num_frames", 4), 3, height, width, generator=generator)
        choices += [{"pixel_values": clip}, {**texts, "pixel_values": clip}]
    return choices


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The main output: logits where there are some, else the first tensor that has a gradient or floats."""
    torch.manual_seed(0)  # some draw patches at random
    output = model(**inputs)
    logits = output.get("logits") if hasattr(output, "get") else None
    if isinstance(logits, torch.Tensor):
        return logits
    values = list(output.values() if hasattr(output, "values") else output)
    floats = [each for each in values if isinstance(each, torch.Tensor) and each.is_floating_point()]
    return next((each for each in floats if each.requires_grad), floats[0])
