"""What is killed: each verb on tiny files, how it is taken up again, and what must then stand there.

A scenario is made in an empty folder, done once without harm for its reference, and then done, harmed, done again.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from adapted import move
from conftest import make_llama, make_tokenizer

import doralib
from doralib import disk
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.merge import merge_checkpoint
from doralib.cli import main as cli
from doralib.config import DoraConfig
from doralib.disk import is_scratch
from doralib.errors import UsageError
from doralib.recipe import Recipe
from doralib.training.job import fine_tune

CLOCK = ("seconds", "tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
BESIDE = "beside other files"
FORMATS = {"peft": "", "mlx": "", "torchtune": "", "kohya": ".safetensors", "lora": ""}


@dataclass(frozen=True)
class Scenario:
    """One verb in one situation; each function takes the folder that it happens in."""

    verb: str
    what: str
    prepare: Callable[[Path], None]
    """What stands there before."""
    act: Callable[[Path], None]
    again: Callable[[Path], None]
    """The same command as a person gives it after a kill."""
    outcome: Callable[[Path], object]
    """What must be equal to the reference at the end."""
    check: Callable[[Path, object, object], str] = lambda *_: ""
    """What is wrong right after the kill, given the outcomes before it and of the reference; empty if nothing is."""


def build(world: Path) -> None:
    """The base, the adapters and the data that all scenarios read; nothing of it is written later."""
    tokenizer = make_tokenizer()
    model = make_llama()
    model.save_pretrained(world / "base")
    tokenizer.save_pretrained(world / "base")
    for name, seed in (("old", 1), ("new", 2)):
        model = make_llama()
        config = DoraConfig(r=2, target_modules=("q_proj", "v_proj"))
        doralib.save_adapter(move(doralib.adapt(model, config), seed=seed), world / name)
    words = ["good", "bad", "dull", "film", "plot", "evening", "brilliant", "waste"]
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=2 + i % 5)), "label": "ab"[i % 2]} for i in range(40)]
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "prompts.txt").write_text("good film\nbad plot\n")
    (world / "task.yaml").write_text(
        "kind: classification\ndata: {}\nprompt: '{{text}}'\nanswer: label\nlabels: {{a: ' a', b: ' b'}}\n".format(
            world / "rows.jsonl"
        )
    )


def list_scenarios(world: Path) -> list[Scenario]:
    """Every scenario, by verb."""
    runs = {
        "DoRA with validation": {"data": {"validation": 0.2}},
        "DoRA without validation": {},
        "best model, early stopping, dropout, accumulation": {
            "data": {"validation": 0.2},
            "adapter": {"lora_dropout": 0.1},
            "training": {
                "early_stopping_patience": 1,
                "max_steps": 20,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "save_total_limit": 1,
                # a falling loss taken for the worse ends the run early
                "metric_for_best_model": "loss",
                "greater_is_better": True,
            },
        },
        "full fine-tuning": {"adapter": {"method": "full", "target_modules": None}},
        "PiSSA, scored": {
            "adapter": {"init_lora_weights": "pissa"},
            "eval": {"tasks": [str(world / "task.yaml")], "limit": 4},
        },
    }
    found = [_train(world, what, changes) for what, changes in runs.items()]
    found.append(_train(world, "--overwrite of another run", {}, overwrite=True))
    for name, ending in FORMATS.items():
        found += [_convert(world, name, ending, over) for over in ("", "old", BESIDE)]
    found += [_merge(world, over=False), _merge(world, over=True), _merge(world, over=True, exchange=False)]
    return [*found, *_answers(world)]


def make_recipe(world: Path, out: Path, changes: dict) -> Recipe:
    """A run of six steps with three checkpoints, changed."""
    values = {
        "model": {"path": str(world / "base")},
        "data": {"train": str(world / "rows.jsonl"), "prompt": "{text}", "target": " {label}"},
        "adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2},
        "eval": {"before": False},
        "out": str(out),
    }
    values["training"] |= {"learning_rate": 1e-2, "save_total_limit": 2, "use_cpu": True}
    for group, settings in changes.items():
        values[group] = {**values[group], **settings}
    return Recipe(**values)


def _train(world: Path, what: str, changes: dict, *, overwrite: bool = False) -> Scenario:
    def prepare(folder: Path) -> None:
        if overwrite:
            fine_tune(make_recipe(world, folder / "run", {"training": {"max_steps": 3, "save_steps": 1}}))

    def act(folder: Path) -> None:
        fine_tune(make_recipe(world, folder / "run", changes), overwrite=overwrite)

    def again(folder: Path) -> None:
        # --resume, as a script gives it that does not know how far the run came
        try:
            fine_tune(make_recipe(world, folder / "run", changes), resume=True)
        except UsageError as error:
            if overwrite and "these differ" in str(error):
                act(folder)
            elif "there is no run" in str(error):
                fine_tune(make_recipe(world, folder / "run", changes))
            else:
                raise

    return Scenario("train", what, prepare, act, again, lambda folder: _read_run(folder / "run"))


def _read_run(run: Path) -> dict:
    """Everything of a run that follows from its recipe."""
    if not (run / "summary.json").is_file():
        return {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    weights = [*run.glob("adapter_*"), *run.glob("doralib_config.json"), *run.glob("model/*")]
    return {
        "curve": [{key: value for key, value in line.items() if key not in CLOCK} for line in lines],
        "summary": {key: value for key, value in summary.items() if key not in CLOCK},
        "weights": {file.name: file.read_bytes() for file in weights},
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "litter": _find_litter(run),
    }


def _convert(world: Path, form: str, ending: str, over: str) -> Scenario:
    def request(folder: Path, adapter: str, *, overwrite: bool) -> ConversionRequest:
        more = {"base": str(world / "base")} if form != "peft" else {}
        more |= {"rank": 2} if form == "lora" else {}
        return ConversionRequest(world / adapter, form, folder / f"out{ending}", overwrite=overwrite, **more)

    def prepare(folder: Path) -> None:
        if over == BESIDE:
            place = folder if ending else folder / "out"
            place.mkdir(exist_ok=True)
            (place / "README.md").write_text("mine")
        if over:
            convert_adapter(request(folder, "old", overwrite=False))

    def act(folder: Path) -> None:
        convert_adapter(request(folder, "new", overwrite=bool(over)))

    def again(folder: Path) -> None:
        try:
            act(folder)
        except UsageError as error:
            # the kill came after its work
            if over or "exists already" not in str(error):
                raise

    what = f"to {form}" + {"": "", "old": ", over an old one"}.get(over, f", over an old one {over}")
    check = lambda folder, before, reference: _check_set(folder, before, reference, over)
    return Scenario("convert", what, prepare, act, again, _read_folder, check)


def _check_set(folder: Path, before: dict, reference: dict, over: str) -> str:
    """What is wrong with the files of an adapter right after a kill."""
    found = _read_folder(folder)["files"]
    if any(name.endswith((".safetensors", ".pt")) for name in found):
        return "" if found in [before["files"], reference["files"]] else "the files are of two adapters"
    if over == BESIDE:
        return "" if _find_litter(folder) else "the old adapter is gone, and not set aside"
    return "neither the old nor the new adapter stands there" if over else ""


def _merge(world: Path, *, over: bool, exchange: bool = True) -> Scenario:
    def merge(folder: Path, adapter: str) -> None:
        if not exchange:
            disk.exchange = lambda *_: False
        merge_checkpoint(world / adapter, world / "base", folder / "out", overwrite=over or (folder / "out").exists())

    def prepare(folder: Path) -> None:
        if over:
            merge_checkpoint(world / "old", world / "base", folder / "out")

    def check(folder: Path, before: object, reference: object) -> str:
        found, known = _read_folder(folder), [each["files"] for each in (before, reference)]
        if over and not exchange and not (folder / "out").exists():
            return "" if any(folder.glob(".out.*.old")) else "the old model is gone, and not set aside"
        return "" if found["files"] in known else "neither the old nor the new model stands there"

    act = lambda folder: merge(folder, "new")
    what = "a new model" if not over else f"over an old model{', no exchange of names' * (not exchange)}"
    return Scenario("merge", what, prepare, act, act, _read_folder, check)


def _answers(world: Path) -> list[Scenario]:
    def call(*words: object) -> None:
        sys.argv = ["doralib", *map(str, words)]
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                raise

    found = []
    for verb, name, words in (
        ("generate", "answers.jsonl", ["--file", world / "prompts.txt", "--max-new-tokens", 2]),
        ("eval", "results.json", ["--tasks", world / "task.yaml", "--limit", 4]),
    ):
        act = lambda folder, verb=verb, name=name, words=words: call(
            verb, world / "new", "--base", world / "base", *words, "--out", folder / name
        )
        prepare = lambda folder, name=name: (folder / name).write_text("old")
        outcome = lambda folder, name=name: (_read_scores(folder / name), _find_litter(folder))
        found.append(Scenario(verb, "--out", prepare, act, act, outcome))
    return found


def _read_scores(path: Path) -> str:
    """A file's text without its clock."""
    text = path.read_text()
    return "\n".join(line for line in text.splitlines() if '"seconds"' not in line)


def _read_folder(folder: Path) -> dict:
    """Names and content of all files, but for scratch; torch's own archives as their tensors."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not _is_in_scratch(path, folder)]
    return {
        "files": {path.relative_to(folder).as_posix(): _read_content(path) for path in sorted(paths)},
        "litter": _find_litter(folder),
    }


def _read_content(path: Path) -> object:
    if path.suffix != ".pt":
        return path.read_bytes()
    try:
        return {name: tensor.tolist() for name, tensor in torch.load(path, weights_only=True).items()}
    except RuntimeError:
        return "damaged"


def _is_in_scratch(path: Path, folder: Path) -> bool:
    return any(is_scratch(Path(part)) for part in path.relative_to(folder).parts)


def _find_litter(folder: Path) -> list[str]:
    """Hidden names, of which none may be left at the end."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
