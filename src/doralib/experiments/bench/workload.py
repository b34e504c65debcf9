"""What the subjects do: a language model of given size, a batch of random tokens, a whole training step."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ...checkpoints.models import load_base, load_language_model
from ...recipe import ModelSettings, Quantization
from .subjects import trained_parameters

DEMO_MODEL = Path("~/.cache/doralib/SmolLM2-135M-Instruct")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def base_model(
    model: str | None, layers: int | None, dtype: str, quantization: Quantization | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that every subject adapts, quantized while it is loaded or not, and what it is, for JSON."""
    path = str(DEMO_MODEL.expanduser()) if model is None and DEMO_MODEL.expanduser().is_dir() else model or "smollm2"
    if path not in SHAPES and layers is None:
        loaded = load_base(ModelSettings(path=path, dtype=dtype, quantization=quantization))[0]
        return loaded, _describe(path, loaded.config, "its own")
    config = _config(path)
    if layers is not None:
        _shorten(config, layers)
    torch.manual_seed(0)
    built: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if quantization is not None:
        with tempfile.TemporaryDirectory() as folder:
            built.save_pretrained(folder)
            built = load_language_model(ModelSettings(path=folder, dtype=dtype, quantization=quantization))
    return built, _describe(path, config, "random")


def token_batch(vocab_size: int, sequences: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens, each of them a label; the same for every subject."""
    ids = torch.randint(vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


class TrainingStep:
    """Forward with labels, backward, AdamW on what is trained, gradients dropped."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], *, checkpointing: bool = False) -> None:
        self.model, self.batch = model.train(), batch
        model.config.use_cache = False  # type: ignore[union-attr]
        if checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        parameters = trained_parameters(model)
        # as transformers.Trainer chooses it
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def __call__(self) -> float:
        """The loss before the step."""
        loss: Tensor = self.model(**self.batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def state_bytes(self) -> int:
        """Memory of the optimizer between steps."""
        states = self.optimizer.state.values() if self.optimizer is not None else []
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))


def _config(path: str) -> PretrainedConfig:
    if path in SHAPES:
        return LlamaConfig(**SHAPES[path], pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if Path(path).is_dir():
        return AutoConfig.from_pretrained(path)
    return load_base(ModelSettings(path=path))[0].config


def _shorten(config: PretrainedConfig, layers: int) -> None:
    share = layers / config.num_hidden_layers
    config.num_hidden_layers = layers
    config.vocab_size = max(64, round(config.vocab_size * share / 64) * 64)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None


def _describe(path: str, config: PretrainedConfig, weights: str) -> dict[str, Any]:
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "model": path,
        "weights": weights,
        **{name: getattr(config, name, None) for name in (*fields, "vocab_size", "tie_word_embeddings")},
        "attention": getattr(config, "_attn_implementation", None),
    }
