"""The families of diffusion models: which network is trained, what it is told of a picture, and how it is asked."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError

Conditions = Mapping[str, Tensor]
"""What the network is told of a caption, by name; of several captions stacked."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_ENCODER_LAYER = re.compile(r"(?P<part>\w+)\..*\blayers\.(?P<number>\d+)\.self_attn\.(q_proj|k_proj|v_proj|out_proj)")


@dataclass(frozen=True)
class NoisyBatch:
    """What a network is asked: noisy latents (B, C, h, w), and everything that it is told of them."""

    noisy_BCHW: Tensor
    time_B: Tensor
    conditions: Conditions
    sizes_B6: Tensor
    """SDXL's: height and width of the picture, top and left of its part, height and width of the part; pixels."""
    guidance: float
    """FLUX's."""


@dataclass(frozen=True)
class DiffusionFamily:
    """One kind of pipeline."""

    name: str
    pipelines: tuple[str, ...]
    """Names of diffusers' classes."""
    network: str
    """The part that is trained."""
    encoders: tuple[str, ...]
    """The parts that may be adapted too, all of CLIP's kind."""
    resolution: int
    targets: tuple[str, ...]
    """The layers that are adapted where the recipe names none."""
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    """The conditions of captions, by the pipeline's own encoders."""
    predict: Callable[[nn.Module, NoisyBatch], Tensor]
    """What the network says, (B, C, h, w)."""
    flow: bool = False
    """Whether it learns the flow from a picture to noise; else what its scheduler's prediction_type says."""
    time_weighting: str = "none"
    shortened: tuple[str, ...] = ()
    """The encoders of which nothing sees what their last layer gives."""
    patch: int = 1
    """Latents to a side of what the network sees as one."""


def _encode_sd(pipeline: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _ = pipeline.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)
    return {"embeds": embeds}


def _encode_pooled(pipeline: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    more = {"prompt_2": None, "prompt_3": None} if hasattr(pipeline, "tokenizer_3") else {}
    embeds, _, pooled, _ = pipeline.encode_prompt(
        captions, **more, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"embeds": embeds, "pooled": pooled}


def _encode_flux(pipeline: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(captions, None, device=device, num_images_per_prompt=1)
    return {"embeds": embeds, "pooled": pooled}


def _predict_sd(network: Any, asked: NoisyBatch) -> Tensor:
    return network(asked.noisy_BCHW, asked.time_B, encoder_hidden_states=asked.conditions["embeds"], return_dict=False)[
        0
    ]


def _predict_sdxl(network: Any, asked: NoisyBatch) -> Tensor:
    given = asked.conditions
    added = {"text_embeds": given["pooled"], "time_ids": asked.sizes_B6.to(asked.noisy_BCHW)}
    return network(
        asked.noisy_BCHW,
        asked.time_B,
        encoder_hidden_states=given["embeds"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _predict_sd3(network: Any, asked: NoisyBatch) -> Tensor:
    return network(
        hidden_states=asked.noisy_BCHW,
        timestep=asked.time_B,
        encoder_hidden_states=asked.conditions["embeds"],
        pooled_projections=asked.conditions["pooled"],
        return_dict=False,
    )[0]


def _predict_flux(network: Any, asked: NoisyBatch) -> Tensor:
    """Latents go in as tokens of two by two."""
    noisy, embeds = asked.noisy_BCHW, asked.conditions["embeds"]
    B, C, h, w = noisy.shape
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(noisy)
    tokens = noisy.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)
    guidance = torch.full((B,), asked.guidance).to(noisy) if network.config.guidance_embeds else None
    said = network(
        hidden_states=tokens,
        # diffusers' pipeline gives it so, and the model multiplies it again
        timestep=asked.time_B.to(noisy) / 1000,
        guidance=guidance,
        pooled_projections=asked.conditions["pooled"],
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3).to(noisy),
        img_ids=places,
        return_dict=False,
    )[0]
    return said.view(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)


FAMILIES = (
    DiffusionFamily(
        "sd15", ("StableDiffusionPipeline",), "unet", ("text_encoder",), 512, _ATTENTION, _encode_sd, _predict_sd
    ),
    DiffusionFamily(
        "sdxl",
        ("StableDiffusionXLPipeline",),
        "unet",
        ("text_encoder", "text_encoder_2"),
        1024,
        _ATTENTION,
        _encode_pooled,
        _predict_sdxl,
        shortened=("text_encoder",),
    ),
    DiffusionFamily(
        "sd3",
        ("StableDiffusion3Pipeline",),
        "transformer",
        ("text_encoder", "text_encoder_2"),
        1024,
        _JOINT,
        _encode_pooled,
        _predict_sd3,
        flow=True,
        time_weighting="logit_normal",
        patch=2,
    ),
    DiffusionFamily(
        "flux",
        ("FluxPipeline",),
        "transformer",
        ("text_encoder",),
        1024,
        (*_JOINT, *_FEED_FORWARD),
        _encode_flux,
        _predict_flux,
        flow=True,
        patch=2,
    ),
)


def list_encoder_targets(model: nn.Module, family: DiffusionFamily) -> list[str]:
    """The layers of text encoders that are adapted: of their attention, but where it would be in vain."""
    found = [match for name, _ in model.named_modules() if (match := _ENCODER_LAYER.fullmatch(name))]
    found = [match for match in found if match["part"] in family.encoders]
    last = {part: max((int(m["number"]) for m in found if m["part"] == part), default=-1) for part in family.shortened}
    return [match[0] for match in found if int(match["number"]) != last.get(match["part"])]


def find_family(index: Mapping[str, Any], path: str) -> DiffusionFamily:
    """The family of a pipeline's model_index.json.

    Raises:
        UsageError: if it is none of those that can be trained.
    """
    said = index.get("_class_name")
    found = next((family for family in FAMILIES if said in family.pipelines), None)
    if found is None:
        known = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise UsageError(f"model: {path} is a {said}, and those that can be trained are: {known}")
    return found
