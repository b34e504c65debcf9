"""Every setting as a frozen value, checked completely when it is made; unknown keys are refused.

PEFT's field names wherever PEFT has the field, so nobody learns a second vocabulary.
"""

import math
import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import UsageError, did_you_mean
from .peft_settings import translate
from .validation import explain

_MOST = 1e6
"""The largest factor or rate: beyond it a float32 model is all infinities soon."""
_LARGEST_RANK = 65_536
_SECONDS = 0.25
"""That one match of a pattern with a name may take; those that are no trap take microseconds."""

Patterns = dict[str, Annotated[float, Field(gt=0, le=_MOST)]]
Names = str | tuple[str, ...]
Value = TypeVar("Value")


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


_FIELDS = "Fields, with their defaults:"


class _CheckedMeta(ModelMetaclass):
    """Turns pydantic's report into ours, once, at the outermost value being made."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise UsageError(explain(cls, error)) from None  # type: ignore[arg-type]


def _tell_default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "needed" if field.is_required() else "null" if default is None else str(default)


def _shorten(schema: dict[str, Any]) -> None:
    """A JSON schema says by itself what its fields are."""
    schema["description"] = schema.get("description", "").partition(_FIELDS)[0].rstrip()


class Checked(BaseModel, metaclass=_CheckedMeta):
    """A frozen group of settings.

    Raises:
        UsageError: when made, listing every unknown key (with the nearest known one) and every bad value.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        json_schema_extra=_shorten,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Let `help` explain every field, which pydantic keeps to itself."""
        told = [
            textwrap.fill(
                f"{name} ({_tell_default(field)}): {' '.join((field.description or '').split())}",
                width=100,
                initial_indent="    ",
                subsequent_indent="        ",
            )
            for name, field in cls.model_fields.items()
        ]
        cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", _FIELDS, *told])


class FusedParts(Checked):
    """How the rows of a fused projection are made up of parts, and which of them are adapted."""

    parts: dict[str, Annotated[int, Field(ge=1)]] | tuple[str, ...]
    """Names of the parts in the order of their rows: equal ones, or each with its share (rows, heads, ...)."""
    adapt: tuple[str, ...] = Field(min_length=1)
    """The parts that get an adapter each; the rows of the others stay as they are."""
    repeats: int = Field(default=1, ge=1)
    """The parts come one after another this often: the number of heads, where each head has its own q, k, v."""

    @property
    def shares(self) -> dict[str, int]:
        """The share of every part, by name, in the order of their rows."""
        return dict(self.parts) if isinstance(self.parts, dict) else dict.fromkeys(self.parts, 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [f"adapt: there is no part {name!r}" for name in self.adapt if name not in self.shares]
        if len(set(self.adapt)) < len(self.adapt):
            problems.append("adapt names a part twice")
        if len(self.shares) < len(self.parts):
            problems.append("parts has a name twice")
        if len(self.shares) < 2:
            problems.append("parts: a fused projection has two parts at least")
        if problems:
            raise ValueError("; ".join(problems))
        return self


_STARTS = ("kaiming", "gaussian", "pissa", "pissa_niter_16", "olora")


def _check_start(name: str) -> str:
    if name not in _STARTS and not re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        raise ValueError(f"there is no start {name!r}{did_you_mean(name, _STARTS)}; known: {', '.join(_STARTS)}")
    return name


class DoraConfig(Checked):
    """What to adapt, by which method, and how strongly."""

    method: Literal["dora", "lora", "dvora", "vera", "full"] = "dora"
    """dora: length and direction; lora: the same layer without the length; dvora and vera: the same with random A and B
    shared by all layers and two trained vectors in each; full: the weights themselves."""
    r: int = Field(default=16, ge=1, le=_LARGEST_RANK)
    """Rank of the update B A."""
    lora_alpha: float = Field(default=32.0, gt=0, le=_MOST)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that an input of the adapter is zeroed during training."""
    target_modules: Names | None = None
    """Name endings, one regular expression for whole names, or "all-linear"; null: all-linear (full: everything)."""
    target_parameters: tuple[str, ...] = ()
    """Stacks of weights that a module holds as parameters (experts.gate_up_proj), by name ending; each expert has A, B
    and lengths of its own."""
    exclude_modules: Names | None = None
    """Taken out of target_modules; read in the same way."""
    magnitude_modules: Names = ()
    """Layers of which only the magnitude is trained, beside the target_modules; named in the same way."""
    embedding_axis: Literal["dimension", "token"] = "dimension"
    """What has a length in an embedding: a dimension over the whole vocabulary (PEFT), or a token (MLX)."""
    fused_modules: dict[str, FusedParts] = {}
    """Target layers that hold several projections (c_attn, qkv_proj), by name ending or regular expression: each part
    that is adapted has A, B and lengths of its own."""
    d_initial: float = 0.1
    """vera, dvora: where the vector between A and B starts."""
    projection_prng_key: int = Field(default=0, ge=0, lt=2**63)
    """vera, dvora: the seed of A and B."""
    init_lora_weights: Annotated[str, AfterValidator(_check_start)] = "kaiming"
    """Where A and B of linear layers and convolutions start; nothing changes by it. kaiming, gaussian: A drawn, B zero.
    pissa: the weight's principal directions, pissa_niter_N: found by N rounds of power iteration; olora: by Q R."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=_LARGEST_RANK)]] = {}
    """Another r for the layers whose name ends with, or matches as a regular expression, the key."""
    alpha_pattern: Patterns = {}
    """Another lora_alpha, likewise."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, by name ending."""
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    """Tokens whose rows of the embedding, and of a head tied to it, are trained; or tokens by a module's ending."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias vectors are trained and saved as well."""
    dropout_mode: Literal["adapter", "exact"] = "adapter"
    """adapter: y = g (W x + s B A x~) + bias; exact (the paper's code, PEFT): W x + (g-1) W x~ + g s B A x~ + bias."""
    detach_norm: bool = True
    """The norm is a constant of the backward pass (paper, section 4.3); false: the full gradient."""
    magnitude_lr_ratio: float = Field(default=1.0, gt=0, le=_MOST)
    """Learning rate of the magnitudes over that of A, whatever B's is."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0, le=_MOST)
    """Learning rate of B over that of A in linear layers and convolutions (LoRA+, arXiv 2402.12354)."""
    loraplus_lr_embedding: Annotated[float, Field(gt=0, le=_MOST)] | None = None
    """Learning rate of an embedding's A and B; null: as A's of the other layers."""

    @classmethod
    def from_peft(cls, config: Any) -> Self:
        """The same of PEFT's LoraConfig or VeraConfig, or of the mapping that its `to_dict` gives.

        Dropout is as in PEFT (`dropout_mode="exact"`), and without `use_dora` the method is lora.

        Raises:
            UsageError: naming every field that is set and cannot be meant here.
        """
        return cls(**translate(config if isinstance(config, Mapping) else config.to_dict()))

    @classmethod
    def of(cls, given: "DoraConfig | Mapping[str, Any] | Any") -> "DoraConfig":
        """The settings in any of their forms: these, a mapping of their fields, or PEFT's."""
        if isinstance(given, DoraConfig):
            return given
        if isinstance(given, Mapping):
            return cls.from_peft(given) if "peft_type" in given else cls(**given)
        if hasattr(given, "peft_type") and hasattr(given, "to_dict"):
            return cls.from_peft(given)
        raise UsageError(
            f"config is a {type(given).__name__}; give a DoraConfig, a mapping of its fields, or PEFT's LoraConfig"
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = self._find_bad_patterns() + self._find_bank_problems()
        others = self.target_parameters or self.trainable_token_indices
        if self.target_modules == "" or (self.target_modules == () and not others):
            problems.insert(0, "target_modules is empty: nothing would be adapted")
        if self.loraplus_lr_ratio != 1 and self.method not in ("dora", "lora"):
            problems.append(f"loraplus_lr_ratio: method {self.method!r} trains no B")
        if self.magnitude_modules and self.method != "dora":
            problems.append(f"magnitude_modules go with method dora, not with {self.method!r}")
        if self.target_parameters and self.method not in ("dora", "lora"):
            problems.append(f"target_parameters go with methods dora and lora, not with {self.method!r}")
        problems += self._find_layer_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _find_bad_patterns(self) -> list[str]:
        """A line for each regular expression that is none."""
        patterns = [
            (field, key) for field in ("rank_pattern", "alpha_pattern", "fused_modules") for key in getattr(self, field)
        ]
        names = [(field, getattr(self, field)) for field in ("target_modules", "exclude_modules", "magnitude_modules")]
        patterns += [(field, pattern) for field, pattern in names if isinstance(pattern, str)]
        return [f"{field}: {why}" for field, pattern in patterns if (why := explain_regex(pattern))]

    def _find_bank_problems(self) -> list[str]:
        """What does not go with random matrices that all layers share."""
        if not self.has_bank:
            return []
        no_place = f"method {self.method!r} has no place for"
        start = f"init_lora_weights: {no_place} {self.init_lora_weights!r}"
        problems = [start] if self.moves_start else []
        problems += [f"{field}: {no_place} it" for field in _NOT_WITH_A_BANK if getattr(self, field)]
        if self.bias != "none":
            problems.append(f"bias: method {self.method!r} trains none")
        return problems

    def _find_layer_problems(self) -> list[str]:
        """What does not go with parts of layers and stacks of weights."""
        problems = []
        if self.moves_start and (self.fused_modules or self.target_parameters):
            problems.append(
                f"init_lora_weights: {self.init_lora_weights!r} takes whole layers apart, so it does not go with "
                "fused_modules or target_parameters"
            )
        if self.target_parameters and self.lora_dropout:
            problems.append("lora_dropout: target_parameters have none, as no input is seen where a weight is adapted")
        if self.fused_modules and self.method not in ("dora", "lora"):
            problems.append(f"fused_modules go with methods dora and lora, not with {self.method!r}")
        return problems

    @property
    def has_magnitude(self) -> bool:
        """Whether the method trains lengths."""
        return self.method in ("dora", "dvora")

    @property
    def moves_start(self) -> bool:
        """Whether A and B start as a part of the weight."""
        return self.init_lora_weights not in ("kaiming", "gaussian")

    def in_files(self) -> Self:
        """The settings that a file's tensors agree with: there a moved start is a part of the adapter, of rank 2r."""
        if not self.moves_start:
            return self
        more = math.sqrt(2) if self.use_rslora else 2
        doubled: dict[str, Any] = {
            "r": 2 * self.r,
            "lora_alpha": more * self.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in self.rank_pattern.items()},
            "alpha_pattern": {key: more * alpha for key, alpha in self.alpha_pattern.items()},
            "init_lora_weights": "kaiming",
        }
        return self.model_copy(update=doubled)

    @property
    def has_bank(self) -> bool:
        """Whether A and B are random and shared."""
        return self.method in ("vera", "dvora")

    def rank_of(self, layer: str) -> int:
        """r of the layer of this name."""
        return _find_by_pattern(self.rank_pattern, layer, self.r)

    def fused_parts(self, layer: str) -> FusedParts | None:
        """The parts of the layer of this name, where it is a fused projection."""
        return _find_by_pattern(self.fused_modules, layer, None)

    def scale_of(self, layer: str) -> float:
        """The factor s of ``s B A`` in the layer of this name."""
        if self.has_bank:
            return 1.0
        r, alpha = self.rank_of(layer), _find_by_pattern(self.alpha_pattern, layer, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


_NOT_WITH_A_BANK = ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "trainable_token_indices")


