"""Where what shows pictures to a language model begins: they come out near the words of their captions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.pictures import Picture, open_picture
from ..errors import UsageError
from ..progress import Tick


@torch.no_grad()
def fit_projector(
    model: Any,
    processor: Any,
    captioned: Sequence[tuple[Picture, str]],
    *,
    ridge: float = 0.1,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> float:
    """Fit the last layer of a LLaVA's projector to captions; returns the share of their variance that it explains.

    `fit_linear` gets the mean, over a picture's patches, of what goes into the layer, and the mean embedding of its
    caption's tokens. What is before the layer stays as it is. One pass of the vision tower over the pictures replaces
    the first stage of LLaVA's training where there are few captions and no time.

    Args:
        model: Of class `LlavaForConditionalGeneration`, whose projector is random.
        processor: The model's own.
        captioned: Pictures with captions, at least two of which differ.
        ridge: As for `fit_linear`.
        tick: Gets the pictures that were read since its last call.

    Raises:
        UsageError: if a caption is blank, or all say the same.
        BadRow: if a picture cannot be read.
    """
    captions = {caption.strip() for _, caption in captioned}
    if "" in captions or len(captions) < 2:
        raise UsageError(
            f"a projector is fitted to captions that differ and are not blank; {len(captioned)} pictures have "
            f"{len(captions - {''})} different ones"
        )
    layer: nn.Linear = model.model.multi_modal_projector.linear_2
    table_VH = model.get_input_embeddings().weight
    x_rows: list[Tensor] = []
    y_rows: list[Tensor] = []
    watching = layer.register_forward_pre_hook(
        lambda _, args: x_rows.append(args[0].double().mean(-2).reshape(-1, layer.in_features))
    )
    try:
        for start in range(0, len(captioned), batch_size):
            batch = captioned[start : start + batch_size]
            pixels = processor.image_processor([open_picture(picture) for picture, _ in batch], return_tensors="pt")
            model.model.get_image_features(pixel_values=pixels["pixel_values"].to(layer.weight))
            for _, caption in batch:
                ids = processor.tokenizer(f" {caption}", add_special_tokens=False)["input_ids"]
                y_rows.append(table_VH[ids].double().mean(0))
            if tick is not None:
                tick("fitting the projector", len(batch), len(captioned))
    finally:
        watching.remove()
    return fit_linear(layer, torch.cat(x_rows), torch.stack(y_rows), ridge=ridge)


@torch.no_grad()
def fit_linear(layer: nn.Linear, x_NI: Tensor, y_NH: Tensor, *, ridge: float) -> float:
    """Give a layer the W and b that minimize ``sum |W x + b - y|² + ridge * mean(x²) * N * |W|²``, in float64.

    Means are taken from x and y first, so that W alone is held back.

    Args:
        layer: From I numbers to H.
        x_NI: What goes into it.
        y_NH: What should come out.
        ridge: How much W is held back, where 1 is as much as an average x counts.

    Returns:
        The share of the variance of y that is explained.
    """
    x_NI, y_NH = x_NI.double(), y_NH.double()
    x_I, y_H = x_NI.mean(0), y_NH.mean(0)
    x_NI, y_NH = x_NI - x_I, y_NH - y_H
    held_back = ridge * x_NI.square().mean() * len(x_NI) * torch.eye(len(x_I), dtype=x_NI.dtype, device=x_NI.device)
    W_HI = torch.linalg.solve(x_NI.T @ x_NI + held_back, x_NI.T @ y_NH).T
    layer.weight.copy_(W_HI)
    if layer.bias is not None:
        layer.bias.copy_(y_H - W_HI @ x_I)
    return 1 - ((x_NI @ W_HI.T - y_NH).square().sum() / y_NH.square().sum()).item()
