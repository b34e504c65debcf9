"""The settings of a run: model, data, evaluation; the keys of a recipe file."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .config import Checked, DoraConfig


class ModelSettings(Checked):
    """Which model, and how it is held in memory."""

    path: str
    """Hub name, folder, or a .gguf file, which transformers dequantises."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as stored."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantize the frozen weights while loading, by bitsandbytes; null: as stored, which may be quantized too."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2 ...; null: transformers' choice."""
    trust_remote_code: bool = False
    """Run the code that comes with a model."""


class DataSettings(Checked):
    """Which rows, how they become prompts and targets, and what counts in the loss."""

    train: str
    """A .json, .jsonl, .csv or .parquet file, or a hub name (`name`, `name:config`)."""
    split: str = "train"
    """The split of a hub data set."""
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    """A file or hub name, or a fraction taken out of train."""
    validation_split: str = "validation"
    """The split, where validation is a hub data set."""
    style: str = "completion"
    """What a row is: completion, alpaca, chat."""
    prompt: str | None = None
    """completion: a column's name, or a template with {column}."""
    target: str | None = None
    """completion: a column's name, or a template with {column}."""
    messages: str = "messages"
    """chat: the column of [{role, content}, ...]."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of one row, prompt and target together."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss: the answer's, or all."""
    bad_rows: Literal["report", "error"] = "report"
    """Rows too long, empty or malformed: left out, counted and shown, or an error."""
    too_long: Literal["skip", "truncate"] = "skip"
    """truncate: keep the first max_length tokens, counted and shown too."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first rows of train."""


class EvalSettings(Checked):
    """What is measured before and after training."""

    tasks: tuple[str, ...] = ()
    """Names of packaged tasks, or task files in YAML."""
    before: bool = True
    """Score the untouched model too, so that the report shows both."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first examples of each task."""
    batch_size: int = Field(default=16, ge=1)
    """Examples at a time."""


class Recipe(Checked):
    """One fine-tuning job, complete; the keys of a recipe file."""

    model: ModelSettings
    data: DataSettings
    adapter: DoraConfig = DoraConfig()
    training: dict[str, Any] = Field(default={})
    """Fields of `transformers.TrainingArguments`, by their own names; checked by the recipe that runs them."""
    eval: EvalSettings = EvalSettings()
    out: str = Field(min_length=1)
    """The run's folder."""
    seed: int = Field(default=0, ge=0)
    """Of A, of the order of rows, and of everything else that is drawn."""

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.model.quantization and self.adapter.method == "full":
            raise ValueError("method full trains the weights themselves, which model.quantization freezes")
        return self
