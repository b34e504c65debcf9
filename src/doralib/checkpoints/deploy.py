"""A merged folder made ready for the server that it is for."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..disk import replacing
from ..errors import DoraError, UsageError, did_you_mean
from .tokenizer import read_template

_CONVERTER = "convert_hf_to_gguf"


def prepare_for(server: str, folder: Path) -> list[str]:
    """Add to a merged folder what a server needs beside it; returns what there is to say, the command last.

    Raises:
        UsageError: if there is no such server, or a package is missing that it needs.
        DoraError: if llama.cpp's converter cannot write the model.
    """
    return SERVERS_OF_MERGED[server](folder)


def check_server(server: str) -> None:
    """Check that a merged folder can be made ready for a server, before it is made.

    Raises:
        UsageError: as `prepare_for`.
    """
    if server not in SERVERS_OF_MERGED:
        hint = did_you_mean(server, SERVERS_OF_MERGED)
        raise UsageError(f"--for {server}: known: {', '.join(SERVERS_OF_MERGED)}{hint}")
    if server != "vllm" and importlib.util.find_spec(_CONVERTER) is None:
        raise UsageError(
            f"--for {server} needs llama.cpp's converter: pip install 'doralib[gguf]'; without it merge without --for, "
            "and convert the folder elsewhere"
        )


def write_gguf(folder: Path) -> Path:
    """Write a model's folder as one .gguf file in it, its tokenizer, chat template and end tokens inside.

    Raises:
        DoraError: with the converter's last line, if it does not know the model.
    """
    out = folder / f"{folder.resolve().name}.gguf"
    with replacing(out) as part:
        # the converter adds nothing to a name that ends so
        made = part.with_name(f"{part.name}.gguf")
        command = [sys.executable, "-m", _CONVERTER, str(folder), "--outfile", str(made), "--outtype", "auto"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.is_file():
            made.unlink(missing_ok=True)
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise DoraError(f"{folder}: llama.cpp's converter stopped: {said[-1] if said else done.returncode}")
        made.rename(part)
    return out


def _for_vllm(folder: Path) -> list[str]:
    notes = [] if read_template(folder) is not None else ["without a chat template vLLM answers /v1/completions alone"]
    return [*notes, f"next: vllm serve {folder}"]


def _for_llama_cpp(folder: Path) -> list[str]:
    out = write_gguf(folder)
    return [f"written: {out}", f"next: llama-server -m {out} --jinja"]


def _for_ollama(folder: Path) -> list[str]:
    # the other way about, merging would wait for transformers
    from .ollama import write_modelfile  # noqa: PLC0415

    out = write_gguf(folder)
    notes = write_modelfile(folder, out.name)
    written = [f"written: {out}", f"written: {folder / 'Modelfile'}"]
    name = folder.resolve().name.lower()
    return [*written, *notes, f"next: ollama create {name} -f {folder / 'Modelfile'} && ollama run {name}"]


SERVERS_OF_MERGED: dict[str, Callable[[Path], list[str]]] = {
    "vllm": _for_vllm,
    "llama.cpp": _for_llama_cpp,
    "ollama": _for_ollama,
}
"""The servers that a merged folder is made ready for."""
