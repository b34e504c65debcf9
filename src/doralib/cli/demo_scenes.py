"""Scenes for a demo about pictures: one to four stamps on a canvas, and questions whose truth is known."""

import colorsys
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..errors import DoraError
from .demo_fetch import read_members

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 112
"""Pixels of a scene's side."""
ASK_FOR_CAPTION = "Describe the picture."
_CELL = SIDE // 2
_SEED = 0
_HELD_OUT = 5
"""One stamp of so many is for scenes that nothing is trained on."""

Part = Literal["captions", "train", "test"]
NUM_SCENES: Mapping[Part, int] = {"captions": 600, "train": 400, "test": 320}


@dataclass(frozen=True)
class _Kind:
    """Where stamps of a kind are found, in Tux Paint's folders and among the emoji's subcategories."""

    folders: tuple[str, ...] = ()
    subcategories: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    """Beginnings of names of what is none of the kind."""


KINDS: Mapping[str, _Kind] = {
    "bird": _Kind(("animals/birds/",), ("animal-bird",), ("FEATHER", "WING", "penguin_with")),
    "mammal": _Kind(("animals/mammals/", "animals/marsupials/"), ("animal-mammal",), ("PAW", "PIG NOSE")),
    "flower": _Kind(("plants/flowers/",), ("plant-flower",)),
    "fruit": _Kind(("food/fruit/",), ("food-fruit",)),
    "vehicle": _Kind(
        tuple(f"vehicles/{name}/" for name in ("auto", "construction", "emergency", "locomotive", "masstransit")),
        ("transport-ground",),
        (
            *("sedan_police", "trainSign", "BUS STOP", "HORIZONTAL", "VERTICAL", "CONSTRUCTION", "POLICE CARS REV"),
            *("OCTAGONAL", "WHEEL", "OIL", "MOTORWAY", "RAILWAY TRACK", "SKATEBOARD", "ROLLER", "FUEL", "METRO"),
        ),
    ),
    "building": _Kind(
        ("town/houses/",), ("place-building", "place-religious"), ("BUILDING CONS", "BRICK", "ROCK", "WOOD")
    ),
    "face": _Kind(("symbols/faces/",), ("face-smiling", "face-affection", "face-tongue", "face-concerned")),
    "letter": _Kind(("symbols/alphabets/english/filled/",)),
}

# hues in degrees, up to which a color goes
_HUES = (
    *((18, "red"), (42, "orange"), (70, "yellow"), (170, "green"), (255, "blue")),
    *((290, "purple"), (345, "pink"), (360, "red")),
)
_CLEAR = 0.6
"""So much of a stamp has a color that is called its own."""


@dataclass(frozen=True)
class Stamp:
    """A cut-out picture of something."""

    kind: str
    name: str
    data: bytes
    color: str | None = None
    """The color of most of it, where there is one."""


