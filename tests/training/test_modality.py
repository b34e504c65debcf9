"""A job on data that are no text: the life cycle and the trainer need the five functions of a modality and no more."""

import json
from types import SimpleNamespace

import datasets
import torch
from conftest import make_llama

from doralib.data.prepare import PreparedRows, RowReport, Sample
from doralib.data.rows import RawRows
from doralib.recipe import Recipe
from doralib.training.job import train
from doralib.training.modalities import MODALITIES, text
from doralib.training.modality import Prepared


class Processor:
    """Knows no words; a checkpoint only keeps it."""

    def save_pretrained(self, folder, **_):
        pass


def numbers(calls):
    """Rows of numbers as they are, each the label of the one before it."""

    def check_rows(settings, seed):
        calls.append("check_rows")
        rows = datasets.Dataset.from_dict({"numbers": [[i, i + 1, i + 2, i + 3] for i in range(3, 35)]})
        return RawRows(rows.select(range(24)), rows.select(range(24, 32)), tuple(range(24)), tuple(range(24, 32)))

    def load(settings, *, empty=False):
        calls.append("load")
        return make_llama(), Processor()

    def prepare(rows, settings, model, processor, tick=None):
        calls.append("prepare")
        made = lambda rows: PreparedRows(
            rows.map(lambda row: {"length": len(row["numbers"])}),
            RowReport(len(rows), len(rows), {}, 0, 4 * len(rows), 3 * len(rows), ()),
        )
        return Prepared(made(rows.train), made(rows.validation), [Sample("3 4", "5 6")])

    def collate(model, processor, data):
        calls.append("collate")

        def batch(rows):
            ids = torch.tensor([row["numbers"] for row in rows])
            return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

        return batch

    def samples(model, processor, settings, asked):
        calls.append("samples")
        assert asked[0]["expected"] == "5 6"
        return ["7"]

    return SimpleNamespace(check_rows=check_rows, load=load, prepare=prepare, collate=collate, samples=samples)


def test_a_job_needs_no_text(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(MODALITIES, "text", numbers(calls))
    recipe = Recipe(
        model={"path": "none"},
        data={"train": "none"},
        adapter={"r": 2, "target_modules": ["q_proj"]},
        training={"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 2},
        out=str(tmp_path / "run"),
    )
    run = train(recipe)
    assert calls == ["check_rows", "load", "prepare", "samples", "collate", "samples"]
    for name in ("adapter_model.safetensors", "report.html", "metrics.jsonl"):
        assert (run / name).is_file()
    (sample,) = json.loads((run / "samples.json").read_text())
    assert sample == {"prompt": "3 4", "expected": "5 6", "given": {}, "before": "7", "after": "7"}
    assert json.loads((run / "summary.json").read_text())["tokens"] == 6 * 4 * 4


def test_every_modality_has_the_same_five_functions():
    assert MODALITIES["text"] is text
    for modality in MODALITIES.values():
        assert all(callable(getattr(modality, name)) for name in vars(numbers([])))
