"""What each server does with an adapter, and the form of it that works there; facts with the version seen."""

from dataclasses import dataclass, replace

import torch

from ..errors import UsageError, did_you_mean
from ..formats.base import ParsedAdapter
from ..formats.tensors import make_config
from ..state import LayerAdapter
from .heads import TASKS

MERGED = "merged"


@dataclass(frozen=True)
class Server:
    """A program that runs adapted models."""

    name: str
    title: str
    seen: str
    """The version that the statement is about."""
    says: str
    """What it does with a DoRA adapter."""
    lora: str
    """The format in which it takes a plain LoRA."""
    dora: str | None = None
    """The format in which it runs DoRA; None: in none."""
    methods: tuple[str, ...] = ("dora",)
    """The methods beside LoRA that it runs in that format."""
    one_scale: bool = False
    """Whether it scales all layers by one lora_alpha / r, whatever the patterns say."""
    use: str = ""
    """How the adapter is given to it."""
    use_merged: str = "it loads the merged folder as any model"


SERVERS = {
    each.name: each
    for each in (
        Server(
            "peft",
            "PEFT",
            "0.21.2",
            "runs DoRA; an unmerged one takes 2.4 times LoRA's time for inference (its own figure)",
            "peft",
            "peft",
            ("dora", "vera"),
            use="PeftModel.from_pretrained(model, FOLDER)",
        ),
        Server(
            "vllm",
            "vLLM",
            "peft_helper.py of commit 0214369",
            'refuses it ("vLLM does not yet support DoRA"), and modules_to_save; pull request 47395 would run it',
            "peft",
            one_scale=True,
            use="vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules NAME=FOLDER",
            use_merged="vllm serve FOLDER",
        ),
        Server(
            "sglang",
            "SGLang",
            "lora_config.py of commit 0ceb81f",
            "reads use_dora, and no arithmetic of magnitudes was found in it: it would answer as another model",
            "peft",
            one_scale=True,
            use="--lora-paths NAME=FOLDER",
            use_merged="--model-path FOLDER",
        ),
        Server(
            "llama.cpp",
            "llama.cpp",
            "convert_lora_to_gguf.py of commit 0b03ada",
            "its converter stops at the first magnitude (not a lora_A or lora_B tensor)",
            "gguf",
            use="llama-server -m BASE.gguf --lora FILE",
            use_merged="make the folder a .gguf with its convert_hf_to_gguf.py",
        ),
        Server(
            "ollama",
            "Ollama",
            "docs/import.md as of November 2026",
            "runs llama.cpp's adapters, which are LoRA alone",
            "gguf",
            use="in the Modelfile: FROM BASE, then ADAPTER FILE",
            use_merged="in the Modelfile: FROM FOLDER",
        ),
        Server(
            "tensorrt-llm",
            "TensorRT-LLM",
            "examples/dora of 2026 (engine backend)",
            "runs DoRA of linear layers with magnitudes divided by the rows' lengths, and without --dora_plugin=enable "
            "ignores them",
            "peft",
            "tensorrt",
            one_scale=True,
            use="trtllm-build --lora_plugin auto --dora_plugin=enable",
        ),
        Server(
            "diffusers",
            "diffusers",
            "0.42.1",
            "runs DoRA in its own files, and drops every dora_scale of kohya's",
            "diffusers",
            "diffusers",
            use="pipeline.load_lora_weights(FOLDER)",
        ),
        Server(
            "comfyui",
            "ComfyUI",
            "weight_adapter/base.py of commit 14c2085",
            "takes the norm along the other axis, one length per input, so one length per output gives other weights",
            "kohya",
            use="put the file into models/loras",
            use_merged="load the merged part as the diffusion model",
        ),
    )
}


@dataclass(frozen=True)
class Form:
    """The form in which an adapter goes to a server."""

    to: str
    """A format's name, or `MERGED`."""
    notes: tuple[str, ...]
    shrink: bool = False
    """Whether it is the nearest LoRA that goes."""
    one_scale: bool = False
    """Whether all layers need one rank and one scale."""


def find_server(name: str) -> Server:
    """The server of this name.

    Raises:
        UsageError: if there is none.
    """
    if name not in SERVERS:
        raise UsageError(f"--for {name}: known: {', '.join(SERVERS)}{did_you_mean(name, SERVERS)}")
    return SERVERS[name]


def choose_form(server: Server, adapter: ParsedAdapter, rank: int | None) -> Form:
    """The form that works: as it is, the nearest LoRA of the rank asked for, else merged, which loses nothing."""
    method, state = adapter.config.method, adapter.state
    whole = bool(state.extra or state.rows or state.resized or state.task_type in TASKS)
    seen, shrink = f"seen: {server.seen}", rank is not None
    # whole modules are in PEFT's files alone, and of their readers PEFT itself takes them
    holds = not whole or server.dora == "peft"
    if method == "lora" and holds:
        says = f"{server.title} runs this LoRA ({seen}): {server.use}"
        return Form(server.lora, (says,), shrink, server.one_scale)
    says = f"{server.title} {server.says} ({seen})"
    if server.dora and method in server.methods and holds and not shrink:
        return Form(server.dora, (f"{says}: {server.use}",))
    if shrink and holds:
        says = f"{says}; so the nearest LoRA of rank {rank} is written: {server.use}"
        return Form(server.lora, (says,), shrink, server.one_scale)
    why = "it has modules or tokens that were trained whole" if whole else "or give --rank R for the nearest LoRA"
    return Form(MERGED, (f"{says}; so it is merged, which loses nothing ({why}): {server.use_merged}",))


def make_uniform(adapter: ParsedAdapter) -> ParsedAdapter:
    """The same linear LoRA with one rank and one alpha: lower ranks get zeros, other scales go into B."""
    state = adapter.state
    if any(layer.kind == "experts" or layer.m_O is not None for layer in state.layers.values()):
        return adapter
    rank = max(layer.rank for layer in state.layers.values())
    layers = {name: _pad(layer, rank) for name, layer in state.layers.items()}
    kept = ("lora_dropout", "dropout_mode", "bias", "modules_to_save")
    endings = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    settings = {name: getattr(adapter.config, name) for name in kept}
    config = make_config(layers, **settings).model_copy(update={"target_modules": endings})
    return ParsedAdapter(config, replace(state, layers=layers), adapter.notes)


def _pad(layer: LayerAdapter, rank: int) -> LayerAdapter:
    a, b, more = layer.a_RI, layer.b_OR * layer.scale, rank - layer.rank
    a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], 1)
    return LayerAdapter(a, b, None, 1.0, layer.kind)
