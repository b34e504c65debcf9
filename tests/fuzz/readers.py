"""What is damaged: for each kind of file a whole one, the damage, and the reader that has to stand it."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from adapted import move
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import doralib
from doralib.checkpoints.adapter import describe_base, match_checkpoint, read_for_base
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.gguf import expand_gguf
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.safetensors import Checkpoint
from doralib.cli.inspect import inspect_adapter
from doralib.cli.prompt_file import read_prompts
from doralib.config import DoraConfig
from doralib.data.rows import as_written, read_both
from doralib.evaluation.task_file import load_tasks
from doralib.formats.base import Hints
from doralib.recipe import Recipe
from doralib.runs.report import write_report
from doralib.training.arguments import check_arguments
from doralib.training.job import fine_tune
from doralib.training.recipe_file import read_recipe

from . import damage

FORMATS = ("peft", "mlx", "kohya", "torchtune", "fsdp-qlora")


@dataclass(frozen=True)
class Kind:
    """A kind of files."""

    name: str
    share: int
    """How many are tried for each of the rarest kind."""
    make: Callable[[Path, Path, random.Random], Path]
    """Copy a whole one from the world into an empty folder; returns what is read."""
    harm: Callable[[Path, random.Random], None]
    read: Callable[[Path, Path], object]
    """Takes what is read, and the world."""


def build(world: Path) -> None:
    """Write the whole files that all cases start from."""
    base = world / "base"
    model = make_llama()
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    for name, settings in (("peft", {}), ("vera", {"method": "dvora"})):
        model = make_llama()
        config = DoraConfig(r=2, target_modules=("q_proj", "v_proj"), **settings)
        doralib.save_adapter(move(doralib.adapt(model, config)), world / name)
    for form in FORMATS[1:]:
        try:
            convert_adapter(ConversionRequest(world / "peft", form, world / form, base=str(base)))
        except doralib.errors.UsageError:  # a format that is one file
            convert_adapter(ConversionRequest(world / "peft", form, world / f"{form}/x.safetensors", base=str(base)))
    rows = [{"text": f"a good film {i}", "label": "ab"[i % 2], "n": i} for i in range(8)]
    data = world / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "rows.json").write_text(json.dumps(rows))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (data / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in rows))
    (data / "rows.csv").write_text("text,label\n" + "".join(f"good {i},a\n" for i in range(8)))
    (data / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (data / "prompts.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    (data / "prompts.txt").write_text("a\nb\n")
    _write_parquet(data / "rows.parquet")
    task = {"kind": "classification", "data": str(data / "rows.jsonl"), "prompt": "{text} is", "answer": "label"}
    (world / "task.yaml").write_text(yaml.safe_dump({**task, "labels": {"a": " good", "b": " bad"}, "name": "seen"}))
    recipe = Recipe(
        model={"path": str(base)},
        data={"train": str(data / "rows.jsonl"), "prompt": "{text}", "target": " {label}", "validation": 0.25},
        adapter={"r": 2, "target_modules": ("q_proj",)},
        training={"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1},
        eval={"tasks": (str(world / "task.yaml"),)},
        out=str(world / "run"),
    )
    (world / "recipe.yaml").write_text(recipe.to_yaml())
    fine_tune(recipe)
    _write_gguf(world / "model.gguf")
    _write_four_bit(base, world / "base-nf4")


def _write_four_bit(base: Path, out: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how).save_pretrained(out)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, out)


def _write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["a", "b"]}), path)


def _write_gguf(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "context_length": 16}
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_one(*names: str) -> Callable[[Path, Path, random.Random], Path]:
    """What copies one of these of the world, a file or a folder."""

    def make(world: Path, place: Path, draw: random.Random) -> Path:
        source = world / draw.choice(names)
        if source.is_file():
            return Path(shutil.copy(source, place / source.name))
        return Path(shutil.copytree(source, place / source.name))

    return make


def _harm_one(pattern: str, harm: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def apply(path: Path, draw: random.Random) -> None:
        harm(draw.choice(sorted(path.rglob(pattern))), draw)

    return apply


def harm_file(path: Path, draw: random.Random) -> None:
    """Damage by what the name says that it is; a folder's at one of its files."""
    if path.is_dir():
        small = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
        path = draw.choice(small)
    by_ending = {
        ".json": damage.damage_json,
        ".jsonl": damage.damage_json_lines,
        ".yaml": damage.damage_yaml,
        ".safetensors": damage.damage_tensors,
    }
    harm = by_ending.get(path.suffix)
    if harm:
        harm(path, draw)
    else:
        path.write_bytes(damage.damage_bytes(path.read_bytes(), draw))


def _read_adapter(path: Path, world: Path) -> None:
    inspect_adapter(path, str(world / "base"))
    convert_adapter(ConversionRequest(path, "mlx", path.parent / "out", base=str(world / "base")))


def _read_recipe(path: Path, _world: Path) -> None:
    check_arguments(read_recipe(str(path), []))


def _read_data(path: Path, _world: Path) -> None:
    settings = Recipe(model={"path": "x"}, data={"train": str(path)}, out="x").data
    rows = read_both(settings, 0).train
    for row in as_written(rows):
        str(row)


def _read_base(path: Path, world: Path) -> None:
    checkpoint = Checkpoint.open(path)
    known = describe_base(Hints(), checkpoint)
    match_checkpoint(read_for_base(world / "peft", Hints(), known)[1].state, checkpoint)
    load_model(str(path))


def _read_quantized(path: Path, world: Path) -> None:
    merge_checkpoint(world / "peft", path, path.parent / "out", dtype="float32")
    load_model(str(path))


def _load_adapter(path: Path, _world: Path) -> None:
    doralib.load_adapter(make_llama(), path)


def _resume(path: Path, _world: Path) -> None:
    recipe = read_recipe(str(path / "config.yaml"), [f"out={path}", "training.max_steps=3"])
    fine_tune(recipe, resume=True)


_ADAPTERS = (*FORMATS, "vera")
KINDS = [
    Kind("adapter tensors", 24, copy_one(*_ADAPTERS), _harm_one("*.[sp]*", damage.damage_tensors), _read_adapter),
    Kind("adapter JSON", 10, copy_one("peft", "mlx", "vera"), _harm_one("*.json", damage.damage_json), _read_adapter),
    Kind("recipe YAML", 5, copy_one("recipe.yaml"), damage.damage_yaml, _read_recipe),
    Kind("task YAML", 4, copy_one("task.yaml"), damage.damage_yaml, lambda path, _: load_tasks([str(path)])),
    Kind(
        "data files",
        6,
        copy_one(*(f"data/{name}" for name in ("rows.jsonl", "rows.json", "chat.jsonl", "rows.csv", "rows.parquet"))),
        harm_file,
        _read_data,
    ),
    Kind(
        "prompt files",
        2,
        copy_one("data/prompts.txt", "data/prompts.json", "data/prompts.jsonl"),
        harm_file,
        lambda path, _: read_prompts(path),
    ),
    Kind("run folders", 4, copy_one("run"), harm_file, lambda path, _: write_report(path, figures=False)),
    Kind("resume files", 2, copy_one("run"), _harm_one("*.[jpsty]*", harm_file), _resume),
    Kind("base folders", 6, copy_one("base"), harm_file, _read_base),
    Kind("quantized bases", 2, copy_one("base-nf4"), harm_file, _read_quantized),
    Kind("load_adapter", 1, copy_one("peft", "mlx", "vera"), harm_file, _load_adapter),
    Kind("GGUF", 1, copy_one("model.gguf"), harm_file, lambda path, _: expand_gguf(path, path.parent / "out")),
]
