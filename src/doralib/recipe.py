"""The settings of a run: model, data, evaluation; the keys of a recipe file."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_serializer, model_validator

from .config import Checked, DoraConfig

PROMPT_FILE = "doralib_prompt.json"
"""Says, beside what was trained, in which form it was asked."""
SERIES_FILE = "doralib_series.json"
"""The same of a model of series."""

Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-float8"]
"""What frozen weights are quantized to while they are loaded: by bitsandbytes, or by torchao."""


class VisualSettings(Checked):
    """What a model of kind vl-bart sees: features that some vision model made of pictures or frames."""

    features: int = Field(default=2048, ge=1, lt=2**20)
    """Numbers of a feature."""
    tokens: int = Field(default=36, ge=1, le=100)
    """Features of a picture or video; a larger grid, or more frames, are pooled to as many."""
    images: int = Field(default=2, ge=1, le=100)
    """Pictures that one row may have."""
    boxes: bool = False
    """Whether each feature comes with its place in the picture, the cell of a square grid. The published models of
    grids were trained without."""

    @model_validator(mode="after")
    def _have_cells(self) -> Self:
        if self.boxes and math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"boxes are those of a square grid, and {self.tokens} tokens make none")
        return self


ModelKind = Literal[
    "auto",
    "causal",
    "classify",
    "tokens",
    "seq2seq",
    "vl-bart",
    "image-text",
    "speech",
    "audio-class",
    "forecast",
    "text-to-image",
]


class ModelParts(Checked):
    """What a LLaVA is composed of, each a hub name or a folder."""

    language: str = Field(min_length=1)
    """A causal language model."""
    vision: str = Field(min_length=1)
    """CLIP, or another vision transformer with a class token."""
    projector: str | None = None
    """LLaVA's own mm_projector.bin, or .safetensors; null: it starts at random, by the seed."""
    layer: int = Field(default=-2, ge=-1000, le=1000)
    """The layer of the vision tower whose patches the projector gets."""


class ModelSettings(Checked):
    """Which model, and how it is held in memory."""

    path: Annotated[str, BeforeValidator(lambda value: "" if value is None else value)] = ""
    """Hub name, folder, or a .gguf file, which transformers dequantises; or else parts."""
    parts: ModelParts | None = None
    """In place of a path: what the model is composed of, once for all runs of the same parts."""
    kind: ModelKind = "auto"
    """causal: a language model; classify, tokens: a head gives each text, or each word, one of the labels in the data;
    seq2seq: an encoder reads a text, and a decoder writes another; vl-bart: a BART that reads features of pictures or
    videos too; image-text: text about pictures; speech: text for a sound; audio-class: a label for a sound; forecast:
    series over time; text-to-image: a diffusion pipeline; auto: as a local model's config.json or model_index.json
    says, else causal."""
    visual: VisualSettings = VisualSettings()
    """vl-bart: the features that it reads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as stored."""
    quantization: Quantization | None = None
    """Quantize the frozen weights while loading, by bitsandbytes or torchao; null: as stored, which may be quantized
    too."""
    double_quantization: bool = True
    """With nf4 and fp4: quantize the scales too, which saves 0.4 bits a weight."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2 ...; null: transformers' choice."""
    trust_remote_code: bool = False
    """Run the code that comes with a model."""
    allow_nonfinite: bool = False
    """Take a model whose weights hold NaN or infinite numbers."""
    new_tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary; their rows of the embedding, and of the head, are trained beside the adapter."""

    @model_validator(mode="before")
    @classmethod
    def _know_composed(cls, values: Any) -> Any:
        """Composed models take pictures and text."""
        if isinstance(values, dict) and values.get("parts") and values.get("kind", "auto") == "auto":
            return {**values, "kind": "image-text"}
        return values

    @model_validator(mode="after")
    def _name_one(self) -> Self:
        checks = {
            "path and parts are two ways to name the model; give one of them, and null for the other": bool(
                self.path and self.parts
            ),
            "path: which model? give a hub name, a folder or a .gguf file": not (self.path or self.parts),
            f"parts make a model of kind image-text, not {self.kind}": (
                self.parts is not None and self.kind != "image-text"
            ),
            "revision goes with path; parts are taken as they are": bool(self.parts and self.revision),
        }
        if problems := [text for text, wrong in checks.items() if wrong]:
            raise ValueError("; ".join(problems))
        return self

    @field_serializer("path")
    def _leave_out_composed(self, path: str) -> str:
        """Where parts were composed is no setting: it follows from them."""
        return "" if self.parts else path

    def describe(self) -> str:
        """Which model, for a person."""
        if self.parts is None:
            return self.path
        return f"{self.parts.language} with {self.parts.vision}"

    def with_whole_path(self) -> Self:
        """The same with places from the root; a hub name stays."""
        place = lambda name: str(path.absolute()) if (path := Path(name).expanduser()).exists() else name
        if self.parts is None:
            return self.model_copy(update={"path": place(self.path)})
        named = {name: place(value) for name, value in self.parts if isinstance(value, str)}
        return self.model_copy(update={"parts": self.parts.model_copy(update=named)})


class DataSource(Checked):
    """One of several sets of rows to train on."""

    path: str
    """As data.train: a file, a folder, a pattern or a hub name."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often an epoch shows each row: 2 is twice, 0.5 shows half of the rows, drawn by the seed."""
    split: str | None = None
    """null: as data.split."""
    style: str | None = None
    """null: the group's; a set that has any of style, prompt, target and messages takes none of them from the group."""
    prompt: str | None = None
    """As data.prompt."""
    target: str | None = None
    """As data.target."""
    messages: str | None = None
    """As data.messages."""


