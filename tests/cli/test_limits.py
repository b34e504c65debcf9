"""Numbers that no run can hold are refused before anything is loaded, and options that nothing would read."""

import json
import shutil

import pytest

from doralib.checkpoints.pipelines import read_pipeline_index
from doralib.data.templates import columns_in, fill_template
from doralib.errors import DoraError

RECIPE = """
model: {path: MODEL}
data: {train: rows.jsonl, prompt: "{text}", target: " {text}"}
adapter: {r: 2, target_modules: [q_proj]}
training: {max_steps: 1, per_device_train_batch_size: 2}
out: run
"""
LONG = "9" * 20


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_llama_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 4)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(tiny_llama_folder)))
    return "r.yaml"


@pytest.mark.parametrize(
    "settings",
    [
        ["adapter.r=1000000000", "adapter.lora_alpha=1.0e30", "adapter.loraplus_lr_ratio=1.0e300"],
        [f"adapter.r={LONG}", "adapter.lora_alpha=.inf", "adapter.magnitude_lr_ratio=.nan"],
        [f"seed={LONG}", "adapter.rank_pattern={q: 1000000000}", "adapter.alpha_pattern={q: 1.0e39}"],
        [f"data.max_length={LONG}", f"data.limit={LONG}", f"eval.limit={LONG}", f"eval.batch_size={LONG}"],
        ["training.learning_rate=1.0e300", f"training.per_device_train_batch_size={LONG}"],
        [f"training.max_steps={LONG}", f"training.gradient_accumulation_steps={LONG}"],
        ["training.learning_rate=.inf", "training.weight_decay=.nan", "training.max_grad_norm=.inf"],
    ],
)
def test_settings_beyond_what_a_run_can_hold(run, recipe, tmp_path, settings):
    status, _, err = run("train", recipe, *settings)
    assert status == 2, err
    for setting in settings:
        assert setting.partition("=")[0] in err, err
    assert not (tmp_path / "run").exists()


def test_fp16_on_a_cpu(run, recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run("train", recipe, "training.fp16=true")
    assert status == 2
    assert "training.fp16 needs a GPU" in err


@pytest.mark.parametrize(
    "options",
    [
        *(["--temperature", value] for value in ("inf", "nan", "1e-45", "-1", "1e300")),
        *(["--seed", value] for value in ("-1", LONG)),
        *(["--alpha", value] for value in ("inf", "nan", "1e39", "0")),
        *(["--repetition-penalty", value] for value in ("0", "inf", "nan")),
        *(
            ["--top-p", "nan"],
            ["--top-k", LONG],
            ["--min-p", "nan"],
            ["--batch-size", LONG],
            ["--max-new-tokens", LONG],
        ),
    ],
)
def test_numbers_on_the_command_line(run, tiny_llama_folder, options):
    status, _, err = run("generate", tiny_llama_folder, "--prompt", "a", *options)
    assert status == 2, err
    assert options[0].lstrip("-").replace("-", "_") in err.replace("-", "_")


@pytest.mark.parametrize("options", [["--base", "other"], ["--alpha", "3"], ["--base", "other", "--alpha", "3"]])
@pytest.mark.parametrize("verb", [["generate", "--prompt", "a"], ["eval", "--tasks", "t.yaml"]])
def test_what_only_adapters_have_is_refused_with_a_model(run, recipe, tmp_path, tiny_llama_folder, verb, options):
    (tmp_path / "t.yaml").write_text("{kind: perplexity, name: p, data: rows.jsonl, text: text}")
    status, _, err = run(verb[0], tiny_llama_folder, *verb[1:], *options)
    assert status == 2
    assert f"{', '.join(options[::2])}: {tiny_llama_folder} is a model and no adapter" in err


def test_a_template_names_columns_and_never_reaches_into_values():
    # what str.format would answer with an attribute is a column of that name, which no row has
    for reach in ("text.__class__", "text.__class__.__mro__[1]", "text[0]", "0.__init__.__globals__"):
        assert columns_in(f"a {{{reach}}}") == [reach]
        with pytest.raises(KeyError):
            fill_template(f"a {{{reach}}}", {"text": "b"})
        assert fill_template(f"a {{{reach}}}", {reach: "c"}) == "a c"
    assert fill_template("{text}", {"text": "{text.__class__} {0}"}) == "{text.__class__} {0}"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_hidden_layers": 10**20}, "num_hidden_layers 100000000000000000000"),
        ({"num_hidden_layers": 10**9, "num_labels": 10**9}, "num_hidden_layers 1000000000, num_labels 1000000000"),
        ({"text_config": {"depths": [2, 10**6]}}, "depths 1000000"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["train", "r.yaml", "model.path=BASE"],
        ["check", "r.yaml", "model.path=BASE"],
        ["plan", "r.yaml", "model.path=BASE"],
        ["generate", "BASE", "--prompt", "a"],
        ["targets", "BASE"],
        ["features", "pictures", "--model", "BASE", "--out", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_base_of_more_layers_than_any_model_has(run, recipe, tmp_path, tiny_llama_folder, words, settings, named):
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | settings))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not read before the model")
    status, _, err = run(*(word.replace("BASE", str(base)) for word in words))
    assert status in (1, 2)
    assert f"config.json is damaged, no model has so many: {named}" in " ".join(err.split())


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("unet/config.json", {"layers_per_block": [1, 10**6], "heads": 10**6}, "layers_per_block 1000000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000"),
    ],
)
def test_a_pipeline_of_more_layers_or_steps_than_any_has(tmp_path, file, values, named):
    (tmp_path / file).parent.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(DoraError, match=rf"config\.json is damaged, .* so many: {named}$"):
        read_pipeline_index(str(tmp_path))
