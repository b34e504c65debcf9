"""FinLoRA's file of runs: each entry as the recipe that axolotl would have run, and what it cannot have."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from doralib.data.labels import label_rows
from doralib.data.prompts import render_row
from doralib.errors import DoraError, UsageError
from doralib.recipe import Recipe
from doralib.training.arguments import check_arguments
from doralib.training.finlora import read_finlora
from doralib.training.recipe_file import packaged_recipes

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
# epochs, rows at a time, accumulation
SCHEDULES = {
    **dict.fromkeys(("sentiment", "headline", "ner"), (4, 8, 2)),
    "finer": (4, 1, 8),
    "xbrl_extract": (1, 1, 8),
    "financebench": (4, 1, 2),
    **dict.fromkeys(("formula", "xbrl_term"), (1, 4, 2)),
    "cfa": (4, 4, 2),
}
DATA = {"sentiment": "finlora_sentiment_train.jsonl", "finer": "finer_train_batched.jsonl"}
EIGHT = [name for name in SCHEDULES if name != "cfa"]


def make_entry(name, r=8, bits=8, **more):
    epochs, rows, times = SCHEDULES[name]
    return {
        "base_model": LLAMA,
        "dataset_path": f"../data/train/{DATA.get(name, f'{name}_train.jsonl')}",
        "lora_r": r,
        "quant_bits": bits,
        "learning_rate": 0.0001,
        "num_epochs": epochs,
        "batch_size": rows,
        "gradient_accumulation_steps": times,
        **more,
    }


# the 39 entries of FinLoRA's file
RUNS = {
    **{(each, "8bits_r8_rslora"): make_entry(each, peft_use_rslora=True) for each in [*EIGHT, "cfa"]},
    **{(each, "8bits_r8_dora_a32"): make_entry(each, lora_alpha=32, peft_use_dora=True) for each in EIGHT},
    **{(each, "8bits_r8_dora"): make_entry(each, peft_use_dora=True) for each in [*EIGHT, "cfa"]},
    **{(each, "8bits_r8"): make_entry(each) for each in [*EIGHT[3:], "cfa"]},
    **{(each, "4bits_r4"): make_entry(each, 4, 4) for each in ["sentiment", *EIGHT[3:], "cfa"]},
}
ENTRIES = {f"{each}_llama_3_1_8b_{kind}": entry for (each, kind), entry in RUNS.items()}
assert len(ENTRIES) == 39


@pytest.fixture
def file(tmp_path):
    """FinLoRA's file in its place, beside the folder of its data."""
    (tmp_path / "lora").mkdir()
    path = tmp_path / "lora" / "finetune_configs.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def write_file(path, **entry):
    path.write_text(json.dumps({"run": entry}))
    return path


# what FinLoRA's finetune.py (commit 7e1cf828) writes for axolotl whatever the entry says
TEMPLATE = {
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj", "k_proj"],
    "lr_scheduler": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "val_set_size": 0.02,
    "sequence_len": 4096,
    "gradient_checkpointing": True,
    "evals_per_epoch": 4,
    "format": "[INST] {instruction} [/INST]",
    "field_instruction": "context",
    "field_output": "target",
}


def as_axolotl(recipe):
    """What axolotl would be told."""
    training, adapter, data = recipe.training, recipe.adapter, recipe.data
    return {
        "lora_dropout": adapter.lora_dropout,
        "lora_target_modules": list(adapter.target_modules),
        "lr_scheduler": training["lr_scheduler_type"],
        "warmup_steps": training["warmup_steps"],
        "weight_decay": training["weight_decay"],
        "val_set_size": data.validation,
        "sequence_len": data.max_length,
        "gradient_checkpointing": training["gradient_checkpointing"],
        "evals_per_epoch": 1 / (training["eval_steps"] * training["num_train_epochs"]),
        "format": data.prompt.replace("{context}", "{instruction}"),
        "field_instruction": "context",
        "field_output": data.target.strip("{}"),
    }


@pytest.mark.parametrize("name", ENTRIES)
def test_each_of_the_39_is_a_recipe(file, name):
    recipe, notes = read_finlora(file, name, [])
    check_arguments(recipe)
    entry, training, adapter = ENTRIES[name], recipe.training, recipe.adapter
    assert as_axolotl(recipe) == TEMPLATE
    storage = {8: ("int8", "adamw_bnb_8bit"), 4: ("nf4", "paged_adamw_8bit")}[entry["quant_bits"]]
    assert (recipe.model.path, recipe.model.quantization, training["optim"]) == (LLAMA, *storage)
    assert (adapter.r, adapter.lora_alpha) == (entry["lora_r"], entry.get("lora_alpha", 16))
    assert adapter.method == ("dora" if entry.get("peft_use_dora") else "lora")
    assert adapter.use_rslora == entry.get("peft_use_rslora", False)
    counts = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    assert tuple(training[key] for key in counts) == SCHEDULES[name.partition("_llama")[0]]
    assert (training["learning_rate"], recipe.seed) == (1e-4, 42)
    assert Path(recipe.data.train) == file.parents[1] / "data" / "train" / Path(entry["dataset_path"]).name
    assert recipe.out == f"axolotl-output/{name}"
    # PEFT's dropout, as axolotl trains with PEFT
    assert adapter.dropout_mode == "exact"
    assert [note.split()[0] for note in notes] == ["deepspeed", "chat_template", "special_tokens", "an"]
    assert Recipe(**yaml.safe_load(recipe.to_yaml())) == recipe