def matches(pattern: str, layer: str) -> bool:
    """Whether a key of `rank_pattern` and the like means this layer, as PEFT reads them."""
    return fits_whole(rf"(.*\.)?({pattern})", layer)


def fits_whole(pattern: str, name: str) -> bool:
    """Whether a regular expression, maybe of another's file, is the whole of a name.

    Raises:
        UsageError: if it takes so long that it is a trap.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise UsageError(f"{_explain_trap(pattern, name)}; name the layers plainly") from None


def search_text(pattern: str, text: str, *, ignore_case: bool) -> Any:
    """The first place where a regular expression fits a text, as `re.search` gives it.

    Raises:
        UsageError: if it takes so long that it is a trap.
    """
    try:
        return regex.search(pattern, text, flags=regex.IGNORECASE if ignore_case else 0, timeout=_SECONDS)
    except TimeoutError:
        raise UsageError(f"{_explain_trap(pattern, text)}; write it simpler") from None


def _explain_trap(pattern: str, text: str) -> str:
    return (
        f"the regular expression {pattern[:80]!r} takes longer than {_SECONDS} s with {text[:80]!r}: it repeats what "
        "repeats already"
    )


def _find_by_pattern(patterns: Mapping[str, Value], layer: str, otherwise: Value) -> Value:
    """The value of the first key that the layer's name ends with or matches."""
    for key, value in patterns.items():
        if matches(key, layer):
            return value
    return otherwise


def explain_regex(pattern: str) -> str:
    """Why a text is no regular expression; empty if it is one."""
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError) as error:
        return f"{pattern!r} is not a regular expression: {error}"
    except RecursionError:
        return f"{pattern[:40]!r}... is nested too deep for a regular expression"
    return ""
