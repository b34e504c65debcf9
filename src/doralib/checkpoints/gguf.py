"""Bases that are not yet a folder of safetensors: .gguf files and hub names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..disk import replacing, work_folder
from ..errors import DoraError, UsageError
from ..files import find_file
from ..hub import fetch_model, is_hub_name


@contextmanager
def open_base_folder(base: str | Path, scratch: Path) -> Iterator[Path]:
    """The folder, or the one .safetensors file, of whatever names a base model, for as long as the block runs.

    Args:
        base: such a folder or file itself, a .gguf file, or a hub name, of which the local cache is asked first.
        scratch: folder beside which a .gguf file is unpacked, and removed after the block.

    Raises:
        UsageError: if it is none of these.
        DoraError: if a file is damaged.
    """
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        find_file(path)
        with work_folder(scratch) as folder:
            yield expand_gguf(path, folder / path.stem)
    elif path.exists():
        yield path
    elif not is_hub_name(str(base)):
        raise UsageError(f"there is no model folder or .gguf file {base}")
    else:
        yield fetch_model(str(base))


def expand_gguf(path: Path, out: Path) -> Path:
    """Write a .gguf file as a plain folder of safetensors, config and tokenizer; returns ``out``.

    transformers dequantizes the whole model to float32, so that is what it takes in memory and on the disk.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  no part of the core

    where, name = find_file(path).parent, path.name
    try:
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except Exception as error:
        raise DoraError(
            f"{path} cannot be read, it may be truncated or of an architecture unknown here: {error}"
        ) from error
    # what is left of the quantization are two notes, for which save_pretrained refuses to write plain numbers
    model.hf_quantizer = None
    del model.config.quantization_config
    with replacing(out, model.num_parameters() * 4) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return out