PUBLISHED = [("lora", "8bits_r8"), ("qlora", "4bits_r4"), ("dora", "8bits_r8_dora"), ("rslora", "8bits_r8_rslora")]


@pytest.mark.parametrize(("data", "method", "kind"), [(d, *each) for d, each in product(EIGHT, PUBLISHED)])
def test_packaged_recipes_are_the_entries(file, data, method, kind):
    """But for alpha and dropout of the adapters that were published with others, which the file does not say."""
    packaged = Recipe(**packaged_recipes()[f"finlora/{data}-{method}"].values)
    published_otherwise = (method == "lora" and data in EIGHT[:3]) or (method == "qlora" and data in EIGHT[:4])
    adapter = packaged.adapter
    assert (adapter.lora_alpha, adapter.lora_dropout) == ((32, 0.1) if published_otherwise else (16, 0.05))
    if (data, kind) not in RUNS:
        assert data in ("sentiment", "headline", "ner")
        return
    entry, _ = read_finlora(file, f"{data}_llama_3_1_8b_{kind}", [])
    changes = {"out": packaged.out, "data": entry.data.model_copy(update={"train": packaged.data.train})}
    if published_otherwise:
        changes["adapter"] = adapter
    assert entry.model_copy(update=changes) == packaged


def test_overrides(file):
    name = "sentiment_llama_3_1_8b_8bits_r8_dora"
    recipe, _ = read_finlora(file, name, ["model.path=here", "training.num_train_epochs=2", "adapter.lora_alpha=32"])
    assert (recipe.model.path, recipe.adapter.lora_alpha) == ("here", 32)
    # still four evaluations an epoch
    assert recipe.training["eval_steps"] == 1 / 8
    with pytest.raises(UsageError, match="pat: there is no such setting; did you mean 'path'"):
        read_finlora(file, name, ["model.pat=here"])


def test_data_is_as_seen_from_the_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}")
    write_file(file, **make_entry("ner") | {"dataset_path": "rows.jsonl"})
    # FinLoRA's script sees it from where it is started
    assert read_finlora(file, "run", [])[0].data.train == "rows.jsonl"
    (file.parent / "rows.jsonl").write_text("{}")
    assert Path(read_finlora(file, "run", [])[0].data.train) == file.parent / "rows.jsonl"


def test_an_entry_without_bits_is_one_of_the_plain_file(file):
    entry = make_entry("ner")
    del entry["quant_bits"]
    recipe, _ = read_finlora(write_file(file, **entry), "run", [])
    assert (recipe.model.quantization, recipe.training["optim"]) == (None, "adamw_torch_fused")


def test_other_settings_of_axolotl_are_taken_or_left_out_and_told(file):
    more = {"lora_dropout": 0.1, "sequence_len": 512, "optimizer": "adamw_torch", "warmup_steps": 5, "seed": 7}
    left_out = {"deepspeed": "deepspeed_configs/zero3.json", "wandb_project": "finlora_models", "flash_attention": True}
    recipe, notes = read_finlora(write_file(file, **make_entry("ner"), **more, **left_out), "run", [])
    assert (recipe.adapter.lora_dropout, recipe.data.max_length, recipe.seed) == (0.1, 512, 7)
    assert (recipe.training["optim"], recipe.training["warmup_steps"]) == ("adamw_torch", 5)
    told = "\n".join(notes)
    for key, place in (("sequence_len", "data.max_length"), ("optimizer", "training.optim"), ("seed", "seed")):
        assert f"{key} is taken as {place}" in told
    assert told.count("deepspeed is left out: ZeRO") == 1
    assert "wandb_project is left out" in told
    assert "flash_attention is left out: model.attn_implementation" in told


