"""A vocabulary that an adapter was trained with and that the model does not have yet: more tokens, or fewer."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import DoraError, UsageError
from ..layers.wrapper import base_module
from ..state import AdapterState
from .registry import find_record
from .scan import Scan, ask_model


@torch.no_grad()
def fit_vocabulary(found: Scan, state: AdapterState, source: str) -> tuple[Scan, AdapterState]:
    """Give a model as many tokens as the adapter's embeddings have, and put frozen rows that came with it in place.

    The model comes back as it is then, and the adapter without the frozen weights that the model had already.

    Raises:
        UsageError: if the model has adapters already, or does not know how to change its vocabulary.
        DoraError: if new tokens have no values in the adapter.
    """
    model = found.model
    sizes = {name: len(p) for name, p in find_embeddings(model).items()}
    wanted = {name: len(t) for name, t in {**state.extra, **state.resized}.items() if name in sizes}
    for name, rows in state.rows.items():
        last = int(rows.index_N.max()) + 1 if len(rows.index_N) else 0
        if name in sizes and name not in wanted and last > sizes[name]:
            if absent := sorted({*range(sizes[name], last)} - {*rows.index_N.tolist()}):
                raise DoraError(
                    f"{source}: token {absent[0]} is in neither the model nor the adapter, and {last - 1} is"
                )
            wanted[name] = last
    changed = {name: size for name, size in wanted.items() if size != sizes[name]}
    if not changed:
        return found, replace(state, resized={})
    size = next(iter(changed.values()))
    if any(each != size for each in wanted.values()):
        raise DoraError(f"{source}: its embedding and head have different numbers of tokens: {wanted}")
    if find_record(model) is not None:
        have = sizes[next(iter(changed))]
        raise UsageError(f"{source} has {size} tokens, and the model {have}: load it first, into the plain model")
    resize: Callable[..., object] | None = getattr(model, "resize_token_embeddings", None)
    if resize is None:
        raise UsageError(f"{source} has {size} tokens, and this model cannot change its vocabulary")
    resize(size, mean_resizing=False)
    frozen = {name: value for name, value in state.resized.items() if name in changed}
    for name, p in find_embeddings(model).items():
        given = frozen.get(name)
        if given is not None:
            p.copy_(given)
    return Scan(model), replace(state, resized=frozen)


def find_embeddings(model: nn.Module) -> dict[str, Tensor]:
    """The input embedding's and the output head's weights, by every name."""
    found: list[nn.Module] = []
    for module in (ask_model(model, "get_input_embeddings"), ask_model(model, "get_output_embeddings")):
        frozen = None if module is None else base_module(module)
        # of pictures it is no table
        if frozen is not None and isinstance(frozen._parameters.get("weight"), Tensor):
            found.append(frozen)
    return {
        f"{name}.weight": module.get_parameter("weight")
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is each for each in found)
    }
