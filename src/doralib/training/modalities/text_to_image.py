"""Pictures with captions: a diffusion pipeline learns to draw what they show."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from ...adapters.adapt import disabled
from ...adapters.fsdp import gather
from ...adapters.registry import config_of, state_of
from ...checkpoints.models import Loaded
from ...checkpoints.pipelines import (
    add_tokens,
    list_modules,
    load_pipeline,
    make_empty_pipeline,
    read_pipeline_index,
)
from ...config import DoraConfig
from ...data.captioned import (
    FittedPicture,
    fit_picture,
    list_hashes,
    list_pictures,
    open_captioned,
    read_caption,
    read_pictures,
)
from ...data.pictures import encode_thumbnail
from ...data.prepare import BadRow, PreparedRows, Row, RowNumber, RowReport, Sample
from ...data.rows import RawRows
from ...disk import replacing
from ...errors import UsageError
from ...evaluation.pictures import Drawing, draw_pictures
from ...files import hash_texts, write_tensors
from ...formats import FORMATS
from ...formats.base import Hints
from ...formats.files import write_raw_adapter
from ...progress import Tick
from ...recipe import DataSettings, DiffusionSettings, ModelSettings, Recipe
from ..diffusion.families import DiffusionFamily, find_family, list_encoder_targets
from ..diffusion.model import TextToImage
from ..diffusion.sizes import choose_size, list_sizes
from ..distributed import is_main
from ..modality import Collate, Prepared

log = logging.getLogger(__name__)

_SAMPLES = 4


# by what diffusers' scripts call them
_EMBEDDINGS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass
class Gallery:
    """A pipeline, and all pictures and captions as its network takes them; where other models have a tokenizer."""

    pipeline: Any
    latents: list[Tensor] = field(default_factory=list)
    """Of each picture: mean and deviation, (2, C, h, w)."""
    sizes: list[list[int]] = field(default_factory=list)
    """Of each picture, as SDXL is told them."""
    captions: list[str] = field(default_factory=list)
    """All different ones."""
    numbers: list[int] = field(default_factory=list)
    """The number of each picture's caption."""
    conditions: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each caption; empty where captions are encoded anew at each step."""
    _places: dict[str, int] = field(default_factory=dict)
    """The number of each caption, by itself."""

    def add(self, picture: FittedPicture, caption: str, latents: Tensor) -> int:
        """Add a picture; returns its number."""
        if caption not in self._places:
            self._places[caption] = len(self.captions)
            self.captions.append(caption)
        self.numbers.append(self._places[caption])
        self.latents.append(latents)
        self.sizes.append(picture.sizes)
        return len(self.latents) - 1

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write nothing: what was loaded stays where it was."""