def test_everything_that_cannot_be_is_told_at_once(file):
    entry = make_entry("ner", bits=3, lora_rr=8, num_clients=4, peft_use_dora="yes", learning_rate="fast")
    del entry["base_model"]
    write_file(file, **entry | {"lora_r": 0})
    with pytest.raises(UsageError) as caught:
        read_finlora(file, "run", ["adapter.rr=2"])
    told = str(caught.value)
    assert told.startswith(f"{file}: run:\n")
    for part in (
        "base_model: is missing",
        "quant_bits: should be 8 or 4",
        "lora_rr: neither FinLoRA's script nor a recipe has such a setting; did you mean 'lora_r'?",
        "num_clients: doralib does not train in a federation",
        "peft_use_dora: should be true or false, got 'yes'",
        "adapter.r: ",
        "adapter.rr: there is no such setting",
    ):
        assert part in told
    assert "model.path" not in told


def test_no_such_run_or_file(file, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'ner_llama_3_1_8b_8bits_r8_dora'"):
        read_finlora(file, "ner_llama_3_1_8b_8bits_r8_dor", [])
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        read_finlora(tmp_path / "nowhere.json", "run", [])
    file.write_text("[1]")
    with pytest.raises(DoraError, match="a list stands there"):
        read_finlora(file, "run", [])
    file.write_text('{"run": 3}')
    with pytest.raises(UsageError, match="no file of FinLoRA's runs"):
        read_finlora(file, "run", [])
    file.write_text('{"run": {')
    with pytest.raises(DoraError, match="not whole JSON"):
        read_finlora(file, "run", [])


ROW = {"context": "Instruction: {negative/neutral/positive}.\nInput: 5 % up\nAnswer: ", "target": "positive"}


def test_tokens_are_axolotls(file, tiny_llama_folder):
    """Axolotl tokenizes prompt and answer apart, and puts the end token behind the answer."""
    recipe, _ = read_finlora(file, "sentiment_llama_3_1_8b_8bits_r8_dora", [])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    prompt = tokenizer(f"[INST] {ROW['context']} [/INST]")["input_ids"]
    answer = [*tokenizer("positive", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    (made,) = label_rows(tokenizer, [render_row(ROW, recipe.data, tokenizer)])
    assert made.input_ids == prompt + answer
    assert made.labels == [-100] * len(prompt) + answer


@pytest.fixture
def finlora(file, tiny_llama_folder, monkeypatch):
    """FinLoRA's folder `lora`, with data and a short run."""
    train = file.parents[1] / "data" / "train"
    train.mkdir(parents=True)
    rows = [{**ROW, "target": target} for target in ("positive", "negative", "neutral")] * 20
    (train / "finlora_sentiment_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(file.parent)
    return file.parent


@pytest.mark.parametrize("kind", ["8bits_r8_dora", "8bits_r8_rslora"])
def test_the_command_runs_an_entry_and_finloras_example_loads_it(run, finlora, kind, tiny_llama_folder):
    """The usage example of FinLoRA's page, but for its device and dtype."""
    name = f"sentiment_llama_3_1_8b_{kind}"
    ask = ("train", name, "--finlora", "finetune_configs.json", f"model.path={tiny_llama_folder}")
    status, printed, _ = run(*ask, "--print-config")
    assert status == 0
    assert not Path("axolotl-output").exists()
    fewer = ("training.max_steps=3", "training.optim=adamw_torch", "model.dtype=float32", "training.learning_rate=0.05")
    status, out, err = run(*ask, *fewer)
    assert status == 0, err
    assert out.startswith("# deepspeed is left out")
    folder = Path("axolotl-output") / name
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    told = yaml.safe_load(printed)
    assert saved["adapter"] == told["adapter"]
    assert saved["model"]["quantization"] == told["model"]["quantization"] == "int8"

    # Load base model and tokenizer
    base_model_name = tiny_llama_folder
    tokenizer = AutoTokenizer.from_pretrained(base_model_name)
    base_model = AutoModelForCausalLM.from_pretrained(base_model_name, dtype=torch.float32, trust_remote_code=True)
    # Load and apply the LoRA adapter
    model = PeftModel.from_pretrained(base_model, folder)
    # Generate text
    inputs = tokenizer("What is the formula for the Black-Scholes model?", return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        changed = (model(**inputs).logits - base_model_logits(model, inputs)).abs().max()
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)
    assert changed > 1e-4
    config = model.peft_config["default"]
    assert (config.use_dora, config.use_rslora) == (kind.endswith("_dora"), kind.endswith("rslora"))
    assert (config.r, config.lora_alpha, sorted(config.target_modules)) == (8, 16, ["k_proj", "q_proj", "v_proj"])


def base_model_logits(model, inputs):
    with model.disable_adapter():
        return model(**inputs).logits


def test_bad_input_at_the_command(run, finlora):
    status, _, err = run("train", "nothing", "--finlora", "finetune_configs.json")
    assert status == 2
    assert "has no run 'nothing'" in err
    status, _, err = run("train", "sentiment_llama_3_1_8b_8bits_r8_dora", "--finlora", "none.json")
    assert status == 2
    assert "none.json" in err