@dataclass(frozen=True)
class Scene:
    """Stamps in the four cells of a canvas, or one stamp anywhere."""

    stamps: Mapping[int, Stamp]
    """By cell, from the top left row by row."""

    @property
    def kinds(self) -> list[str]:
        return [stamp.kind for _, stamp in sorted(self.stamps.items())]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene and its answer."""

    task: str
    question: str
    answer: str


def read_stamps(tux: Path, emoji: Path) -> list[Stamp]:
    """The stamps of the kinds, by kind and name.

    Args:
        tux: Debian's package tuxpaint-stamps-default.
        emoji: npm's package emoji-datasource-google.

    Raises:
        DoraError: if they hold too few.
    """
    found: dict[tuple[str, str], bytes] = {}
    for name, data in read_members(tux, lambda name: name.endswith(".png")):
        inside = name.rpartition("/stamps/")[2]
        if kind := _find_kind(inside, inside.rpartition("/")[2]):
            found[kind, inside] = data
    files = dict(read_members(emoji, lambda name: name.endswith("/emoji.json") or "/img/google/64/" in name))
    for each in json.loads(files.get("package/emoji.json", b"[]")):
        file = f"package/img/google/64/{each['image']}"
        if file in files and (kind := _find_kind(each["subcategory"], each["name"])):
            found[kind, each["image"]] = files[file]
    counts = Counter(kind for kind, _ in found)
    if missing := [kind for kind in KINDS if counts[kind] < 2 * _HELD_OUT]:
        raise DoraError(f"{tux} and {emoji} hold too few stamps of {', '.join(missing)}; are they the whole packages?")
    return [Stamp(kind, name, data, _find_color(data)) for (kind, name), data in sorted(found.items())]


def _find_kind(place: str, name: str) -> str | None:
    """The kind of a stamp by its folder or subcategory."""
    for kind, where in KINDS.items():
        if (place.startswith(where.folders) or place in where.subcategories) and not name.startswith(where.without):
            return kind
    return None


def _open(data: bytes) -> "Image":
    from ..data.pictures import import_pillow

    opened = import_pillow().open(io.BytesIO(data)).convert("RGBA")
    return opened.crop(opened.getchannel("A").getbbox())


def _find_color(data: bytes) -> str | None:
    small = _open(data)
    small.thumbnail((24, 24))
    named: Counter[str] = Counter()
    for count, (r, g, b, a) in small.getcolors(small.width * small.height) or []:
        named[_name_color(r, g, b)] += count * (a > 128)
    name, count = named.most_common(1)[0] if named else (None, 0)
    return name if count > _CLEAR * named.total() else None


def _name_color(r: int, g: int, b: int) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.8 else "gray"
    name = next(name for end, name in _HUES if 360 * hue <= end)
    if name == "red" and saturation < 0.5 and value > 0.8:
        return "pink"
    return "brown" if name in ("red", "orange", "yellow") and value < 0.65 else name


def compose_scene(stamps: Mapping[str, Sequence[Stamp]], count: int, draw: random.Random) -> Scene:
    """A scene of so many stamps, each of a kind drawn first, so that rare kinds are as frequent as others."""
    cells = draw.sample(range(4), count)
    return Scene({cell: draw.choice(stamps[draw.choice(list(stamps))]) for cell in cells})


def paint_scene(scene: Scene, draw: random.Random) -> "Image":
    """The scene on white."""
    from ..data.pictures import import_pillow

    image = import_pillow()
    canvas = image.new("RGB", (SIDE, SIDE), "white")
    alone = len(scene.stamps) == 1
    for cell, stamp in sorted(scene.stamps.items()):
        room = SIDE if alone else _CELL
        side = draw.randint(SIDE // 2, SIDE - 8) if alone else draw.randint(_CELL - 12, _CELL - 2)
        picture = _open(stamp.data)
        scale = side / max(picture.size)
        width, height = (max(1, round(scale * each)) for each in picture.size)
        picture = picture.resize((width, height), image.Resampling.LANCZOS)
        left, top = draw.randint(0, room - width), draw.randint(0, room - height)
        if not alone:
            left, top = left + cell % 2 * _CELL, top + cell // 2 * _CELL
        canvas.paste(picture, (left, top), picture)
    return canvas


def describe_scene(scene: Scene) -> str:
    """What is seen, by kinds, and of one thing by its color: a bird and two flowers."""
    counts = Counter(scene.kinds)
    told = []
    for kind, count in counts.items():
        color = next(stamp.color for stamp in scene.stamps.values() if stamp.kind == kind)
        word = f"{color} {kind}" if color and len(scene.stamps) == 1 else kind
        told.append(f"{_NUMBERS[count]} {kind}s" if count > 1 else f"{'an' if word[0] in 'aeiou' else 'a'} {word}")
    return " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))


_NUMBERS = ("no", "one", "two", "three", "four")


def _ask_what(scene: Scene, draw: random.Random) -> SceneQuestion | None:  # noqa: ARG001
    alone = len(scene.stamps) == 1
    return SceneQuestion("what", "What is it?", scene.kinds[0]) if alone else None


def _ask_count(scene: Scene, draw: random.Random) -> SceneQuestion | None:  # noqa: ARG001
    return SceneQuestion("how_many", "How many things are there?", str(len(scene.stamps)))


def _ask_color(scene: Scene, draw: random.Random) -> SceneQuestion | None:  # noqa: ARG001
    stamp = next(iter(scene.stamps.values()))
    return SceneQuestion("color", "What color is it?", stamp.color) if len(scene.stamps) == 1 and stamp.color else None


def _ask_presence(scene: Scene, draw: random.Random) -> SceneQuestion | None:
    """As often of a kind that is there as of one that is not."""
    there = draw.random() < 0.5
    kind = draw.choice([kind for kind in KINDS if (kind in scene.kinds) == there])
    return SceneQuestion("yes_no", f"Is there a {kind}?", "yes" if there else "no")


def _ask_left(scene: Scene, draw: random.Random) -> SceneQuestion | None:
    """Of two things side by side."""
    sides = [
        (scene.stamps[cell].kind, scene.stamps[cell + 1].kind) for cell in (0, 2) if {cell, cell + 1} <= {*scene.stamps}
    ]
    clear = [pair for pair in sides if all(scene.kinds.count(kind) == 1 for kind in pair)]
    if not clear:
        return None
    one, other = draw.choice(clear)
    if turned := draw.random() < 0.5:
        one, other = other, one
    return SceneQuestion("left_of", f"Is the {one} left of the {other}?", "no" if turned else "yes")


def _ask_caption(scene: Scene, draw: random.Random) -> SceneQuestion | None:  # noqa: ARG001
    return SceneQuestion("caption", ASK_FOR_CAPTION, describe_scene(scene))


QUESTIONS: tuple[Callable[[Scene, random.Random], SceneQuestion | None], ...] = (
    _ask_what,
    _ask_count,
    _ask_color,
    _ask_presence,
    _ask_left,
    _ask_caption,
)
TASKS: Mapping[str, str] = {
    **dict.fromkeys(("what", "color", "how_many"), "vqa"),
    **dict.fromkeys(("yes_no", "left_of"), "yes_no"),
    "caption": "caption",
}
"""The kind by which each task is scored."""
_MORE_PRESENCE = 2
_MOST_TOKENS = 24
_MOST_ASKED = 60
"""Questions of a task."""


def ask_scene(scene: Scene, draw: random.Random) -> list[SceneQuestion]:
    """All that can be asked of a scene, in an order by chance; of presence several questions."""
    several = [_ask_presence] * _MORE_PRESENCE
    asked = [made for ask in (*QUESTIONS, *several) if (made := ask(scene, draw)) is not None]
    asked = list(dict.fromkeys(asked))
    draw.shuffle(asked)
    return asked


def write_scenes(stamps: Iterable[Stamp], out: Path) -> None:
    """Pictures, rows to train on and to score, and the tasks that score them.

    captions.jsonl has captions, train.jsonl conversations about scenes of the same stamps, and test.jsonl single
    questions about scenes of stamps that neither has.
    """
    (out / "pictures").mkdir(parents=True)
    draw, seen, held_out = random.Random(_SEED), *_divide(stamps)
    for part, count in NUM_SCENES.items():
        scenes: list[tuple[str, Scene]] = []
        for i in range(count):
            # of single stamps more can be asked
            scene = compose_scene(held_out if part == "test" else seen, _COUNTS[i % len(_COUNTS)], draw)
            name = f"pictures/{part}-{i:04}.png"
            paint_scene(scene, draw).save(out / name)
            scenes.append((name, scene))
        _WRITERS[part](scenes, draw, out)


_COUNTS = (1, 2, 1, 3, 4)
"""How many stamps a scene has, in turn."""


def _divide(stamps: Iterable[Stamp]) -> tuple[dict[str, list[Stamp]], dict[str, list[Stamp]]]:
    """The stamps that training sees, and of each kind a share by hash that it never sees."""
    seen: dict[str, list[Stamp]] = {}
    held_out: dict[str, list[Stamp]] = {}
    for stamp in sorted(stamps, key=lambda stamp: hashlib.sha256(stamp.name.encode()).digest()):
        seen.setdefault(stamp.kind, []).append(stamp)
    for kind, found in seen.items():
        count = len(found) // _HELD_OUT
        held_out[kind], seen[kind] = found[:count], found[count:]
    return seen, held_out


def _write_captions(scenes: Sequence[tuple[str, Scene]], draw: random.Random, out: Path) -> None:  # noqa: ARG001
    rows = [{"image": name, "caption": describe_scene(scene)} for name, scene in scenes]
    _write_rows(out / "captions.jsonl", rows)


def _write_talks(scenes: Sequence[tuple[str, Scene]], draw: random.Random, out: Path) -> None:
    rows = [{"images": [name], "messages": _make_talk(ask_scene(scene, draw))} for name, scene in scenes]
    _write_rows(out / "train.jsonl", rows)


def _write_tests(scenes: Sequence[tuple[str, Scene]], draw: random.Random, out: Path) -> None:
    asked: dict[str, list[tuple[str, SceneQuestion]]] = {task: [] for task in TASKS}
    for name, scene in scenes:
        for each in ask_scene(scene, draw):
            asked[each.task].append((name, each))
    for task, found in asked.items():
        found[:] = found[:_MOST_ASKED]
        rows = [{"image": name, "question": each.question, "answer": each.answer} for name, each in found]
        _write_rows(out / f"{task}.jsonl", rows)
        settings: dict[str, Any] = {"name": task, "kind": TASKS[task], "data": f"{task}.jsonl", "images": "image"}
        settings |= {"prompt": "question", "answer": "answer", "max_new_tokens": _MOST_TOKENS}
        (out / f"{task}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    # the report shows the first: some of each task, of scenes in turn
    mixed = [found[i] for i in range(4) for found in asked.values() if i < len(found)]
    _write_rows(out / "test.jsonl", [{"images": [name], "messages": _make_talk([each])} for name, each in mixed])


_WRITERS: Mapping[Part, Callable[[Sequence[tuple[str, Scene]], random.Random, Path], None]] = {
    "captions": _write_captions,
    "train": _write_talks,
    "test": _write_tests,
}


def _make_talk(asked: Sequence[SceneQuestion]) -> list[dict[str, str]]:
    turns = [({"role": "user", "content": a.question}, {"role": "assistant", "content": a.answer}) for a in asked]
    return [message for turn in turns for message in turn]


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")