class SeriesSettings(Checked):
    """Where series over time stand in the data, and what is forecast of them."""

    name: str | None = None
    """The column that names the series; null: series, unique_id, item_id or another usual name, if there is one."""
    time: str | None = None
    """The column of times; null: time, ds, date or another usual name; without one values stand in their order."""
    value: str | None = None
    """The column of values; null: value, y, target or values; without one each column, or each row, is a series."""
    context: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """So many values are looked back on; null: as many as the model takes and the longest series has, at most 512."""
    horizon: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """So many values are forecast; null: as many as the model forecasts at once."""
    stride: int = Field(default=1, ge=1, lt=2**31)
    """Training takes a window of each series at every so many values."""
    season: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Values of a season, which scores compare with; null: by the times, 12 of months, 24 of hours; else 1."""


class DataSettings(Checked):
    """Which rows, how they become prompts and targets, and what counts in the loss."""

    train: str | Annotated[tuple[DataSource | str, ...], Field(min_length=1)]
    """A .json, .jsonl, .csv, .tsv, .tsf, .txt or .parquet file, a folder or pattern of such (`rows/*.jsonl`), a hub
    name (`name`, `name:config`), or a list of several, each with its weight: [{path: a.jsonl, weight: 2}, b.csv];
    `reasoning-gym:TASK?setting=value` makes problems by that package."""
    split: str = "train"
    """The split of a hub data set, or of a JSON file that holds several."""
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    """A file, folder, pattern or hub name, or a fraction taken out of each set of train."""
    validation_split: str = "validation"
    """The split, where validation is a hub data set."""
    style: str = "auto"
    """What a row is: completion, alpaca, chat, text; auto: what its columns say."""
    prompt: str | None = None
    """completion: a column's name, or a template with {column}."""
    target: str | None = None
    """completion, text: a column's name, or a template with {column}."""
    messages: str = "messages"
    """chat: the column of [{role, content}, ...] or [{from, value}, ...]."""
    max_length: int = Field(default=512, ge=2, lt=2**31)
    """Tokens of one row, prompt and target together."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss: the answer's, or all."""
    bad_rows: Literal["report", "error"] = "report"
    """Rows too long, empty or malformed: left out, counted and shown, or an error."""
    too_long: Literal["skip", "truncate", "split"] | None = None
    """skip: leave the row out; truncate: keep its first max_length tokens; split: make several rows of it; each is
    counted and shown. null: split with style text, skip elsewhere."""
    limit: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Only the first rows of each set of train."""
    documents: Literal["line", "paragraph", "file"] | None = None
    """What is a row of a .txt file: a line, a paragraph between blank lines, or the whole file; null: the whole file if
    it has blank lines, else a line."""
    images: str | None = None
    """image-text, text-to-image: the column of pictures; null: the first of the usual names, or one that holds names of
    pictures."""
    videos: str | None = None
    """image-text: the column of videos; null: one of the usual names, or one that holds names of videos."""
    video_frames: int = Field(default=8, ge=1, le=1024)
    """image-text: so many frames of a video are seen, evenly apart; all of one that has fewer."""
    root: str | None = None
    """The folder in which relative names of pictures, videos and sounds begin; null: that of the file of rows."""
    image_pixels: Annotated[int, Field(ge=1, lt=2**31)] | None = 448
    """image-text: a picture with a longer side is made smaller before the model's processor gets it; null: never."""
    instance_prompt: str | None = None
    """text-to-image: the caption of each picture that has none of its own."""
    packing: bool | None = None
    """Fill sequences of max_length with several rows, none of which sees the others; null: only with style text."""
    layout: Literal["auto", "messages", "llava", "caption", "vqa", "vlbart", "value"] = "auto"
    """image-text: what a row is: a conversation (messages; llava is the same), a picture with its caption, or a
    question with its answer; auto: what its columns say. vl-bart: train, and validation, are folders of several tasks:
    vlbart has VL-T5's of pictures, value those of VALUE, of videos, which image-text takes too; validation_split is
    validation or test."""
    audio: str = "audio"
    """speech, audio-class: the column of the files of sounds (wav, flac, ogg, mp3); or of sounds, as data sets hold
    them."""
    audio_seconds: Annotated[int, Field(ge=1, lt=3600)] | None = None
    """The longest sound. Whisper hears so many seconds then in place of 30, which takes less time, and has to learn
    where a text ends in so short a window; it belongs to what was trained."""
    translate: bool = False
    """speech: the targets are English, whatever is spoken; Whisper's second task."""
    language: str | None = None
    """seq2seq: the language of the targets, speech: the one that is spoken; by the tokenizer's own word for it, such as
    ron_Latn of NLLB, ro_RO of mBART, ro of Whisper."""
    source_language: str | None = None
    """seq2seq: the language of the prompts, where the tokenizer marks it."""
    series: SeriesSettings = SeriesSettings()
    """Of series over time (model.kind forecast) alone."""
    tasks: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(default={})
    """vl-bart: the tasks, and how many rows a batch of each has over training.per_device_train_batch_size, as in
    {vqa: 1, nlvr: 0.33}; none: all of the layout, in batches alike."""
    features: str | None = None
    """vl-bart: the folder of features below each task's own; null: as it is published."""

    @property
    def has_tasks(self) -> bool:
        """Whether the rows are of several tasks, in a folder that is laid out for them."""
        return self.layout in ("vlbart", "value")

    def sources(self) -> list[DataSource]:
        """The sets of rows to train on, one where `train` is a name."""
        given = (self.train,) if isinstance(self.train, str) else self.train
        return [DataSource(path=each) if isinstance(each, str) else each for each in given]

    def of_source(self, source: DataSource) -> Self:
        """The settings that hold for one set of rows alone; its path is `train`."""
        own = {name: getattr(source, name) for name in ("style", "prompt", "target", "messages")}
        if any(own.values()):
            defaults = {name: type(self).model_fields[name].default for name in own}
            own = {name: value or defaults[name] for name, value in own.items()}
        else:
            own = {}
        return self.model_copy(update={**own, "train": source.path, "split": source.split or self.split})