@dataclass
class Pictures:
    """The functions of a modality, for one recipe."""

    recipe: Recipe

    @property
    def settings(self) -> DiffusionSettings:
        """Of the recipe."""
        return self.recipe.diffusion

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The pictures, once all that the recipe says of them goes with the pipeline."""
        family, asked = self._find_family(), self.settings
        wrong = {
            "snr_gamma is for models that learn noise": family.flow and asked.snr_gamma is not None,
            "time_weighting is for models that learn flow": not family.flow and asked.time_weighting is not None,
            "class_images goes with diffusion.class_prompt": asked.class_prompt is None and bool(asked.class_images),
        }
        if problems := [f"diffusion.{text}; leave it out" for text, is_wrong in wrong.items() if is_wrong]:
            raise UsageError("\n".join(problems))
        self._list_sizes()
        return read_pictures(settings, seed)

    def hash_rows(self, rows: RawRows) -> dict[str, str]:
        """The hash of all pictures and captions."""
        return {"pictures and captions": hash_texts(list_hashes(rows))}

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The network that is trained, with its text encoders if those are too; and the pipeline."""
        family = self._find_family()
        wanted = [family.network, *(family.encoders if self.settings.text_encoders or settings.new_tokens else ())]
        pipeline = (
            make_empty_pipeline(settings) if empty else load_pipeline(settings, family.network, self.settings.vae)
        )
        modules = list_modules(pipeline)
        parts = {name: modules[name] for name in wanted if name in modules}
        return TextToImage(family, pipeline, parts, self.settings, settings.path), Gallery(pipeline)

    def configure(self, model: nn.Module, processor: Any, config: DoraConfig) -> DoraConfig:
        """The adapter's settings with the family's layers where none are named, those of text encoders, new tokens."""
        family = self._find_family()
        targets = family.targets if config.target_modules is None else config.target_modules
        if self.settings.text_encoders and isinstance(targets, tuple):
            targets = tuple(dict.fromkeys((*targets, *list_encoder_targets(model, family))))
        changes: dict[str, Any] = {"target_modules": targets}
        tokens = self.recipe.model.new_tokens
        if tokens:
            encoders = [name for name in family.encoders if hasattr(model, name)]
            ids = add_tokens(processor.pipeline, tokens, encoders)
            changes["trainable_token_indices"] = {_name_embedding(model, name): ids[name] for name in encoders}
        return config.model_copy(update=changes)

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: Any, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """Latents of every usable picture and, where text encoders are not trained, conditions of every caption."""
        making = _Making(model, processor, self._list_sizes(), tick)
        train = making.add_rows(rows.train, rows.train_numbers, settings)
        samples = [Sample(caption, text) for caption, text in making.shown.items()]
        held = (
            making.add_rows(rows.validation, rows.validation_numbers, settings) if rows.validation is not None else None
        )
        if (prompt := self.settings.class_prompt) is not None:
            drawn = [] if making.is_empty else self._draw_class(model, processor)
            first = [making.add(fit_picture(each, choose_size(each, making.sizes)), prompt) for each in drawn] or [0]
            paired = [first[i % len(first)] for i in range(len(train.rows))]
            train = PreparedRows(train.rows.remove_columns("prior").add_column("prior", paired), train.report)
        making.finish()
        if unused := [
            token for token in self.recipe.model.new_tokens if not any(token in c for c in processor.captions)
        ]:
            raise UsageError(
                f"model.new_tokens: {', '.join(map(repr, unused))} stands in no caption, such as "
                f"{processor.captions[0]!r}; put it into data.prompt or data.instance_prompt"
            )
        shapes = sorted({tuple(sizes[4:]) for sizes in processor.sizes})
        told = {"sizes": ", ".join(f"{h} x {w}" for h, w in shapes) + " pixels"}
        samples = [Sample(prompt, "") for prompt in self.settings.sample_prompts] + samples
        order = "group_by_length" if len(shapes) > 1 else "random"
        return Prepared(train, held, samples, told, unit="pictures", order=order)

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Pictures, with one of the class beside each where there are such."""
        return lambda rows: _collate(processor, rows)

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, str]],
    ) -> list[str]:
        """What the pipeline draws to each prompt, as texts that a page shows."""
        drawing = Drawing(self.settings.sample_steps, size=self._list_sizes()[0], seed=self.recipe.seed)
        prompts, device = [each["prompt"] for each in asked], next(model.parameters()).device
        return [encode_thumbnail(each) for each in draw_pictures(processor.pipeline, prompts, drawing, device)]

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter as diffusers reads it, beside PEFT's files."""
        form = FORMATS["diffusers"]
        assert form.write is not None
        config, state = config_of(model), gather(state_of(model))
        if is_main():
            raw = form.write(config.in_files(), replace(state, rows={}), Hints())
            write_raw_adapter(raw, form, folder / form.tensors_file, overwrite=True)
            if state.rows:
                rows = {_EMBEDDINGS[name.partition(".")[0]]: each.rows_ND for name, each in state.rows.items()}
                write_tensors(folder / f"{folder.name}_emb.safetensors", rows)

    def _find_family(self) -> DiffusionFamily:
        path = self.recipe.model.path
        return find_family(read_pipeline_index(path), path)

    def _list_sizes(self) -> list[tuple[int, int]]:
        return list_sizes(self.settings, self._find_family())

    def _draw_class(self, model: nn.Module, gallery: Gallery) -> Iterator[Any]:
        """Pictures of the class: those in its folder, and as many as are lacking, drawn by the untouched model."""
        asked = self.settings
        folder = Path(asked.class_images).expanduser() if asked.class_images else None
        there = list_pictures(folder)[: asked.num_class_images] if folder and folder.is_dir() else []
        yield from (open_captioned({"picture": str(file)}) for file in there)
        if lacking := asked.num_class_images - len(there):
            log.info(f"drawing {lacking} pictures of {asked.class_prompt!r}")
        size, device = self._list_sizes()[0], next(model.parameters()).device
        for i in range(len(there), asked.num_class_images):
            drawing = Drawing(asked.sample_steps, size=size, seed=self.recipe.seed + i)
            with disabled(model):
                (picture,) = draw_pictures(gallery.pipeline, [str(asked.class_prompt)], drawing, device)
            if folder and is_main():
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / f"{i:05}.png") as part:
                    picture.save(part, "png")
            yield picture


def _name_embedding(model: nn.Module, part: str) -> str:
    """The whole name of a text encoder's table of tokens."""
    encoder: Any = model.get_submodule(part)
    table = encoder.get_input_embeddings()
    return next(f"{part}.{name}" for name, module in encoder.named_modules() if module is table)


