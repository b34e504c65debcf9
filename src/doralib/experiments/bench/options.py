"""Settings of each measurement, checked completely; a text with commas stands for several values."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from ...config import Checked

T = TypeVar("T")


def _split(value: Any) -> Any:
    """``"a,b"`` and a bare value as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return value if isinstance(value, tuple | list) else (value,)


Several = Annotated[tuple[T, ...], BeforeValidator(_split), Field(min_length=1)]


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
"""Sequences x tokens, or tokens alone."""
Shape = Annotated[str, _written_as(r"[1-9]\d*x[1-9]\d*", "OUTxIN, such as 1024x1024")]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16"]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Switch = Literal["off", "on", "both"]


class Options(Checked):
    """What every measurement takes."""

    QUICK: ClassVar[dict[str, Any]] = {}
    """Values for a look in seconds; the user's own go before them."""

    rounds: Positive = 15
    warmup: NotNegative = 2
    """Rounds that are run and dropped."""


class ModelOptions(Options):
    """What a measurement on a whole model takes."""

    model: str | None = None
    """Folder, .gguf file, hub name, "smollm2" or "tiny" (random weights); null: the demo's model, else "smollm2"."""
    layers: Positive | None = None
    """Shorten the model (random weights), its vocabulary by the same factor: the head keeps its share of the work."""
    dtype: Several[Dtype] = ("float32", "bfloat16")
    r: Positive = 16
    subjects: Several[str] | None = None
    """Rows of `subjects.SUBJECTS`; null: those that the case is about."""


class StepOptions(ModelOptions):
    """`bench step`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "tokens": "1x64"}

    tokens: Several[Batch] = ("4x256", "1x256")
    dropout: Several[Dropout] = (0.0, 0.05)
    checkpointing: Switch = "off"


class ProfileOptions(ModelOptions):
    """`bench profile`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "warmup": 1, "layers": 2, "tokens": "1x64", "dtype": "float32"}

    rounds: Positive = 5
    tokens: Several[Batch] = ("1x256",)
    dropout: Several[Dropout] = (0.0,)
    checkpointing: ClassVar[Switch] = "off"


class AccelerateOptions(StepOptions):
    """`bench accelerate`."""

    tokens: Several[Batch] = ("4x256",)


class MemoryOptions(StepOptions):
    """`bench memory`; a round is a fresh process for each subject."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "layers": 2, "tokens": "1x64", "dtype": "float32"}

    rounds: Positive = 2
    warmup: NotNegative = 0
    tokens: Several[Batch] = ("4x256",)
    dropout: Several[Dropout] = (0.0,)
    checkpointing: Switch = "both"


class QDoraOptions(StepOptions):
    """`bench qdora`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "tokens": "1x64", "processes": 1}

    quantization: Several[Literal["nf4", "fp4"]] = ("nf4",)
    dtype: Several[Dtype] = ("bfloat16",)
    tokens: Several[Batch] = ("4x256",)
    dropout: Several[Dropout] = (0.0,)
    processes: Positive = 2
    """Fresh processes for each subject's memory."""


class RankOptions(ModelOptions):
    """`bench rank`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "tokens": "1x64", "ranks": "8,32"}

    layers: Positive | None = 4
    dtype: Several[Dtype] = ("float32",)
    tokens: Several[Batch] = ("4x256",)
    ranks: Several[Positive] = (8, 32, 128, 512)


class GenerateOptions(ModelOptions):
    """`bench generate`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "layers": 2, "prompt": 8, "new": 8}

    rounds: Positive = 9
    warmup: NotNegative = 1
    prompt: Positive = 32
    """Tokens read before the clock starts."""
    new: Positive = 32
    """Tokens written one by one."""
    batch: Positive = 1


class LayerOptions(Options):
    """`bench layer`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 3, "warmup": 1, "shapes": "64x48", "tokens": "32", "dtype": "float32"}

    rounds: Positive = 31
    shapes: Several[Shape] = ("1024x1024", "576x576", "192x576", "1536x576", "576x1536")
    """Out x in."""
    dtype: Several[Dtype] = ("float32", "bfloat16")
    tokens: Several[Batch] = ("2048", "256")
    dropout: Several[Dropout] = (0.0, 0.05)
    r: Positive = 16
    subjects: Several[str] | None = None


class AdaptOptions(Options):
    """`bench adapt`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "warmup": 0, "layers": 2, "real_layers": 1, "divide": 16}

    rounds: Positive = 3
    warmup: NotNegative = 1
    layers: Positive = 32
    """Of the model on the meta device."""
    real_layers: NotNegative = 8
    """With real weights, as far as half of the free memory holds them; 0 leaves this part out."""
    divide: Positive = 1
    """Shrink the widths, to try the command."""
    r: Positive = 16


class MergeOptions(Options):
    """`bench merge`."""

    QUICK: ClassVar[dict[str, Any]] = {"rounds": 1, "scale_gb": 2.6, "peft_gb": 0.0}

    rounds: Positive = 3
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
