"""One trial of a model that another tool has quantized: the start, the curve beside its dense twin's, and the merge."""

from collections.abc import Callable
from typing import Any

import torch

import doralib

CONFIG = doralib.DoraConfig(r=4, target_modules=("q_proj", "v_proj", "down_proj"))
STEPS = 6


def try_storage(load: Callable[[], Any]) -> dict[str, Any]:
    """What came out, as numbers; `load` makes the model, always the same one."""
    torch.manual_seed(0)
    model = load()
    ids = torch.randint(3, model.config.vocab_size, (3, 16))
    untouched = model(input_ids=ids).logits
    adapt(model)
    layer = model.model.layers[0].self_attn.q_proj
    found = {
        "storage": type(layer.base_layer).__name__,
        "start is exact": torch.equal(model(input_ids=ids).logits, untouched),
        "gain at the start": (layer.gain() - 1).abs().max().item(),
    }
    # of layers that all are plain, with the weights that the storage has
    twin = doralib.merge(adapt(load()), dequantise=True)
    found["plain at the start"] = (twin(input_ids=ids).logits - untouched).abs().max().item()
    found["losses"], found["dense losses"] = train(model, ids), train(adapt(twin), ids)
    trained = model(input_ids=ids).logits
    doralib.merge(model, dequantise=True)
    return found | {"merged": (model(input_ids=ids).logits - trained).abs().max().item()}


def adapt(model: Any) -> Any:
    """With the same A each time."""
    torch.manual_seed(1)
    return doralib.adapt(model, CONFIG)


def train(model: Any, ids: torch.Tensor) -> list[float]:
    """The losses of some steps."""
    optimizer, losses = torch.optim.AdamW(doralib.parameter_groups(model, learning_rate=1e-2)), []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses
