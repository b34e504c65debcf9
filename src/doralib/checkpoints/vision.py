"""A vision model of transformers as a maker of features: a grid of a picture, one vector of a frame."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from ..errors import UsageError
from ..hub import split_revision
from .limits import check_sizes

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class VisionEncoder:
    """A model and what makes its inputs of pictures."""

    model: Any
    processor: Any

    def make_grids(self, images: "list[Image]") -> Tensor:
        """What the model's last layer has at each place, (B, H * W, F), row by row from the top.

        Raises:
            UsageError: if the model has no grid.
        """
        inputs = self._prepare(images)
        states = self._see(inputs).last_hidden_state
        if states.dim() == 4:
            return states.flatten(2).transpose(1, 2)
        count = self._count_places(inputs["pixel_values"])
        if count is None or states.shape[1] < count:
            raise UsageError(f"{type(self.model).__name__} has no grid of places; give another vision model")
        # tokens of the whole picture come first
        return states[:, states.shape[1] - count :]

    def make_vectors(self, images: "list[Image]") -> Tensor:
        """One vector of each picture, (B, F): projected beside text where the model has that, else pooled."""
        inputs = self._prepare(images)
        if hasattr(self.model, "get_image_features"):
            with torch.inference_mode():
                found = self.model.get_image_features(**inputs)
            return getattr(found, "pooler_output", found)
        output = self._see(inputs)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        states = output.last_hidden_state
        return states.mean((2, 3)) if states.dim() == 4 else states[:, 0]

    def _prepare(self, images: "list[Image]") -> Any:
        device = next(self.model.parameters()).device
        return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"].to(device)}

    def _see(self, inputs: Any) -> Any:
        # of a model for pictures and texts the part that sees
        seeing = getattr(self.model, "vision_model", self.model)
        with torch.inference_mode():
            return seeing(**inputs)

    def _count_places(self, pixels: Tensor) -> int | None:
        config = getattr(self.model.config, "vision_config", self.model.config)
        patch = getattr(config, "patch_size", None)
        if patch is None:
            return None
        high, wide = patch if isinstance(patch, tuple | list) else (patch, patch)
        return (pixels.shape[-2] // high) * (pixels.shape[-1] // wide)


def load_vision_encoder(path: str) -> VisionEncoder:
    """The vision model in a folder or of a hub name, in float32, on the GPU if there is one.

    Raises:
        UsageError: if it cannot be loaded, or has nothing that makes its inputs of pictures.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, revision = split_revision(path)
    check_sizes(name)
    try:
        # Pillow alone is enough for it, and gives the same numbers everywhere
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
        model = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"--model: {name} cannot be loaded as a vision model: {str(error).strip().splitlines()[0]}\n"
            "  it needs config.json, weights and preprocessor_config.json"
        ) from None
    if not hasattr(model, "vision_model") and getattr(model, "main_input_name", "") != "pixel_values":
        raise UsageError(f"--model: {name} is a {type(model).__name__}, which takes no pictures")
    return VisionEncoder(model.eval().to(device), processor)
