"""The folder of VALUE's video tasks: TVQA, How2QA, TVC and YC2C over frames in npz, with subtitles."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DoraError
from ...files import read_json
from .task import Asked, Layout, LayoutTask, Scoring, Split, pick, read_lines

_SPLITS = {
    "train": ("train_release", "train"),
    "validation": ("val_release", "val"),
    "test": ("test_public_release", "test_release", "test_public", "test"),
}


@dataclass(frozen=True)
class _ValueTask:
    """The reader of one task."""

    name: str
    videos: str
    """tv, how2 or yc2."""
    choices: int = 0
    has_times: bool = True

    def list_files(self, root: Path, split: Split) -> list[Path]:
        """The rows, and the subtitles."""
        notes = _find_notes(root)
        rows = [notes / self.name / f"{self.name}_{name}.jsonl" for name in _SPLITS[split]]
        return [next(filter(Path.is_file, rows), rows[0]), notes / f"{self.videos}_subtitles.jsonl"]

    def read(self, root: Path, split: Split, features: str) -> Iterator[Asked]:
        """The rows; in training one for each caption of a clip."""
        file, subtitles = self.list_files(root, split)
        spoken = _read_subtitles(subtitles)
        solution = _read_solution(file.with_name(f"{self.name}_{'val' if split == 'validation' else split}"))
        above = _find_notes(root).parent
        folder, films = above / "vis_features" / self.videos / features, above / "videos" / self.videos
        for number, row in enumerate(read_lines(file), 1):
            video = str(pick(row, "vid_name", file, number))
            said = spoken.get(video, "")
            shared: dict[str, Any] = {"features": (str(folder / f"{video}.npz"),), "spare": len(said)}
            shared["pictures"] = (str(films / video),)
            if self.choices:
                yield self._read_question(row, file, number, said, solution, shared)
            else:
                yield from self._read_clip(row, file, number, said, split, shared)

    def _read_question(
        self,
        row: Mapping[str, Any],
        file: Path,
        number: int,
        said: str,
        solution: Mapping[str, int],
        shared: dict[str, Any],
    ) -> Asked:
        choices = [str(pick(row, f"a{i}", file, number)).strip(". ") for i in range(self.choices)]
        parts = [
            f"[Subs] {said}",
            f"[Q] {str(pick(row, 'q', file, number)).strip()}",
            f"[TS] ({pick(row, 'ts', file, number)})",
            "[Choices] " + " ".join(f"a{i}: {choice}." for i, choice in enumerate(choices)),
        ]
        key = str(pick(row, "qid", file, number))
        right = row.get("answer_idx", solution.get(key))
        if right is not None and right not in range(self.choices):
            raise DoraError(f"{file}: row {number} has answer_idx {right!r}, of {self.choices} choices")
        known: dict[str, Any] = {} if right is None else {"targets": (f"a{right}",), "scores": (1.0,)}
        return Asked(key=key, text=self._close(parts), told={"qid": row["qid"]}, **known, **shared)

    def _read_clip(
        self, row: Mapping[str, Any], file: Path, number: int, said: str, split: Split, shared: dict[str, Any]
    ) -> Iterator[Asked]:
        parts = [f"[Subs] {said}", *([f"[TS] ({pick(row, 'ts', file, number)})"] if self.has_times else [])]
        clip, video = pick(row, "clip_id", file, number), row["vid_name"]
        told = {"vid_name" if self.has_times else "video_id": video, "clip_id": clip}
        told |= {"ts": row["ts"]} if self.has_times else {}
        captions = tuple(str(each["desc"]) for each in row.get("descs") or ())
        given: dict[str, Any] = {"text": self._close(parts), "answers": captions, "told": told, **shared}
        if not captions:
            yield Asked(key=str(clip), **given)
        for i, caption in enumerate(captions if split == "train" else captions[:1]):
            yield Asked(key=f"{clip} {i}", targets=(caption,), scores=(1.0,), **given)

    def _close(self, parts: list[str]) -> str:
        """The task's name comes last."""
        return f"{' '.join(parts)} {self.name}: "


def _find_notes(root: Path) -> Path:
    return next((folder for folder in (root / "ann", root / "video" / "ann") if folder.is_dir()), root / "ann")


def _read_subtitles(file: Path) -> dict[str, str]:
    """All that is said in each video."""
    return {
        str(pick(row, "vid_name", file, number)): " ".join(str(each["text"]).strip() for each in row.get("sub") or ())
        for number, row in enumerate(read_lines(file), 1)
    }


def _read_solution(stem: Path) -> dict[str, int]:
    """The right choices that stand in a file of their own, for all shows together."""
    file = stem.with_name(f"{stem.name}_solution.json")
    if not file.is_file():
        return {}
    shows = pick(read_json(file), "solution", file, 1).values()
    return {str(key): right for show in shows for key, right in show.items()}


def _make_task(task: _ValueTask) -> LayoutTask:
    scoring: Scoring = "choice" if task.choices else "caption"
    return LayoutTask(task.read, task.list_files, scoring, target_tokens=20, text_tokens=600, choices=task.choices)


VALUE = Layout(
    {
        "tvqa": _make_task(_ValueTask("tvqa", "tv", choices=5)),
        "how2qa": _make_task(_ValueTask("how2qa", "how2", choices=4)),
        "tvc": _make_task(_ValueTask("tvc", "tv")),
        "yc2c": _make_task(_ValueTask("yc2c", "yc2", has_times=False)),
    },
    "clip-vit",
)
