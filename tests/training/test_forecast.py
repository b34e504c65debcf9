"""Series over time from the recipe to the forecast: four models, each trained, asked, scored, merged and resumed."""

import csv
import json
import os
import signal

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from doralib.checkpoints.load import load_model
from doralib.data.forecaster import forecast
from doralib.errors import DoraError, UsageError
from doralib.recipe import Recipe
from doralib.runs.report import write_report
from doralib.training import callbacks
from doralib.training.job import Interrupted, fine_tune, look_ahead

pytest.importorskip("utilsforecast", reason="utilsforecast is not installed")

PATCHES = {"context_length": 24, "prediction_length": 6, "patch_length": 4, "patch_stride": 4, "d_model": 16}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "head_dim": 8}
LENGTHS = {"context_length": 24, "horizon_length": 6, "patch_length": 4}
CONFIGS = {
    "TimesFm2_5ModelForPrediction": lambda: transformers.TimesFm2_5Config(
        **SIZES, **LENGTHS, num_key_value_heads=2, output_quantile_len=6
    ),
    "TimesFmModelForPrediction": lambda: transformers.TimesFmConfig(**SIZES, **LENGTHS),
    "PatchTSTForPrediction": lambda: transformers.PatchTSTConfig(
        **PATCHES, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, num_input_channels=3, loss="nll"
    ),
    "PatchTSMixerForPrediction": lambda: transformers.PatchTSMixerConfig(
        **PATCHES, num_layers=2, dropout=0.0, head_dropout=0.0
    ),
}