class _Making:
    """Fills a gallery."""

    def __init__(self, model: Any, gallery: Gallery, sizes: Sequence[tuple[int, int]], tick: Tick | None) -> None:
        self.model, self.gallery, self.sizes, self.tick = model, gallery, sizes, tick
        self.device = next(model.parameters()).device
        self.shown: dict[str, str] = {}
        """Some captions with the picture of each."""
        # in 16 bits SDXL's overflows; diffusers' own `to` would warn of such a cast
        self.vae, self.dtype = gallery.pipeline.vae, gallery.pipeline.vae.dtype
        nn.Module.to(self.vae, self.device, torch.float32)

    @property
    def is_empty(self) -> bool:
        """Whether there are no weights to encode with."""
        return self.device.type == "meta"

    def add_rows(self, rows: datasets.Dataset, numbers: Sequence[RowNumber], settings: DataSettings) -> PreparedRows:
        """Add every usable row.

        Raises:
            UsageError: if there is none.
        """
        report, kept = RowReport(len(rows)), list[int]()
        for number, row in zip(numbers, rows, strict=False):
            try:
                caption, picture = read_caption(row), open_captioned(row)
            except BadRow as bad:
                report.drop(number, bad)
                continue
            kept.append(self.add(fit_picture(picture, choose_size(picture, self.sizes)), caption))
            report.kept, report.tokens, report.label_tokens = len(kept), len(kept), len(kept)
            if len(self.shown) < _SAMPLES and caption not in self.shown:
                self.shown[caption] = encode_thumbnail(picture)
            if self.tick is not None:
                self.tick("picture", 1, len(rows), "")
        report.check(settings.bad_rows)
        columns = {"number": kept, "length": list(map(self._count_pixels, kept)), "prior": [-1] * len(kept)}
        return PreparedRows(datasets.Dataset.from_dict(columns), report)

    def add(self, picture: FittedPicture, caption: str) -> int:
        """Add a picture; returns its number."""
        return self.gallery.add(picture, caption, self._encode(picture.pixels_CHW))

    def finish(self) -> None:
        """Encode the captions, unless that is to be learned; what is needed no more leaves the device."""
        model, gallery = self.model, self.gallery
        model.captions = gallery.captions
        if self.is_empty:
            if not model.trains_encoders:
                # of one shape are the conditions of all
                gallery.conditions = [self._encode_caption(gallery.captions[0])] * len(gallery.captions)
                model.empty = model.encode_empty()
            return
        nn.Module.to(self.vae, "cpu", self.dtype)
        encoders = [part for name, part in list_modules(gallery.pipeline).items() if name.startswith("text_encoder")]
        for part in encoders:
            part.to(self.device)
        if model.trains_encoders:
            # T5, which is not, is asked at each step too
            return
        with torch.no_grad():
            for caption in gallery.captions:
                found = self._encode_caption(caption)
                gallery.conditions.append({name: value.cpu() for name, value in found.items()})
            model.empty = model.encode_empty()
        for part in encoders:
            part.to("cpu")

    @torch.no_grad()
    def _encode_caption(self, caption: str) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.model.encode([caption]).items()}

    @torch.no_grad()
    def _encode(self, pixels_CHW: Tensor) -> Tensor:
        """Mean and deviation of a picture's latents, scaled as the network takes them; (2, C, h, w)."""
        config = self.vae.config
        found = self.vae.encode(pixels_CHW[None].to(self.device, torch.float32)).latent_dist
        mean, deviation = found.mean[0], found.std[0]
        own = [getattr(config, name, None) for name in ("latents_mean", "latents_std")]
        given = own if all(own) else [[getattr(config, "shift_factor", None) or 0.0], [1.0]]
        shift, spread = (torch.tensor(each, device=mean.device).view(-1, 1, 1) for each in given)
        scale = config.scaling_factor / spread
        latents = torch.stack([(mean - shift) * scale, deviation * scale])
        return latents if self.is_empty else latents.cpu()

    def _count_pixels(self, number: int) -> int:
        """By which pictures of one shape come together."""
        *_, height, width = self.gallery.sizes[number]
        return height * width


def _collate(gallery: Gallery, rows: Sequence[Row]) -> dict[str, Any]:
    own = [row["number"] for row in rows]
    prior = [row["prior"] for row in rows if row["prior"] >= 0]
    numbers = own + prior
    captions = [gallery.numbers[i] for i in numbers]
    batch: dict[str, Any] = {
        # the first says to the Trainer how many there are
        "rows_B": torch.tensor(numbers),
        "labels": [gallery.latents[i] for i in numbers],
        "captions_B": torch.tensor(captions),
        "sizes_B6": torch.tensor([gallery.sizes[i] for i in numbers]),
        "prior_B": torch.tensor([False] * len(own) + [True] * len(prior)),
        "num_tokens": torch.tensor(len(numbers)),
    }
    if gallery.conditions:
        found = [gallery.conditions[i] for i in captions]
        batch["conditions"] = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    return batch