class ObjectiveSettings(Checked):
    """What training makes better."""

    kind: Literal["sft", "dpo", "orpo", "kto", "grpo"] = "sft"
    """sft: how likely the rows' answers are; dpo, orpo, kto: answers that were preferred, over others; grpo: what
    reward functions say of the model's own answers. All but sft are TRL's, whose settings `training` takes too."""
    rewards: tuple[str, ...] = ()
    """grpo: number, format, or functions of yours, each as module.function."""


class DiffusionSettings(Checked):
    """How a diffusion pipeline learns pictures (model.kind text-to-image)."""

    resolution: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Pixels of a side; null: what the model was made for."""
    buckets: str | None = None
    """Sizes of which each picture gets the one nearest to its shape, "height,width;height,width", or auto for eleven
    shapes of as many pixels; null: squares."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a picture is learned without its caption."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weigh each time step by min(SNR, gamma) (arXiv 2303.09556); null: all alike."""
    noise_offset: float = Field(default=0.0, ge=0)
    """So much noise that is the same over a whole channel, for very dark and bright pictures."""
    time_weighting: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] | None = None
    """sd3, flux: which time steps are drawn, or weighed, more; null: as the model was trained."""
    guidance: float = Field(default=3.5, ge=0)
    """flux: the guidance that its distilled model is told in training."""
    text_encoders: bool = False
    """Adapt the CLIP text encoders too."""
    text_encoder_lr_ratio: float = Field(default=1.0, gt=0, le=1e6)
    """Learning rate of text encoders and new tokens over that of the network."""
    new_tokens_share: float = Field(default=1.0, gt=0, le=1)
    """The share of training after which model.new_tokens stay as they are."""
    class_prompt: str | None = None
    """Prior preservation: a prompt without the new word, whose pictures are learned beside each of yours."""
    class_images: str | None = None
    """The folder of those pictures; what it lacks is drawn by the untouched model and put there. null: none is kept."""
    num_class_images: int = Field(default=100, ge=1, lt=2**31)
    """How many of them."""
    prior_weight: float = Field(default=1.0, gt=0)
    """Their weight in the loss."""
    vae: str | None = None
    """Another VAE than the pipeline's, a folder or hub name."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the report's pictures, besides some captions."""
    sample_steps: int = Field(default=25, ge=1, lt=1000)
    """Steps of each of the report's pictures."""