TIMESFM, PATCHTST = "TimesFm2_5ModelForPrediction", "PatchTSTForPrediction"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each model, with random weights; not to be written to."""
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name) / "base"
        getattr(transformers, name)(config()).save_pretrained(found[name])
    return found


@pytest.fixture
def recipe(bases, tmp_path):
    lines = [
        f"{name},20{10 + i // 12}-{i % 12 + 1:02d}-01,{(k + 1) * (9 + np.sin(i * np.pi / 6 + k)) + i / 9:.3f}\n"
        for k, name in enumerate("abcd")
        for i in range(48)
    ]
    (tmp_path / "sales.csv").write_text("series,date,value\n" + "".join(lines))

    def make(name=TIMESFM, **changes):
        values = {
            "model": {"path": str(bases[name])},
            "data": {"train": str(tmp_path / "sales.csv"), "validation": 0.25},
            "adapter": {"r": 4},
            "training": {"max_steps": 12, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 6},
            "eval": {"before": True},
            "out": str(tmp_path / "run"),
        }
        for group, given in changes.items():
            values[group] = {**values[group], **given} if isinstance(given, dict) else given
        return Recipe(**values)

    return make


def ask(model, context=24):
    pasts = [np.sin(np.arange(24) * (i + 1) / 3) * (i + 1) + 4 * i for i in range(3)]
    return np.stack(forecast(model, pasts, [1] * 3, context, 3, lambda _: None))


@pytest.mark.parametrize(
    "name",
    [
        TIMESFM,
        *(pytest.param(name, marks=pytest.mark.long) for name in CONFIGS if name != TIMESFM),
    ],
)
def test_from_the_recipe_to_the_merged_model(run, recipe, bases, tmp_path, name):
    folder = fine_tune(recipe(name))
    write_report(folder, figures=False)
    results = json.loads((folder / "results.json").read_text())
    before, after = (results[when]["validation"]["metrics"] for when in ("before", "after"))
    quantiles = ["pinball"] if name != "PatchTSMixerForPrediction" else []
    assert list(after) == ["mase", "smape", *quantiles, "naive_mase"]
    assert after["naive_mase"] == before["naive_mase"]
    assert after["mase"]["value"] < before["mase"]["value"]
    page = (folder / "report.html").read_text()
    assert "Forecasts" in page
    assert "a from 2013-07-01" in page
    assert page.count('class="band') == (8 if quantiles else 0)
    assert "What it says" not in page
    form = json.loads((folder / "doralib_series.json").read_text())
    assert (form["context"], form["horizon"]) == (24, 6)

    model, _ = load_model(str(folder))
    want = ask(model)
    kind = getattr(transformers, name)
    channels = {"num_input_channels": 1} if name == "PatchTSTForPrediction" else {}
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(bases[name], **channels), folder)
    np.testing.assert_allclose(ask(theirs.get_base_model().eval()), want, rtol=1e-3, atol=1e-4)
    status, out, err = run("merge", folder, "--out", tmp_path / "merged", "--verify")
    assert status == 0, err
    assert "forecasts differ by" in out
    np.testing.assert_allclose(ask(load_model(str(tmp_path / "merged"))[0]), want, rtol=1e-3, atol=1e-4)

    status, _, _ = run("generate", folder, "--file", tmp_path / "sales.csv", "--out", tmp_path / "f.csv")
    assert status == 0
    with (tmp_path / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["time"] for row in rows[:6]] == [f"2014-0{month}-01" for month in range(1, 7)]
    assert len(rows) == 4 * 6
    assert ("0.9" in rows[0]) == bool(quantiles)
    (tmp_path / "task.yaml").write_text(
        yaml.safe_dump({"kind": "forecast", "data": "sales.csv", "series": {"horizon": 6}})
    )
    scores = []
    for each in (folder, tmp_path / "merged"):
        status, out, err = run("eval", each, "--tasks", tmp_path / "task.yaml", "--json")
        assert status == 0, err
        scores.append(json.loads(out)["task"]["metrics"]["mase"]["value"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def measured(folder, kind="train", key="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[key] for line in lines if line["kind"] == kind and key in line])


@pytest.mark.parametrize("name", [TIMESFM, "PatchTSMixerForPrediction"])
def test_the_loss_is_the_mean_over_windows_whatever_the_batches(recipe, name):
    """Short series too, of which some windows are padded; the last batch of validation is not whole."""
    found = []
    for i, each in enumerate(
        [
            {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 8},
        ]
    ):
        training = {"max_steps": 3, "train_sampling_strategy": "random", "save_steps": 1, **each}
        wanted = recipe(name, training=training, eval={"before": False}, out=f"{recipe().out}{i}")
        folder = fine_tune(wanted)
        found.append((measured(folder), measured(folder, "eval", "eval_loss")))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_validation_is_the_end_of_each_series_or_another_file(recipe, tmp_path):
    told = look_ahead(recipe()).data
    # of 48 values 12 are held out: two windows of 6; training ends at 36, and its pasts have at least 15
    assert told.told["windows"] == "64 of 24 and 6 values, 8 held out"
    assert sorted(set(told.train.rows["origin"])) == list(range(15, 31))
    assert sorted(set(told.validation.rows["origin"])) == [36, 42]
    other = (tmp_path / "sales.csv").read_text().replace("\na,", "\nx,").replace("\nb,", "\ny,")
    (tmp_path / "other.csv").write_text(other)
    held = look_ahead(recipe(data={"validation": str(tmp_path / "other.csv"), "series": {"stride": 5}})).data
    assert sorted(set(held.train.rows["origin"])) == [22, 27, 32, 37, 42]
    assert sorted(set(held.validation.rows["origin"])) == [24, 30, 36, 42]
    assert min(held.validation.rows["series"]) == 4
    assert look_ahead(recipe(data={"validation": None})).data.validation is None


def test_short_series_are_left_out_by_name(recipe, tmp_path, caplog):
    short = "".join(f"short,2020-{m:02d}-01,{m}\n" for m in range(1, 12))
    with (tmp_path / "sales.csv").open("a") as file:
        file.write(short)
    outlook = look_ahead(recipe(data={"validation": None}))
    assert "  row short: 11 values, 6 are forecast at once" in outlook.notes
    assert outlook.facts["rows"] == "4 of 5 series: values in 'value', times in 'date', series by 'series'"
    with pytest.raises(DoraError, match=r"data\.bad_rows is 'error'"):
        look_ahead(recipe(data={"bad_rows": "error"}))
    (tmp_path / "sales.csv").write_text("series,date,value\n" + short)
    with pytest.raises(UsageError, match="no row can be used"):
        look_ahead(recipe())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (TIMESFM, {"series": {"horizon": 7}}, "horizon is 7, and the model forecasts at most 6"),
        (PATCHTST, {"series": {"horizon": 4}}, "horizon is 4, and the model is trained on no other than 6"),
        (PATCHTST, {"series": {"context": 12}}, "context is 12, and the model always looks back on 24"),
        (TIMESFM, {"series": {"context": 48}}, "context is 48, and the model looks back on at most 24"),
        (TIMESFM, {"train": [{"path": "a.csv", "weight": 2}]}, "series have no weight"),
        (TIMESFM, {"series": {"horizn": 7}}, "did you mean 'horizon'"),
    ],
)
def test_refusals(recipe, name, data, said):
    with pytest.raises(UsageError, match=said):
        look_ahead(recipe(name, data=data))


def test_full_fine_tuning_keeps_the_form_with_the_model(run, recipe, tmp_path):
    changes = {"data": {"series": {"context": 16}}, "eval": {"before": False}}
    folder = fine_tune(recipe(adapter={"method": "full"}, training={"max_steps": 2}, **changes))
    model, form = load_model(str(folder))
    assert type(model).__name__ == "TimesFm2_5ModelForPrediction"
    assert form.settings.context == 16
    status, out, _ = run("generate", folder, "--file", tmp_path / "sales.csv", "--horizon", 2)
    assert status == 0
    assert len(out.splitlines()) == 1 + 4 * 2


def test_what_generate_says_to_what_it_cannot_do(run, recipe, bases, tmp_path, tiny_llama_folder):
    base = bases[TIMESFM]
    status, _, err = run("generate", base, "--prompt", "hello")
    assert (status, "is given no text; use --file" in err) == (2, True)
    status, _, err = run("generate", base)
    assert (status, "give them as --file" in err) == (2, True)
    (tmp_path / "flat.csv").write_text("time,value\n1,5\n2,5\n")
    status, _, err = run("generate", base, "--file", tmp_path / "flat.csv")
    assert (status, "no series of" in err, "each of its 2 values is 5" in err) == (2, True, True)
    status, _, err = run("generate", tiny_llama_folder, "--prompt", "x", "--horizon", 3)
    assert (status, "does not forecast series" in err) == (2, True)
    status, out, err = run("plan", _write(recipe(), tmp_path))
    assert (status, "activations" in out) == (0, True), err
    status, out, err = run("check", _write(recipe(), tmp_path))
    assert (status, "64 of 24 and 6 values, 8 held out" in out) == (0, True), err


def _write(recipe, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return folder / "recipe.yaml"


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(recipe, monkeypatch):
    training = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = fine_tune(recipe(training=training, adapter={"lora_dropout": 0.1}, out=recipe().out + "-whole"))
    cut = recipe(training=training, adapter={"lora_dropout": 0.1})

    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.StepLog, "on_step_begin", stop, raising=False)
        with pytest.raises(Interrupted):
            fine_tune(cut)
    folder = fine_tune(cut, resume=True)
    for name, tensor in load_file(whole / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(folder / "adapter_model.safetensors")[name], tensor)
    torch.testing.assert_close(measured(folder), measured(whole))


def test_a_model_of_several_series_together_is_refused(recipe, tmp_path):
    config = CONFIGS["PatchTSMixerForPrediction"]()
    config.mode, config.num_input_channels = "mix_channel", 3
    transformers.PatchTSMixerForPrediction(config).save_pretrained(tmp_path / "mixed")
    with pytest.raises(UsageError, match="reads 3 series together"):
        look_ahead(recipe(model={"path": str(tmp_path / "mixed")}))
