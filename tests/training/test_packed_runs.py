"""Runs on packed rows learn what runs on padded rows learn; and in which order a run sees its rows."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

from doralib.data.prepare import IGNORED
from doralib.errors import UsageError
from doralib.recipe import Recipe
from doralib.runs.report import write_report
from doralib.training.job import Interrupted, fine_tune, train
from doralib.training.modalities import text
from doralib.training.sampler import measure_padding
from doralib.training.trainer import AdapterTrainer

ROWS = [
    {"text": " ".join(["good", "film"][: 1 + i % 2] * (1 + i % 7)), "label": "ab"[i % 2] * (1 + i % 3)}
    for i in range(40)
]


@pytest.fixture
def recipe(tiny_llama_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(out, data=None, **training):
        return Recipe(
            model={"path": str(tiny_llama_folder)},
            data={"train": str(tmp_path / "t.jsonl"), "prompt": "{text}", "target": " {label}"} | (data or {}),
            adapter={"r": 2, "target_modules": ["q_proj", "down_proj"]},
            training={"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1, "warmup_steps": 0} | training,
            out=str(tmp_path / out),
        )

    return make


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.long
def test_a_packed_run_has_the_curve_of_a_padded_one(recipe):
    """Where a step sees all rows, however they are divided, its loss is the mean over the same tokens."""
    padded = fine_tune(recipe("padded", per_device_train_batch_size=40))
    packed = {"packing": True, "max_length": 48}
    whole = fine_tune(recipe("whole", packed, per_device_train_batch_size=40))
    parts = fine_tune(recipe("parts", packed, per_device_train_batch_size=2, gradient_accumulation_steps=40))
    one = fine_tune(recipe("one", packed, per_device_train_batch_size=1, gradient_accumulation_steps=40))
    tokens = [json.loads((run / "summary.json").read_text())["tokens"] for run in (padded, whole, parts, one)]
    assert len(set(tokens)) == 1
    for run in (whole, parts, one):
        assert losses(run) == pytest.approx(losses(padded), rel=1e-5)
    a, b = (load_file(run / "adapter_model.safetensors") for run in (padded, whole))
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


def test_a_packed_run_is_told_and_counted_by_sequences(recipe, caplog):
    with caplog.at_level("INFO", logger="doralib"):
        run = fine_tune(recipe("run", {"packing": True, "max_length": 48}, per_device_train_batch_size=2, max_steps=2))
    (told,) = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    count = int(told["packed"].split()[1])
    assert told["rows"] == "40 of 40"
    assert told["packed"].startswith(f"into {count} sequences of at most 48 tokens, 9")
    assert told["steps"].startswith(f"2, {-(-count // 2)} an epoch of about ")
    assert json.loads((run / "summary.json").read_text())["train_rows"] == 40


@pytest.mark.long
def test_a_packed_run_resumes_as_it_was(recipe, monkeypatch):
    settings = {"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 2}
    whole = fine_tune(recipe("whole", {"packing": True, "max_length": 48}, **settings))

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Interrupted("stop")
        return step(self, *args, **kwargs)

    step = AdapterTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", stop)
        with pytest.raises(Interrupted):
            fine_tune(recipe("cut", {"packing": True, "max_length": 48}, **settings))
    cut = fine_tune(recipe("cut", {"packing": True, "max_length": 48}, **settings), resume=True)
    assert losses(cut) == losses(whole)


def test_packing_by_default_gives_way_and_by_wish_does_not(recipe, monkeypatch, caplog):
    model = MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1))
    settings, wanted = recipe("x").data, recipe("x", {"packing": True}).data
    rows = text.check_rows(settings, 0)
    monkeypatch.setattr(text, "is_packed", lambda _: True)  # as for whole documents
    with caplog.at_level("INFO", logger="doralib"):
        data = text.prepare(rows, settings, model, make_tokenizer())
    assert "rows are not packed, each is padded: data.packing: MambaForCausalLM cannot keep" in caplog.text
    assert len(data.train.rows) == 40
    with pytest.raises(UsageError, match="cannot keep packed rows apart"):
        text.prepare(text.check_rows(wanted, 0), wanted, model, make_tokenizer())


def test_the_first_row_is_shown_and_the_report_has_the_data(recipe, caplog):
    with caplog.at_level("INFO", logger="doralib"):
        run = train(recipe("run", per_device_train_batch_size=8, max_steps=1))
    assert "the first row, what is learned of it in ⟦ ⟧:\ngood⟦ a<|im_end|>⟧" in caplog.text
    page = (run / "report.html").read_text()
    assert "<h2>Data</h2>" in page
    assert "<mark> a&lt;|im_end|&gt;</mark>" in page
    # a damaged file takes nothing else from the page
    (run / "data.json").write_text('{"splits": 3}')
    assert "<h2>Data</h2>" not in write_report(run, figures=False).read_text()


@pytest.mark.parametrize(
    ("rows", "given", "order"),
    [
        (ROWS, {}, "rows of like length together"),
        (ROWS[:1] * 20, {}, "drawn anew for each epoch"),
        (ROWS, {"train_sampling_strategy": "random"}, "drawn anew for each epoch"),
        (ROWS[:1] * 20, {"train_sampling_strategy": "group_by_length"}, "rows of like length together"),
    ],
)
def test_rows_are_grouped_where_their_lengths_differ(recipe, tmp_path, caplog, rows, given, order):
    wanted = recipe("run", per_device_train_batch_size=8, max_steps=1, **given)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", logger="doralib"):
        fine_tune(wanted)
    (told,) = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    assert told["order"] == order


def test_padding_of_batches_in_any_order():
    assert measure_padding([5] * 100, 8) == 0
    assert measure_padding([1, 9], 2) == pytest.approx(8 / 18)
    assert measure_padding([], 2) == 0


def test_labels_of_a_packed_rows_first_token_never_count(recipe, tiny_llama):
    model, tokenizer = tiny_llama
    settings = recipe("x", {"packing": True, "loss_on": "all"}).data
    data = text.prepare(text.check_rows(settings, 0), settings, model, tokenizer)
    counted = sum(sum(label != IGNORED for label in row["labels"]) for row in data.train.rows)
    assert counted == data.train.report.label_tokens
