"""The weights in a checkpoint that an adapter changes, a layer at a time, and how long their changed rows are."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .checkpoints import Checkpoint, read_whole
from .errors import DoraError
from .fitting import fit
from .folding import as_rows
from .functional import dense_row_norm
from .packed import PackedLayer, packed_layers
from .state import AdapterState, LayerAdapter


def adapted_lengths(
    checkpoint: Checkpoint, state: AdapterState, packed: Mapping[str, PackedLayer] | None = None
) -> dict[str, Tensor]:
    """Length of each output row of ``W + s B A``, (O,), by layer.

    Raises:
        DoraError: if the adapter does not fit the checkpoint.
    """
    if stacks := [name for name, layer in state.layers.items() if layer.kind == "experts"]:
        raise DoraError(f"stacks of experts have no such form: {', '.join(stacks[:5])}; merge the adapter")
    return {
        name: dense_row_norm(W_OI, *layer.factors, layer.scale)
        for name, layer, W_OI in base_weights(state, checkpoint, packed)
    }


def base_weights(
    state: AdapterState, checkpoint: Checkpoint, packed: Mapping[str, PackedLayer] | None = None
) -> Iterator[tuple[str, LayerAdapter, Tensor]]:
    """Each layer with the rows of its base weight, (O, I), one at a time; of experts the stack, (E, O, I).

    Args:
        packed: the checkpoint's quantised layers, where they have been looked for already.

    Raises:
        DoraError: if the adapter does not fit the checkpoint: everything, at once, before the first.
    """
    packed = packed_layers(checkpoint) if packed is None else packed
    fitted = fit(state, {**checkpoint.slots, **packed}, checkpoint.config())
    # in the same order, by the checkpoint's names, and as wide as its weights
    for name, slots in itertools.groupby(fitted.layers.items(), key=lambda item: fitted.sources[item[0]]):
        rows, layer = [], state.layers[name]
        for slot, part in slots:
            stored = packed[slot].dense() if slot in packed else read_whole(checkpoint.slots[slot])
            rows.append(as_rows(stored, part, transposed=slot in fitted.transposed))
            layer = part if layer.kind != "experts" else layer
        # experts that are kept apart come one after the other
        yield name, layer, rows[0] if len(rows) == 1 else torch.cat(rows).view(layer.shape)
