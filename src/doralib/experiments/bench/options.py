"""Settings of each measurement, checked completely; a text with commas stands for several values."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ...config import Checked


def _split(value: Any) -> Any:
    """``"a,b"`` and a bare value as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return value if isinstance(value, tuple | list) else (value,)


Dtypes = Annotated[tuple[Literal["float32", "bfloat16"], ...], BeforeValidator(_split), Field(min_length=1)]


def _written_as(pattern: str, example: str) -> AfterValidator:
    """A check whose message shows how it is written."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} should be written as {example}")
        return text

    return AfterValidator(check)


Batch = Annotated[
    str, Field(coerce_numbers_to_str=True), _written_as(r"([1-9]\d*x)?[1-9]\d*", "SEQUENCESxTOKENS, such as 4x256")
]
Shape = Annotated[str, _written_as(r"[1-9]\d*x[1-9]\d*", "OUTxIN, such as 1024x1024")]
Batches = Annotated[
    tuple[Batch, ...],
    BeforeValidator(_split),
    Field(min_length=1),
]
"""Sequences x tokens, or tokens alone."""
Dropouts = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_split), Field(min_length=1)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split), Field(min_length=1)]
Words = Annotated[tuple[str, ...], BeforeValidator(_split), Field(min_length=1)]
Switch = Literal["off", "on", "both"]


class Options(Checked):
    """What every measurement takes."""

    QUICK: ClassVar[dict[str, Any]] = {}
    """Values for a look in seconds; the user's own go before them."""

    rounds: int = Field(default=15, ge=1)
    warmup: int = Field(default=2, ge=0)
    """Rounds that are run and dropped."""


class ModelOptions(Options):
    """What a measurement on a whole model takes."""

    model: str | None = None
    """Folder, .gguf file, hub name, "smollm2" or "tiny" (random weights); null: the demo's model, else "smollm2"."""
    layers: int | None = Field(default=None, ge=1)
    """Shorten the model (random weights), its vocabulary by the same factor: the head keeps its share of the work."""
    dtype: Dtypes = ("float32", "bfloat16")
    r: int = Field(default=16, ge=1)
    subjects: Words | None = None
    """Rows of `subjects.SUBJECTS`; null: those that the case is about."""


class StepOptions(ModelOptions):
    """`bench step`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "tokens": "1x64"}

    tokens: Batches = ("4x256", "1x256")
    dropout: Dropouts = (0.0, 0.05)
    checkpointing: Switch = "off"


class ProfileOptions(ModelOptions):
    """`bench profile`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "warmup": 1, "layers": 2, "tokens": "1x64", "dtype": "float32"}

    rounds: int = Field(default=5, ge=1)
    tokens: Batches = ("1x256",)
    dropout: Dropouts = (0.0,)


class AccelerateOptions(StepOptions):
    """`bench accelerate`."""

    tokens: Batches = ("4x256",)


class MemoryOptions(ModelOptions):
    """`bench memory`; a round is a fresh process for each subject."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "layers": 2, "tokens": "1x64", "dtype": "float32"}

    rounds: int = Field(default=2, ge=1)
    warmup: int = Field(default=0, ge=0)
    tokens: Batches = ("4x256",)
    dropout: Dropouts = (0.0,)
    checkpointing: Switch = "both"


class RankOptions(ModelOptions):
    """`bench rank`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "tokens": "1x64", "ranks": "8,32"}

    layers: int | None = Field(default=4, ge=1)
    dtype: Dtypes = ("float32",)
    tokens: Batches = ("4x256",)
    ranks: Ranks = (8, 32, 128, 512)


class GenerateOptions(ModelOptions):
    """`bench generate`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "prompt": 8, "new": 8}

    rounds: int = Field(default=9, ge=1)
    warmup: int = Field(default=1, ge=0)
    prompt: int = Field(default=32, ge=1)
    """Tokens read before the clock starts."""
    new: int = Field(default=32, ge=1)
    """Tokens written one by one."""
    batch: int = Field(default=1, ge=1)


class LayerOptions(Options):
    """`bench layer`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "shapes": "64x48", "tokens": "32", "dtype": "float32"}

    rounds: int = Field(default=31, ge=1)
    shapes: Annotated[tuple[Shape, ...], BeforeValidator(_split), Field(min_length=1)] = (
        "1024x1024",
        "576x576",
        "192x576",
        "1536x576",
        "576x1536",
    )
    """Out x in."""
    dtype: Dtypes = ("float32", "bfloat16")
    tokens: Batches = ("2048", "256")
    dropout: Dropouts = (0.0, 0.05)
    r: int = Field(default=16, ge=1)
    subjects: Words | None = None


class AdaptOptions(Options):
    """`bench adapt`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "warmup": 0, "layers": 2, "real_layers": 1, "divide": 16}

    rounds: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)
    layers: int = Field(default=32, ge=1)
    """Of the model on the meta device."""
    real_layers: int = Field(default=8, ge=0)
    """With real weights, as far as half of the free memory holds them; 0 leaves this part out."""
    divide: int = Field(default=1, ge=1)
    """Shrink the widths, to try the command."""
    r: int = Field(default=16, ge=1)


class MergeOptions(Options):
    """`bench merge`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "scale_gb": 2.6, "peft_gb": 0.0}

    rounds: int = Field(default=3, ge=1)
    warmup: int = Field(default=0, ge=0, le=0)
    scale_gb: float = Field(default=16.0, gt=0)
    """Of the checkpoint; 16 is all of the 8B shape."""
    peft_gb: float = Field(default=4.0, ge=0)
    """Of the checkpoint beside PEFT, which holds it in memory; 0 leaves PEFT out."""
    work: str | None = None
    """A folder for the checkpoints, kept; null: a temporary one, removed."""


def sizes(text: str) -> tuple[int, ...]:
    """``"4x256"`` as (4, 256)."""
    return tuple(int(part) for part in text.split("x"))


def batch_of(text: str) -> tuple[int, int]:
    """Sequences and tokens of each; tokens alone are one sequence."""
    *first, last = sizes(text)
    return math.prod(first), last


def switch_values(switch: Switch) -> list[bool]:
    """off, on or both as truth values."""
    return {"off": [False], "on": [True], "both": [False, True]}[switch]