class EvalSettings(Checked):
    """What is measured before and after training."""

    tasks: tuple[str, ...] = ()
    """Names of packaged tasks, or task files in YAML."""
    before: bool = True
    """Score the untouched model too, so that the report shows both."""
    limit: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Only the first examples of each task."""
    batch_size: int = Field(default=16, ge=1, lt=2**31)
    """Examples at a time."""


class DistributedSettings(Checked):
    """How several processes (torchrun, accelerate launch) share a run; one process takes no notice of it."""

    strategy: Literal["launcher", "ddp", "fsdp2", "zero2", "zero3"] = "launcher"
    """launcher: as the launcher's own settings say, else ddp; ddp: each process holds the model; fsdp2, zero3: each
    holds a share of it; zero2: of gradients and optimizer alone. zero2 and zero3 are DeepSpeed's, and planned only."""
    cpu_offload: bool = False
    """fsdp2: keep the shares in the CPU's memory."""


class Recipe(Checked):
    """One fine-tuning job, complete; the keys of a recipe file."""

    model: ModelSettings
    data: DataSettings
    adapter: DoraConfig = DoraConfig()
    objective: ObjectiveSettings = ObjectiveSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    training: dict[str, Any] = Field(default={})
    """Fields of `transformers.TrainingArguments`, by their own names; checked by the recipe that runs them. With
    another objective than sft those of TRL's arguments, such as beta."""
    eval: EvalSettings = EvalSettings()
    distributed: DistributedSettings = DistributedSettings()
    out: str = Field(min_length=1)
    """The run's folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of A, of the order of rows, and of everything else that is drawn."""

    def to_yaml(self) -> str:
        """Every setting, in the order of the fields; it reads as the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.model.quantization and self.adapter.method == "full":
            raise ValueError("method full trains the weights themselves, which model.quantization freezes")
        if self.model.kind in ("classify", "tokens", "audio-class") and self.adapter.has_bank:
            raise ValueError(f"method {self.adapter.method!r} has no place for the head of a classifier")
        if self.model.new_tokens and self.adapter.method not in ("dora", "lora"):
            raise ValueError(f"model.new_tokens go with methods dora and lora, not with {self.adapter.method!r}")
        if self.model.kind == "text-to-image" and self.adapter.method not in ("dora", "lora"):
            raise ValueError(f"model.kind text-to-image goes with methods dora and lora, not {self.adapter.method!r}")
        if problems := self._find_wrong_objective() + self._find_wrong_layout():
            raise ValueError("; ".join(problems))
        return self

    def _find_wrong_layout(self) -> list[str]:
        data, visual, told = self.data, self.model.kind == "vl-bart", f"data.layout {self.data.layout}"
        films = data.layout == "value" and self.model.kind in ("image-text", "auto")
        readers = "vl-bart or image-text" if data.layout == "value" else "vl-bart"
        checks = {
            "model.kind vl-bart reads folders: set data.layout to vlbart or value": visual and not data.has_tasks,
            f"{told} goes with model.kind {readers}, not {self.model.kind}": data.has_tasks and not (visual or films),
            f"data.tasks and data.features do not go with {told}": (
                bool(data.tasks or data.features) and not data.has_tasks
            ),
            f"data.train is one folder with {told}": data.has_tasks and not isinstance(data.train, str),
            f"method {self.adapter.method!r} has no place for the visual embedding": visual and self.adapter.has_bank,
        }
        return [text for text, wrong in checks.items() if wrong]

    def _find_wrong_objective(self) -> list[str]:
        kind, rewards = self.objective.kind, self.objective.rewards
        checks = {
            "objective.kind grpo needs objective.rewards, such as [number]": kind == "grpo" and not rewards,
            f"objective.rewards are for kind grpo, not {kind}": bool(rewards) and kind != "grpo",
            f"objective.kind {kind} trains a language model, not model.kind {self.model.kind}": (
                kind != "sft" and self.model.kind not in ("auto", "causal")
            ),
            f"data.packing is not for objective.kind {kind}": kind != "sft" and bool(self.data.packing),
            f"data.loss_on is not for objective.kind {kind}": kind != "sft" and self.data.loss_on == "all",
        }
        return [text for text, wrong in checks.items() if wrong]

    def with_whole_path(self) -> Self:
        """The same with the model's place from the root, so that the run finds it from any folder; a hub name stays."""
        return self.model_copy(update={"model": self.model.with_whole_path()})
