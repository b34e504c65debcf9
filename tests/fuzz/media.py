"""More of what is damaged: pictures, sounds, videos and series with their rows, and diffusion pipelines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from films import write_video
from pipelines import make_pictures, make_pipeline
from speech_kinds import write_clips

from doralib.checkpoints.pipelines import load_pipeline, make_empty_pipeline
from doralib.data.captioned import open_captioned, read_caption, read_pictures
from doralib.data.clips import check_clips
from doralib.data.prepare import BadRow
from doralib.data.rows import read_both
from doralib.data.series import read_series
from doralib.data.sounds import hear_clip
from doralib.data.videos import Video, measure_video, open_video
from doralib.errors import DoraError
from doralib.recipe import DataSettings, ModelSettings, SeriesSettings

from .readers import Kind, copy_one, harm_file


def build(world: Path) -> None:
    """The whole files that are damaged."""
    for name in ("captioned", "listed"):
        make_pictures(world / name, captions=name == "captioned")
    shown = [{"file_name": f"{i}.png", "text": "a dog"} for i in range(4)]
    _write_rows(world / "listed" / "metadata.jsonl", shown)
    (world / "sounds").mkdir()
    write_clips(world / "sounds", 6)
    write_video(world / "film.mp4", (10, 90, 200))
    series = world / "series"
    series.mkdir()
    days = [f"2026-01-{i + 1:02d}" for i in range(28)]
    long = [{"date": day, "item": item, "value": i + 0.5} for item in "ab" for i, day in enumerate(days)]
    _write_rows(series / "long.jsonl", long)
    (series / "long.csv").write_text("".join(f"{','.join(map(str, row.values()))}\n" for row in [_NAMES, *long]))
    (series / "wide.csv").write_text("date,a,b\n" + "".join(f"{day},{i},{2 * i}\n" for i, day in enumerate(days)))
    lists = [{"start": days[0], "freq": "D", "target": [i + 0.5 * k for k in range(28)]} for i in range(3)]
    _write_rows(series / "lists.jsonl", lists)
    make_pipeline("sd15", world / "pipeline")


_NAMES = {"date": "date", "item": "item", "value": "value"}


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def _dropping() -> Iterator[None]:
    """A row that cannot be used is counted and told, by whoever reads all of them."""
    try:
        yield
    except BadRow as bad:
        raise DoraError(str(bad)) from None


def _read_pictures(path: Path, _world: Path) -> None:
    for row in read_pictures(DataSettings(train=str(path)), 0).train:
        with _dropping():
            open_captioned(row)
            read_caption(row)


def _read_sounds(path: Path, _world: Path) -> None:
    settings = DataSettings(train=str(path / "train.jsonl"), audio="audio", target="text")
    for row in check_clips(read_both(settings, 0), settings).train:
        with _dropping():
            if row["audio"]:
                hear_clip(row["audio"])


def _read_video(path: Path, _world: Path) -> None:
    with _dropping():
        film = measure_video(Video(str(path)), 4)
        if isinstance(film, BadRow):
            raise film
        open_video(Video(str(path)), film)


def _read_pipeline(path: Path, _world: Path) -> None:
    settings = ModelSettings(path=str(path))
    make_empty_pipeline(settings)
    load_pipeline(settings)


KINDS = [
    Kind("pictures", 4, copy_one("captioned", "listed"), harm_file, _read_pictures),
    Kind("sounds", 4, copy_one("sounds"), harm_file, _read_sounds),
    Kind("videos", 2, copy_one("film.mp4"), harm_file, _read_video),
    Kind(
        "series",
        6,
        copy_one(*(f"series/{name}" for name in ("long.jsonl", "long.csv", "wide.csv", "lists.jsonl"))),
        harm_file,
        lambda path, _: read_series(str(path), "data.train", SeriesSettings()),
    ),
    Kind("pipelines", 1, copy_one("pipeline"), harm_file, _read_pipeline),
]
