"""The module whose output is the loss of a batch of pictures, for the same Trainer as every other model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...recipe import DiffusionSettings
from .families import Conditions, DiffusionFamily, NoisyBatch
from .noise import Diffusion, Flow

_SEEDS = 2**62


@dataclass(frozen=True)
class _Drawn:
    """What is drawn for one picture."""

    latents_CHW: Tensor
    noise_CHW: Tensor
    time: Tensor
    uncaptioned: bool


class TextToImage(nn.Module):
    """The network of a pipeline, with its text encoders where they are trained too; forward gives the loss.

    Every picture of a batch has a seed of its own, drawn from torch's generator: pictures get the same noise in
    one process or in several, in batches of one shape or of many. In evaluation the seed is the row's number.

    Args:
        pipeline: Its scheduler and encoders are used.
        parts: The modules that are children here, by the names of the pipeline's parts: the network first.
        name: The pipeline's path or hub name.
    """

    def __init__(
        self,
        family: DiffusionFamily,
        pipeline: Any,
        parts: dict[str, nn.Module],
        settings: DiffusionSettings,
        name: str,
    ) -> None:
        super().__init__()
        self.family, self.pipeline, self.settings, self.name_or_path = family, pipeline, settings, name
        self.config = PreTrainedConfig(name_or_path=name)
        self.one_device = True
        """Several GPUs take a process each: torch's DataParallel cannot share out a list of latents."""
        self.captions: list[str] = []
        """Those that `captions_B` counts, where text encoders are trained."""
        for part, module in parts.items():
            self.add_module(part, module)
        weighting, scheduler = settings.time_weighting or family.time_weighting, pipeline.scheduler
        self.process: Diffusion | Flow = (
            Flow(scheduler, weighting) if family.flow else Diffusion(scheduler, settings.snr_gamma)
        )

    @property
    def network(self) -> nn.Module:
        """The part that tells the noise."""
        return self.get_submodule(self.family.network)

    @property
    def trains_encoders(self) -> bool:
        """Whether captions are encoded anew at each step."""
        return any(hasattr(self, name) for name in self.family.encoders)

    def forward(
        self,
        labels: Sequence[Tensor],
        rows_B: Tensor,
        captions_B: Tensor,
        sizes_B6: Tensor,
        prior_B: Tensor,
        conditions: Conditions | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            labels: For each picture the mean and deviation of its latents, (2, C, h, w).
            rows_B: The numbers of the pictures.
            captions_B: The numbers of their captions, int64.
            sizes_B6: As SDXL is told them, in pixels.
            prior_B: Whether a picture is one of the class, and not one of the new thing; bool.
            conditions: Of the captions; None where text encoders are trained.
        """
        if conditions is None:
            conditions = self.encode([self.captions[i] for i in captions_B.tolist()])
        seeds = self._draw_seeds(len(labels)) if self.training else rows_B.tolist()
        drawn = [self._draw(latents, seed) for latents, seed in zip(labels, seeds, strict=True)]
        conditions = self._drop_captions(conditions, [each.uncaptioned for each in drawn])
        losses_B = torch.stack([torch.zeros((), device=labels[0].device)] * len(labels)).to(self._loss_dtype(labels[0]))
        for shape in dict.fromkeys(tuple(each.shape) for each in labels):
            same = [i for i, each in enumerate(labels) if tuple(each.shape) == shape]
            part = {name: value[same] for name, value in conditions.items()}
            losses_B = losses_B.index_put((torch.tensor(same, device=losses_B.device),), self._measure(
                [drawn[i] for i in same], part, sizes_B6[same]
            ))  # fmt: skip
        loss = losses_B[~prior_B].mean()
        if prior_B.any():
            loss = loss + self.settings.prior_weight * losses_B[prior_B].mean()
        return {"loss": loss}

    def _measure(self, drawn: list[_Drawn], conditions: Conditions, sizes_B6: Tensor) -> Tensor:
        """The loss of each of these pictures, whose latents have one shape; (B,)."""
        latents = torch.stack([each.latents_CHW for each in drawn])
        noised = self.process.add(
            latents, torch.stack([each.noise_CHW for each in drawn]), torch.cat([each.time for each in drawn])
        )
        dtype = next(p.dtype for p in self.network.parameters() if p.is_floating_point())
        said = {name: value.to(dtype) for name, value in conditions.items()}
        asked = NoisyBatch(noised.noisy_BCHW.to(dtype), noised.time_B, said, sizes_B6, self.settings.guidance)
        predicted = self.family.predict(self.network, asked)
        wide = self._loss_dtype(latents)
        error_BCHW = predicted.to(wide) - noised.target_BCHW.to(wide)
        return noised.weight_B.to(wide) * error_BCHW.square().flatten(1).mean(dim=1)

    def _loss_dtype(self, latents: Tensor) -> torch.dtype:
        return torch.promote_types(latents.dtype, torch.float32)

    def _draw_seeds(self, count: int) -> list[int]:
        """Seeds of the pictures of this process: all processes draw those of all, and take their own."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        return torch.randint(_SEEDS, (world * count,))[rank * count :][:count].tolist()

    def _draw(self, latents_2CHW: Tensor, seed: int) -> _Drawn:
        generator = torch.Generator().manual_seed(seed)
        mean, deviation = latents_2CHW
        like = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32).to(mean)
        latents = mean + deviation * like(*mean.shape)
        noise = like(*mean.shape)
        if self.settings.noise_offset:
            noise = noise + self.settings.noise_offset * like(len(mean), 1, 1)
        time = self.process.draw_time(generator).to(mean.device)
        chance = self.settings.caption_dropout if self.training else 0.0
        return _Drawn(latents, noise, time, bool(torch.rand((), generator=generator) < chance))

    def encode(self, captions: list[str]) -> Conditions:
        """The conditions of captions; differentiable."""
        device = next(self.parameters()).device
        return self.family.encode(self.pipeline, captions, device)

    def encode_empty(self) -> Conditions:
        """The conditions of no caption, as the pipeline itself has them where it is not guided."""
        found = self.encode([""])
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            return {name: torch.zeros_like(value) for name, value in found.items()}
        return found

    empty: Conditions | None = None
    """The conditions of no caption, where text encoders are not trained."""

    def _drop_captions(self, conditions: Conditions, dropped: list[bool]) -> Conditions:
        if not any(dropped):
            return conditions
        empty = self.encode_empty() if self.empty is None else self.empty
        mask = torch.tensor(dropped)
        return {
            name: torch.where(mask.to(value.device).view(-1, *[1] * (value.dim() - 1)), empty[name].to(value), value)
            for name, value in conditions.items()
        }

    def find_rate_ratio(self, name: str) -> float:
        """The learning rate of a parameter over the network's."""
        return 1.0 if name.startswith(f"{self.family.network}.") else self.settings.text_encoder_lr_ratio

    def hold_still(self, done: float) -> None:
        """Leave new tokens as they are once this share of the training is done: an optimizer passes over what has no
        gradient.
        """
        if done >= self.settings.new_tokens_share:
            for name, p in self.named_parameters():
                if name.endswith("trainable_tokens_delta"):
                    p.grad = None

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **_: Any) -> None:
        """Compute the activations of a block again in the backward pass instead of keeping them."""
        for name, part in self.named_children():
            if name == self.family.network:
                part.enable_gradient_checkpointing()  # type: ignore[operator]
            else:
                part.gradient_checkpointing_enable(activation_checkpointing_kwargs)  # type: ignore[operator]
