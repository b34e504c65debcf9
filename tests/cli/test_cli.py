"""The command line as its user meets it: what each verb prints, and what bad input gets: one message, 2 or 1."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer

import doralib
from doralib.config import DoraConfig
from doralib.experiments.bench.runner import BENCHES
from doralib.recipe import Recipe
from doralib.training.recipe_file import packaged_recipes, read_recipe

ROWS = [{"text": f"a {word} film", "label": label} for word, label in [("good", "positive"), ("bad", "negative")] * 8]


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder):
    """A recipe file of a small job, with one task."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    task = tmp_path / "sentiment.yaml"
    labels = {"positive": " positive", "negative": " negative"}
    task.write_text(
        yaml.safe_dump(
            {
                "kind": "classification",
                "data": str(data),
                "prompt": "Review: {text}\nSentiment:",
                "labels": labels,
                "answer": "label",
            }
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
                "data": {"train": str(data), "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
                "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
                "eval": {"tasks": [str(task)]},
                "out": str(tmp_path / "run"),
            }
        )
    )
    return path


def test_the_whole_path(run, recipe, tmp_path, tiny_llama_folder):
    status, _, err = run("train", recipe)
    assert status == 0, err
    done = tmp_path / "run"
    for name in ("config.yaml", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "report.html"):
        assert (done / name).exists(), name
    task = tmp_path / "sentiment.yaml"
    status, out, _ = run("eval", done, "--tasks", task, "--out", tmp_path / "scores.json")
    assert status == 0
    assert "accuracy" in out
    assert json.loads((tmp_path / "scores.json").read_text())["after"]["sentiment"]["n"] == 16
    status, out, _ = run("generate", done, "--prompt", "a good", "--max-new-tokens", 3)
    assert (status, bool(out)) == (0, True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a good\na bad\n")
    assert run("generate", done, "--file", prompts, "--out", tmp_path / "a.jsonl", "--max-new-tokens", 2)[0] == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    status, out, err = run("merge", done, "--out", tmp_path / "merged", "--verify")
    assert status == 0, err
    assert (tmp_path / "merged" / "model.safetensors").exists()
    status, out, _ = run("inspect", done, "--base", tiny_llama_folder)
    assert status == 0
    assert "q_proj" in out
    assert "direction moved" in out
    status, out, _ = run("targets", tiny_llama_folder)
    assert status == 0
    assert "gate_proj" in out


def test_no_verb_prints_the_help(run):
    status, out, err = run()
    assert "train" in out + err
    assert status in (0, 2)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["adapter.lora_alhpa=3"], 2, "did you mean 'lora_alpha'"),
        (["training.learning_rat=3"], 2, "did you mean 'learning_rate'"),
        (["adapter.target_modules=[q_porj]"], 2, "q_proj (x2)"),
        (["data.prompt=Review {txt}"], 2, "txt"),
        (["data.train=nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["eval.tasks=[sentimnt]"], 2, "sentimnt"),
        (["model.path=/no/such/model"], 2, "/no/such/model"),
        (["nonsense"], 2, "nonsense"),
        (
            ["adapter.r=3", "out=x", "adapter.r=4"],
            2,
            "given twice, and only one of the two can hold:\n  adapter.r=3 and",
        ),
        (["adapter.r=3", "adapter={method: lora}"], 2, "adapter.r=3 and adapter={method: lora}"),
        (["adapter.r=0", "data.max_length=1"], 2, "2 problems"),
        (["adapter.init_lora_weights=pisa"], 2, "there is no start 'pisa'; did you mean 'pissa'?"),
        (["adapter.lora_dropout=1.5"], 2, "adapter.lora_dropout: input should be less than 1, got 1.5"),
        (["adapter.lora_alpha=abc"], 2, "adapter.lora_alpha: should be a number, got 'abc'"),
        (["adapter.target_modules=3"], 2, "adapter.target_modules: should be text or a list, got 3"),
        (["data.validation=1.5"], 2, "1 problem\n  data.validation: input should be less than 1, got 1.5"),
        (["eval.tasks=mine.yaml"], 2, "should be a list, such as [mine.yaml]"),
        (["adapter=dora"], 2, "should be a group of settings (method, r, lora_alpha ...), got 'dora'"),
        (["max_lenght=3"], 2, "did you mean 'data.max_length'?"),
        (["learning_rate=3"], 2, "a setting of the Trainer is written training.learning_rate"),
        (["adapter.rank_pattern={q_proj:"], 2, "put quotes around the whole setting"),
        (["adapter.fused_modules={c_attn: {parts: [q, k], adapt: [q, x]}}"], 2, "there is no part 'x'"),
        (
            ["adapter.fused_modules={c_attn: {parts: 3, adapt: [q]}}"],
            2,
            "parts: should be a group of settings or a list",
        ),
        (["adapter.target_parameters=[experts.up]"], 2, "no parameter is named 'experts.up'"),
        (["adapter.target_modules=q_proj,v_proj"], 2, "for name endings give a list, [q_proj, v_proj]"),
        (["adapter.target_modules=all_linear"], 2, "did you mean 'all-linear'?"),
        (["adapter.rank_pattern={q_porj: 2}"], 2, "rank_pattern: 'q_porj' is none of the adapted layers; did you"),
        (["adapter.alpha_pattern={layers.9.q_proj: 2}"], 2, "alpha_pattern: 'layers.9.q_proj' is none"),
        (["training.learning_rate=0"], 2, "training.learning_rate must be above 0"),
        (["training.learning_rate=.nan", "training.max_steps=0"], 2, "training.max_steps must be at least 1"),
        (["training.per_device_train_batch_size=0"], 2, "batch_size must be at least 1, got 0"),
        (["training.gradient_accumulation_steps=0"], 2, "gradient_accumulation_steps must be at least 1, got 0"),
        (["model.attn_implementation=flash_attention_2"], 1, "cannot be loaded as asked"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_recipe(run, recipe, tmp_path, changes, status, message):
    got, _, err = run("train", recipe, *changes)
    assert got == status, err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_all_problems_at_once(run, recipe):
    _, _, err = run("train", recipe, "training.learning_rat=3", "data.train=nowhere.jsonl", "eval.tasks=[sentimnt]")
    assert "learning_rate" in err
    assert "nowhere.jsonl" in err
    assert "sentimnt" in err


def test_a_run_that_exists_is_refused_and_left_alone(run, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    for flag in ((), ("--overwrite",)):
        status, _, err = run("train", recipe, *flag)
        assert status == 2
        assert "is no run of doralib" in err
    assert (tmp_path / "run" / "precious.txt").read_text() == "x"
    assert run("train", recipe, f"out={tmp_path / 'other'}", "eval.tasks=[]")[0] == 0
    kept = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    status, _, err = run("train", recipe, f"out={tmp_path / 'other'}", "eval.tasks=[]")
    assert status == 2
    assert "--overwrite" in err
    assert "--resume" in err
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == kept


def test_empty_and_damaged_data(run, recipe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    status, _, err = run("train", recipe, f"data.train={tmp_path / 'empty.jsonl'}")
    assert status == 2, err
    (tmp_path / "cut.json").write_text('[{"text": "a", "label"')
    status, _, err = run("train", recipe, f"data.train={tmp_path / 'cut.json'}")
    assert status in (1, 2)
    assert "cut.json" in err


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_data_of_another_encoding(run, recipe, tmp_path, ending):
    rows = {"csv": "text,label\nschön,positive\n" * 3, "json": '[{"text": "schön", "label": "positive"}]'}
    data = tmp_path / f"old.{ending}"
    data.write_bytes(rows.get(ending, '{"text": "schön", "label": "positive"}\n' * 3).encode("latin-1"))
    status, _, err = run("train", recipe, f"data.train={data}")
    assert status == 1
    assert "not UTF-8 text" in err
    assert "iconv -f latin1" in err


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json"])
def test_prompts_of_another_encoding(run, tmp_path, tiny_llama_folder, ending):
    prompts = tmp_path / f"p.{ending}"
    prompts.write_bytes('[{"prompt": "schön"}]'.encode("latin-1"))
    status, _, err = run("generate", tiny_llama_folder, "--file", prompts)
    assert status == 1
    assert "not UTF-8 text" in err


def test_an_output_that_cannot_be_written_is_told_before_the_work(run, recipe, tmp_path, tiny_llama_folder):
    (tmp_path / "file").write_text("x")
    config = DoraConfig(r=2, target_modules=("q_proj",))
    doralib.save_adapter(doralib.adapt(make_llama(), config), tmp_path / "ours")
    out, base = ("--out", tmp_path / "file" / "x"), ("--base", tiny_llama_folder)
    for call in (
        ("train", recipe, f"out={tmp_path / 'file' / 'x'}"),
        ("eval", tiny_llama_folder, "--tasks", tmp_path / "sentiment.yaml", *out),
        ("generate", tiny_llama_folder, "--prompt", "a", *out),
        ("merge", tmp_path / "ours", *base, *out),
        ("convert", tmp_path / "ours", "--to", "mlx", *out),
        ("bench", "step", *out),
        ("demo", "--out", tmp_path / "file"),
    ):
        status, printed, err = run(*call)
        assert status == 2, call
        assert f"{tmp_path / 'file'} is a file" in err
        assert "loading" not in printed


def test_an_output_of_the_other_kind_is_told_before_the_work(run, tmp_path, tiny_llama_folder):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    config = DoraConfig(r=2, target_modules=("q_proj",))
    doralib.save_adapter(doralib.adapt(make_llama(), config), tmp_path / "ours")
    for call in (
        ("eval", tiny_llama_folder, "--tasks", "boolq", "--out", tmp_path / "folder"),
        ("generate", tiny_llama_folder, "--prompt", "a", "--out", tmp_path / "folder"),
        ("merge", tmp_path / "ours", "--base", tiny_llama_folder, "--out", tmp_path / "file"),
        ("convert", tmp_path / "ours", "--to", "mlx", "--out", tmp_path / "file"),
        ("bench", "step", "--quick", "--out", tmp_path / "file"),
    ):
        status, printed, err = run(*call)
        assert status == 2, call
        assert f"--out: {call[-1]} is a {call[-1].name}; choose" in err
        assert "loading" not in printed
    assert (tmp_path / "file").read_text() == "x"
    assert (tmp_path / "folder").is_dir()


def test_a_home_folder_is_understood(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = yaml.safe_load(recipe.read_text())
    shutil.copytree(values["model"]["path"], tmp_path / "model")
    values |= {"model": {"path": "~/model"}, "out": "~/deep/run", "eval": {"tasks": ["~/sentiment.yaml"]}}
    recipe.write_text(yaml.safe_dump(values))
    status, _, err = run("train", recipe)
    assert status == 0, err
    assert (tmp_path / "deep" / "run" / "adapter_model.safetensors").is_file()


def test_a_read_only_output_is_told_before_the_work(run, recipe, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    # root may write everywhere, so the system's answer is given for it
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    status, printed, err = run("train", recipe, f"out={tmp_path / 'locked' / 'run'}")
    assert status == 2
    assert f"{tmp_path / 'locked'} is read-only; choose another folder" in err
    assert "loading" not in printed


def test_what_the_system_refuses_is_told_with_the_file(run, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr("doralib.cli.targets.list_targets", refuse)
    status, _, err = run("targets", "x")
    assert status == 1
    assert err.startswith(f"doralib: {tmp_path / 'x'}: Permission denied")


def test_names_are_printed_as_they_are(run, recipe, tmp_path, tiny_llama_folder):
    folder = tmp_path / "Größe [b] :dog: ü"
    rows = folder / "rows.jsonl"
    folder.mkdir()
    rows.write_text("\n".join(json.dumps({**row, "text": f"[INST] {row['text']} [/INST]"}) for row in ROWS))
    run_folder = folder / "run"
    status, out, err = run("train", recipe, f"data.train={rows}", f"out={run_folder}", "eval.tasks=[]")
    assert status == 0, err
    assert re.sub(r"\s", "", f"report{run_folder}") in re.sub(r"\s", "", out)
    status, out, err = run("convert", run_folder, "--to", "mlx", "--out", folder / "mlx")
    assert status == 0, err
    assert str(run_folder) in out.replace("\n", "")
    status, out, err = run("merge", run_folder, "--out", folder / "merged")
    assert status == 0, err
    assert not out.startswith("\n")
    assert "\n\n" not in out
    status, out, _ = run("targets", folder / "merged")
    assert "[b] :dog:" in out


def test_targets_cuts_no_name(run, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr("doralib.cli.console.console.width", 60)
    status, out, _ = run("targets", tiny_llama_folder, "--every")
    assert status == 0
    assert "…" not in out
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "model.layers.1.self_attn.q_proj" in "".join(cells)


def test_targets_says_what_is_tied(run, tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    _, out, _ = run("targets", tmp_path / "model")
    rows = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in out.splitlines() if line.startswith("│")}
    assert rows["lm_head"] == rows["embed_tokens"] == "none: tied to another"
    assert rows["q_proj"] == "2,112"


def test_targets_probe_names_what_would_be_adapted_in_vain(run, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=400, pad_token_id=0, eos_token_id=2)
    ).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    status, out, _ = run("targets", tmp_path / "model", "--probe")
    assert status == 0
    rows = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in out.splitlines() if line.startswith("│")}
    assert rows["dt_proj"] == rows["conv1d"] == "none: read without a call"
    assert "backbone.layers.1.mixer.dt_proj: MambaMixer.forward reads its weight without calling it" in out
    assert "every layer tried got a gradient" in out


def test_requests_that_contradict_themselves(run, tmp_path, tiny_llama_folder):
    (tmp_path / "p.txt").write_text("a\n")
    status, _, err = run("generate", tiny_llama_folder, "--prompt", "a", "--file", tmp_path / "p.txt")
    assert (status, "--prompt and --file: give one of them" in err) == (2, True)
    twice = ("--adapter", "a=one", "--adapter", "a=two")
    status, _, err = run("generate", tiny_llama_folder, *twice, "--prompt", "a")
    assert (status, "a is given twice" in err) == (2, True)
    status, _, err = run("eval", tiny_llama_folder, "--tasks", " , ")
    assert (status, "names no task" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "rounds=0"], "rounds: input should be greater than or equal to 1"),
        (["acelerate"], "did you mean 'accelerate'?"),
        (["accelerate", "subjects=foo"], "there is no 'foo'; known: "),
        (["layer", "shapes=0x4"], "'0x4' should be written as OUTxIN, such as 1024x1024"),
        (["step", "tokens=2x"], "'2x' should be written as SEQUENCESxTOKENS, such as 4x256"),
        (["step", "rounds"], "options are KEY=VALUE, got rounds"),
        (["step", "rounds=3", "layers=2", "rounds=4"], "can hold:\n  rounds=3 and rounds=4"),
    ],
    ids=" ".join,
)
def test_a_wrong_bench(run, tmp_path, options, message):
    status, _, err = run("bench", *options, "--out", tmp_path)
    assert status == 2
    assert message in err


def test_the_first_steps_are_told(run):
    _, out, _ = run("--help")
    assert "doralib demo" in out
    assert all(f"doralib {verb}" in " ".join(out.split()) for verb in ("init DATA", "check RECIPE", "train RECIPE"))
    assert "..." not in out.partition("Commands:")[2]
    assert run("--version")[1].strip() == f"doralib {doralib.__version__}"


def test_help_names_every_measurement_and_recipe(run):
    _, out, _ = run("bench", "--help")
    assert f"{', '.join(BENCHES)} or all" in " ".join(out.split())
    assert "doralib recipes" in " ".join(run("train", "--help")[1].split())
    _, out, _ = run("recipes")
    assert all(f" {name} " in out for name in packaged_recipes())


def test_a_recipe_is_printed_complete_and_reads_as_the_same(run, tmp_path):
    status, out, _ = run("train", "sentiment", "adapter.r=3", "data.prompt=Größe: {text}", "--print-config")
    assert status == 0
    assert "Größe" in out
    (tmp_path / "again.yaml").write_text(out)
    assert read_recipe(str(tmp_path / "again.yaml"), []) == read_recipe(
        "sentiment", ["adapter.r=3", "data.prompt=Größe: {text}"]
    )
    status, _, err = run("train", "sentiment", "adapter.rr=3", "--print-config")
    assert (status, "rr" in err) == (2, True)


def test_the_schema_is_printed(run):
    status, out, _ = run("train", "--schema")
    assert status == 0
    assert json.loads(out)["properties"].keys() == Recipe.model_fields.keys()


def test_every_setting_is_listed_with_its_default_and_meaning(run):
    status, out, _ = run("train", "--settings")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    for group in (*(field.annotation for field in Recipe.model_fields.values()), Recipe):
        for name, field in getattr(group, "model_fields", {}).items():
            assert field.description or name in Recipe.model_fields, name
            assert any(line[:1] == [name] or line[:1] == [f"{name}:"] for line in lines), name
    assert ["lora_alpha", "32"] in [line[:2] for line in lines]
    assert ["learning_rate", "0.0002"] in [line[:2] for line in lines]
    assert ["train", "needed"] in [line[:2] for line in lines]
    # a model may be composed of parts instead
    assert ["path", '""'] in [line[:2] for line in lines]


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "doralib", "mrege"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean 'merge'" in done.stderr
    assert "Usage: doralib" in done.stderr


def test_a_truncated_model(run, recipe, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, _, err = run("train", recipe, f"model.path={tmp_path / 'model'}")
    assert status == 1
    assert "truncated" in err


def test_adapters_that_are_missing_truncated_or_of_another_model(run, tmp_path, tiny_llama_folder):
    status, _, err = run("inspect", tmp_path / "nowhere")
    assert status == 2, err
    wide = make_llama(hidden_size=40)
    doralib.save_adapter(doralib.adapt(wide, DoraConfig(r=2, target_modules=("q_proj",))), tmp_path / "wide")
    status, _, err = run("generate", tmp_path / "wide", "--base", tiny_llama_folder, "--prompt", "a")
    assert status == 1
    assert "(40, 40) in the adapter, (32, 32) in the model" in err
    status, _, err = run("merge", tmp_path / "wide", "--base", tiny_llama_folder, "--out", tmp_path / "out")
    assert status == 1
    assert not (tmp_path / "out").exists()
    weights = tmp_path / "wide" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run("inspect", tmp_path / "wide")
    assert status == 1
    assert "truncated" in err


def test_a_misspelt_verb_and_option(run):
    assert run("trian")[0] == 2
    assert run("targets", "x", "--evry")[0] == 2


def test_convert(run, tmp_path, tiny_llama_folder):
    config = DoraConfig(r=2, target_modules=("q_proj", "up_proj"))
    doralib.save_adapter(doralib.adapt(make_llama(), config), tmp_path / "ours")
    base = ("--base", tiny_llama_folder)
    status, out, err = run("convert", tmp_path / "ours", "--to", "mlx", "--out", tmp_path / "mlx", *base)
    assert status == 0, err
    assert "4 layers" in out
    status, _, err = run("convert", tmp_path / "mlx", "--to", "peft", "--out", tmp_path / "back", *base)
    assert status == 0, err
    assert run("inspect", tmp_path / "back")[0] == 0
    # a file of another tool is an adapter like any other
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [doralib.load_adapter(make_llama(), tmp_path / name)(ids).logits for name in ("ours", "mlx")]
    torch.testing.assert_close(*logits)
    lora = ("--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    status, out, err = run("convert", tmp_path / "ours", *lora, *base, "--texts")
    assert status == 0, err
    assert "q_proj" in out
    status, _, err = run("convert", tmp_path / "ours", "--to", "kohia", "--out", tmp_path / "x")
    assert status == 2
    assert "did you mean 'kohya'" in err
