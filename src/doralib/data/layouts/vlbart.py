"""The folder of VL-BART's image tasks, as VL-T5 published it: VQA, GQA, NLVR2 and COCO captions over grids in HDF5."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...files import read_json
from .task import Asked, Layout, LayoutTask, Split, pick

_VQA = {"train": "karpathy_train", "validation": "karpathy_val", "test": "karpathy_test"}
_GQA = {"train": ("train", "valid"), "validation": ("testdev",), "test": ("testdev",)}
_NLVR = {"train": "train", "validation": "valid", "test": "test"}
_CAPTION = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
# the pictures of Karpathy's validation and test are of COCO's validation
_PEOPLE = "vqa/v2_mscoco_val2014_annotations.json"


def _list_vqa(root: Path, split: Split) -> list[Path]:
    people = root / _PEOPLE
    return [root / "vqa" / f"{_VQA[split]}.json", *([people] if split != "train" and people.is_file() else [])]


def _read_vqa(root: Path, split: Split, features: str) -> Iterator[Asked]:
    file, *people = _list_vqa(root, split)
    answers = _read_people(people[0]) if people else {}
    for number, row in enumerate(read_json(file, list), 1):
        question = str(row["sent"] if "sent" in row else pick(row, "question", file, number))
        key, image = pick(row, "question_id", file, number), str(pick(row, "img_id", file, number))
        labels: Mapping[str, float] = row.get("label") or {}
        yield Asked(
            key=str(key),
            text=f"vqa: {question}",
            features=(str(root / "COCO" / features / f"{image}.h5"),),
            targets=tuple(map(str, labels)),
            scores=tuple(map(float, labels.values())),
            answers=answers.get(str(key), ()),
            pictures=(str(root / "COCO" / "images" / image),),
            told={"question_id": key},
        )


def _read_people(file: Path) -> dict[str, tuple[str, ...]]:
    """What ten people answered to each question."""
    rows = pick(read_json(file), "annotations", file, 1)
    return {
        str(pick(row, "question_id", file, number)): tuple(str(each["answer"]) for each in row["answers"])
        for number, row in enumerate(rows, 1)
    }


def _list_gqa(root: Path, split: Split) -> list[Path]:
    return [root / "GQA" / f"{name}.json" for name in _GQA[split]]


def _read_gqa(root: Path, split: Split, features: str) -> Iterator[Asked]:
    folder = "VG" if split == "train" else "GQA"
    for file in _list_gqa(root, split):
        for number, row in enumerate(read_json(file, list), 1):
            key, image = pick(row, "question_id", file, number), str(pick(row, "img_id", file, number))
            labels: Mapping[str, float] = row.get("label") or {}
            yield Asked(
                key=str(key),
                # the prefix is spelled so
                text=f"gpa: {pick(row, 'sent', file, number)}",
                features=(str(root / folder / features / f"{image}.h5"),),
                targets=tuple(map(str, labels)),
                scores=tuple(map(float, labels.values())),
                pictures=(str(root / folder / "images" / image),),
                told={"questionId": str(key)},
            )


def _list_nlvr(root: Path, split: Split) -> list[Path]:
    return [root / "nlvr" / f"{_NLVR[split]}.json"]


def _read_nlvr(root: Path, split: Split, features: str) -> Iterator[Asked]:
    file = _list_nlvr(root, split)[0]
    for number, row in enumerate(read_json(file, list), 1):
        images = [str(pick(row, name, file, number)) for name in ("img0", "img1")]
        label, key = row.get("label"), str(row.get("identifier", row.get("uid", number)))
        yield Asked(
            key=key,
            text=f"nlvr: {pick(row, 'sent', file, number)}",
            features=tuple(str(root / "nlvr" / features / f"{image}.h5") for image in images),
            targets=() if label is None else (("false", "true")[int(label)],),
            scores=() if label is None else (1.0,),
            pictures=tuple(str(root / "nlvr" / "images" / image) for image in images),
            told={"identifier": key},
        )


def _list_captions(root: Path, split: Split) -> list[Path]:  # noqa: ARG001  one file for all
    return [root / "COCO" / "dataset_coco.json"]


def _read_captions(root: Path, split: Split, features: str) -> Iterator[Asked]:
    file = _list_captions(root, split)[0]
    for number, row in enumerate(pick(read_json(file), "images", file, 1), 1):
        if pick(row, "split", file, number) not in _CAPTION[split]:
            continue
        image = Path(str(pick(row, "filename", file, number))).stem
        captions = tuple(_read_sentence(each) for each in pick(row, "sentences", file, number))
        shared: dict[str, Any] = {
            "text": "caption: ",
            "features": (str(root / "COCO" / features / f"{image}.h5"),),
            "answers": captions,
            "pictures": (str(root / "COCO" / "images" / image),),
            "told": {"image_id": row.get("cocoid", image)},
        }
        for i, caption in enumerate(captions if split == "train" else captions[:1]):
            yield Asked(key=f"{image} {i}", targets=(caption,), scores=(1.0,), **shared)


def _read_sentence(sentence: Mapping[str, Any]) -> str:
    return str(sentence["raw"]).strip()


VLBART = Layout(
    {
        "vqa": LayoutTask(_read_vqa, _list_vqa, "vqa", target_tokens=10, text_tokens=20),
        "gqa": LayoutTask(_read_gqa, _list_gqa, "label", target_tokens=10, text_tokens=20),
        "nlvr": LayoutTask(_read_nlvr, _list_nlvr, "truth", target_tokens=10),
        "caption": LayoutTask(_read_captions, _list_captions, "caption", target_tokens=40, text_tokens=20),
    },
    "clip_features/data_clip_RN101_att",
)
