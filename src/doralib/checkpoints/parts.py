"""Models composed of parts, for recipes that name them: each is written once, and found again by what it is made of."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..disk import check_writable
from ..errors import DoraError, UsageError, raise_all
from ..files import hash_texts, read_yaml
from ..hub import check_model_place
from ..recipe import ModelParts, ModelSettings
from .kind import PROCESSOR_FILES

log = logging.getLogger(__name__)

CACHE = Path("~/.cache/doralib/composed")
"""Where composed models stand; runs of the same parts share one."""

_FORM = "1"
"""Goes up where what is written changes, so that nobody goes on with an older one."""


def check_model_is_there(settings: ModelSettings) -> None:
    """Check that the model, or each of its parts, is there, where it is named by its place; a name may be the hub's.

    Raises:
        UsageError: naming all that is not.
    """
    if settings.parts is None:
        check_model_place(settings.path)
    else:
        check_model_parts(settings.parts)


def check_model_parts(parts: ModelParts) -> None:
    """Check that the parts that are local are there.

    Raises:
        UsageError: naming all that are not.
    """
    problems: list[DoraError] = []
    for name in ("language", "vision"):
        path = Path(getattr(parts, name)).expanduser()
        if path.exists() and not (path / "config.json").is_file():
            problems.append(UsageError(f"model.parts.{name}: {path} is no folder of a model: it has no config.json"))
        elif name == "vision" and path.exists() and not any((path / file).is_file() for file in PROCESSOR_FILES):
            told = f"{path} does not say how it sees pictures: no {' or '.join(PROCESSOR_FILES)}"
            problems.append(UsageError(f"model.parts.vision: {told}"))
    if parts.projector is not None and not Path(parts.projector).expanduser().is_file():
        problems.append(UsageError(f"model.parts.projector: there is no file {parts.projector}"))
    raise_all(problems)


def find_composed(parts: ModelParts, seed: int) -> Path:
    """Where the model of these parts stands, or will.

    Args:
        seed: Of a projector that starts at random.
    """
    places = [parts.language, parts.vision, *([] if parts.projector is None else [parts.projector])]
    texts = [text for place in places for text in _describe(place)]
    texts += [_FORM, str(parts.layer), str(seed if parts.projector is None else "")]
    shorten = lambda name: Path(name).name.lower()
    key = hash_texts(texts)[:12]
    return CACHE.expanduser() / f"llava-{shorten(parts.language)}-{shorten(parts.vision)}-{key}"


def _describe(place: str) -> list[str]:
    """What tells one content of a place from another, without reading gigabytes; of the hub's, its name."""
    path = Path(place).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return [str(path.resolve() if states else place), *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in states)]


def compose_parts(parts: ModelParts, seed: int) -> Path:
    """The folder of the model of these parts, which is written if it is not there yet.

    Raises:
        UsageError: if a part is not there, or they do not go together.
        DoraError: if a file is damaged, or the disk is full.
    """
    out = find_composed(parts, seed)
    if not out.is_dir():
        check_writable(out, "model.parts", folder=True)
        log.info(f"composing {parts.language}, {parts.vision} and their projector: {out}")
        _compose(parts, out, seed)
    return out


@contextmanager
def settle_parts(settings: ModelSettings, seed: int, *, empty: bool = False) -> Iterator[ModelSettings]:
    """Inside the block, the settings with the path of their composed model; as they are where they name no parts.

    Args:
        empty: A model that is not there yet has no weights, and goes after the block.
    """
    parts = settings.parts
    if parts is None:
        yield settings
    elif empty and not find_composed(parts, seed).is_dir():
        with tempfile.TemporaryDirectory() as folder:
            _compose(parts, Path(folder) / "model", seed, empty=True)
            yield settings.model_copy(update={"path": str(Path(folder) / "model")})
    else:
        yield settings.model_copy(update={"path": str(compose_parts(parts, seed))})


def compose_again(run: Path) -> Path | None:
    """The base of a run whose recipe names its parts, which is composed again where it is no more; None of others."""
    file = run / "config.yaml"
    values: Any = read_yaml(file) if file.is_file() else None
    model = values.get("model") if isinstance(values, dict) else None
    told = model.get("parts") if isinstance(model, dict) else None
    if not isinstance(told, dict):
        return None
    seed = values.get("seed")
    return compose_parts(ModelParts(**told), seed if isinstance(seed, int) else 0)


def _compose(parts: ModelParts, out: Path, seed: int, **options: Any) -> None:
    # torch and transformers, which take seconds
    import torch  # noqa: PLC0415

    from .llava import compose_llava  # noqa: PLC0415

    check_model_parts(parts)
    local = lambda name: str(path) if (path := Path(name).expanduser()).exists() else name
    projector = None if parts.projector is None else Path(parts.projector).expanduser()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        compose_llava(
            local(parts.language), local(parts.vision), out, projector=projector, layer=parts.layer, **options
        )
