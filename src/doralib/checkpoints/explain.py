"""What transformers and diffusers raise while they load a model, in words that name the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DoraError, UsageError
from ..hub import explain_hub
from .kind import PROCESSOR_FILES

# what transformers says where nothing makes a model's inputs, and of a configuration that a class does not know
_NO_INPUTS = re.compile(r"Can't load (feature extractor|image processor|processor) for ")
_OTHER_CLASS = re.compile(r"Unrecognized configuration class <class '\S*?(\w+)'> for this kind of AutoModel: (\w+)")


@contextmanager
def explaining_load(path: str) -> Iterator[None]:
    """Name the model or pipeline in what its files raise: safetensors and tokenizers have bare classes of their own."""
    try:
        yield
    except DoraError:
        raise
    except Exception as error:
        raise _explain(path, error) from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _explain(path: str, error: Exception) -> DoraError:
    first = first_line(error)
    if isinstance(error, ImportError | NotImplementedError):
        return DoraError(f"model: {path} cannot be loaded as asked: {first}")
    if other := _OTHER_CLASS.match(first):
        return UsageError(
            f"model: {path} is of another kind than model.kind says: its settings are a {other[1]}, and {other[2]} "
            "takes none of these; leave model.kind at auto, or give a model of that kind"
        )
    if Path(path).is_dir() and _NO_INPUTS.match(first):
        return UsageError(
            f"model: {path} neither sees nor hears: it has no {' or '.join(PROCESSOR_FILES)}; give a model of the kind "
            "that model.kind says, with all its files"
        )
    if Path(path).expanduser().exists():
        why = f"a file in it may be missing, truncated or of another kind: {first}"
        return DoraError(f"model: {path} cannot be read, {why}")
    return UsageError(f"model: no folder or file {path}, and {explain_hub(error)}")
