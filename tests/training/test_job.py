"""The main job on a tiny model: one loss curve whatever is cut, killed or split, and one clear message per failure."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from adapted import move
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file
from torch.nn import functional as nnf
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainingArguments

import doralib
from doralib.adapters.adapt import adapt
from doralib.adapters.registry import trainable
from doralib.config import DoraConfig
from doralib.data.batches import Collator
from doralib.data.tokenize import tokenize_rows
from doralib.errors import DoraError, UsageError
from doralib.recipe import DataSettings, Recipe
from doralib.runs import checkpointing
from doralib.runs.divergence import Divergence
from doralib.training import arguments
from doralib.training import recipe_file as reading
from doralib.training.job import Interrupted, fine_tune, train
from doralib.training.label_trainer import LabelTrainer
from doralib.training.loss import LabelLoss
from doralib.training.modalities import text
from doralib.training.modality import Prepared
from doralib.training.recipe_file import packaged_recipes, read_recipe
from doralib.training.sampler import SeededSampler
from doralib.training.trainer import LossNotFinite

WORDS = [
    "good",
    "bad",
    "fine",
    "dull",
    "brilliant",
    "terrible",
    "wonderful",
    "awful",
    "film",
    "movie",
    "plot",
    "actor",
    "evening",
    "waste",
]


def rows(count):
    pick = lambda i, k: WORDS[(i * (k + 3) + k * k) % len(WORDS)]
    return [
        {"text": " ".join(pick(i, k) for k in range(2 + i % 9)), "label": ("positive", "negative")[i % 2]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(56)))
    return path


@pytest.fixture
def recipe(tiny_llama_folder, data_file, tmp_path):
    """Fills in what a test does not say."""

    def make(out="run", training=None, **groups):
        values = {
            "model": {"path": str(tiny_llama_folder)},
            "data": {"train": str(data_file), "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
            "adapter": {"r": 3, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
            "training": {"max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 5, "save_steps": 3},
            "out": str(tmp_path / out),
        }
        values["training"] |= {"learning_rate": "1e-2"} | (training or {})
        for group, settings in groups.items():
            values[group] = {**values.get(group, {}), **settings} if isinstance(settings, dict) else settings
        return Recipe(**values)

    return make


def metrics(run, kind="train"):
    """The lines of a run, without what a clock says."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] == kind]


def losses(run, name="loss", kind="train"):
    return [line[name] for line in metrics(run, kind)]


def summary(run):
    return json.loads((Path(run) / "summary.json").read_text())


def weights(run):
    return load_file(Path(run) / "adapter_model.safetensors")


def batch(tokenizer, count=6):
    settings = DataSettings(train="t", prompt="{text}", target=" {label}")
    made = tokenize_rows(_dataset(count), range(1, count + 1), settings, tokenizer)
    return Collator(0)(list(made.rows))


def _dataset(count):
    return datasets.Dataset.from_list(rows(count))


def gemma():
    settings = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(1)
    return Gemma2ForCausalLM(
        Gemma2Config(
            **settings,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.05,
            pad_token_id=0,
        )
    ).eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [make_llama, gemma])
def test_loss_of_labelled_places_is_the_loss(make, autocast):
    model, inputs = make(), batch(make_tokenizer())
    adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    parameters = [p for _, p in trainable(model)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = model(**inputs).loss
        want = torch.autograd.grad(whole, parameters)
        sizes = []
        head = model.get_output_embeddings().register_forward_hook(lambda _, __, out: sizes.append(out.shape[:-1]))
        lean = LabelLoss(model)
        loss, count = lean(model, inputs)
        got = torch.autograd.grad(loss / count, parameters)
    num_labels = (inputs["labels"][:, 1:] != -100).sum()
    assert sizes == [(1, num_labels)]
    assert count == num_labels
    tolerance = {"rtol": 2e-2, "atol": 2e-4} if autocast else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss / count, whole, **tolerance)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    head.remove()
    lean.remove()
    assert model(**inputs).logits.shape[:2] == inputs["labels"].shape


def test_a_head_that_is_not_called_gives_the_same_loss():
    model, inputs = make_llama(), batch(make_tokenizer())
    whole = model(**inputs).loss
    loss, count = LabelLoss(model)(lambda **kwargs: _without_hooks(model, **kwargs), inputs)
    torch.testing.assert_close(loss / count, whole)


def _without_hooks(model, **kwargs):
    hooks, model.lm_head._forward_pre_hooks = model.lm_head._forward_pre_hooks, {}
    out = model(**kwargs)
    model.lm_head._forward_pre_hooks = hooks
    return out


def test_router_losses_take_the_whole_path():
    model = make_llama()
    assert LabelLoss.is_possible(model)
    model.config.output_router_logits = True
    assert not LabelLoss.is_possible(model)


@pytest.fixture(scope="module")
def whole(tiny_llama_folder, data_file, tmp_path_factory):
    """A run that nothing happens to, with the settings of the fixture `recipe`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    make = recipe.__wrapped__ if hasattr(recipe, "__wrapped__") else recipe.__pytest_wrapped__.obj
    return train(make(tiny_llama_folder, data_file, out.parent)())


def test_a_run_and_its_files(whole):
    assert {path.name for path in whole.iterdir()} >= {
        *("config.yaml", "environment.json", "metrics.jsonl", "samples.json", "summary.json", "checkpoints"),
        *("adapter_config.json", "adapter_model.safetensors", "report.html"),
    }
    told = summary(whole)
    assert told["status"] == "finished"
    assert (told["steps"], told["train_rows"], told["dropped_rows"]) == (12, 56, {})
    # A, B and m of q (32 to 32) and down (48 to 32) in two layers
    assert told["trainable_parameters"] == 2 * (3 * (32 + 32) + 32 + 3 * (48 + 32) + 32)
    assert told["tokens_per_second"] > 0
    assert [line["step"] for line in metrics(whole)] == [5, 10]
    assert losses(whole)[1] < losses(whole)[0]
    samples = json.loads((whole / "samples.json").read_text())
    assert len(samples) == 5
    assert set(samples[0]) == {"prompt", "expected", "given", "before", "after"}
    assert samples[0]["expected"] == " positive"
    resolved = yaml.safe_load((whole / "config.yaml").read_text())
    assert Recipe(**resolved).adapter.r == 3


def test_checkpoints_hold_the_adapter_alone(whole):
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["checkpoint-12", "checkpoint-6", "checkpoint-9"]
    last = whole / "checkpoints" / "checkpoint-12"
    tensors = load_file(last / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == summary(whole)["trainable_parameters"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not list(last.glob("*.bin"))
    assert checkpointing.is_whole(last)


def assert_same_run(run, whole):
    assert metrics(run) == metrics(whole)
    assert metrics(run, "eval") == metrics(whole, "eval")
    assert summary(run)["tokens"] == summary(whole)["tokens"]
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run)[name], tensor), name


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_killed_and_resumed_is_the_same_run(recipe, whole, tmp_path):
    wanted = recipe(out="killed")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    command = [sys.executable, "-m", "doralib", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = Path(wanted.out)
    try:
        # while a checkpoint is being written, or just after
        wait_for(lambda: list((run / "checkpoints").glob("*checkpoint-6*")) or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "adapter_model.safetensors").exists(), process.stderr.read().decode()
    with pytest.raises(UsageError, match=r"exists \(not finished, newest checkpoint at step \d+\); --resume"):
        fine_tune(wanted)
    fine_tune(wanted, resume=True)
    assert_same_run(run, whole)


def test_ctrl_c_saves_and_resumes(recipe, whole):
    wanted = recipe(out="stopped")
    run, before = Path(wanted.out), signal.getsignal(signal.SIGINT)

    def interrupt():
        wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(
        Interrupted, match=r"stopped at step \d+ of 12, saved in .*; the same command with --resume"
    ) as e:
        fine_tune(wanted)
    thread.join()
    assert e.value.exit_status == 130
    assert summary(run)["status"] == "interrupted"
    assert 5 <= checkpointing.step_of(checkpointing.find_newest(run / "checkpoints")) < 12
    assert signal.getsignal(signal.SIGINT) is before
    fine_tune(wanted, resume=True)
    assert_same_run(run, whole)


def killed_at_the_end(whole, run):
    """A copy of a run that has all its checkpoints and nothing that is written once training is over."""
    shutil.copytree(whole, run)
    for name in ("adapter_model.safetensors", "adapter_config.json", "summary.json"):
        (run / name).unlink()
    return run


def test_resume_passes_over_what_is_not_whole(recipe, whole, tmp_path):
    run = killed_at_the_end(whole, tmp_path / "run")
    last = run / "checkpoints" / "checkpoint-12"
    (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-1])
    (run / "checkpoints" / "checkpoint-9" / "rng_state.pth").unlink()
    assert checkpointing.find_newest(run / "checkpoints").name == "checkpoint-6"
    fine_tune(recipe(), resume=True)
    assert_same_run(run, whole)


def test_killed_after_the_last_step(recipe, whole, tmp_path):
    run = killed_at_the_end(whole, tmp_path / "run")
    fine_tune(recipe(), resume=True)
    assert_same_run(run, whole)
    # and a finished run has nothing more to do
    before = (run / "adapter_model.safetensors").stat().st_mtime_ns
    fine_tune(recipe(), resume=True)
    assert (run / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.long
def test_resume_in_any_epoch_sees_the_same_rows(recipe, tmp_path):
    """51 rows in batches of 8 are 7 steps an epoch: killed before, at and after its end, with evaluations between."""
    changes = {"data": {"validation": 0.1}, "training": {"eval_steps": 2, "save_steps": 1, "save_total_limit": None}}
    whole = fine_tune(recipe(out="long", **changes))
    for killed_at in (3, 7, 9):
        run = tmp_path / f"again-{killed_at}"
        shutil.copytree(whole, run)
        (run / "adapter_model.safetensors").unlink()
        for path in (run / "checkpoints").iterdir():
            if checkpointing.step_of(path) > killed_at:
                shutil.rmtree(path)
        fine_tune(recipe(out=run.name, **changes), resume=True)
        assert_same_run(run, whole)


@pytest.mark.long
def test_settings_that_do_not_change_the_maths(recipe):
    changes = {
        "base": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "checkpointed": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }
    plain = {"logging_steps": 1, "max_steps": 8}
    adapter = {"lora_dropout": 0.0}
    runs = {name: fine_tune(recipe(out=name, adapter=adapter, training=plain | more)) for name, more in changes.items()}
    for name, run in runs.items():
        assert losses(run) == pytest.approx(losses(runs["base"]), rel=1e-4), name
        assert losses(run, "grad_norm") == pytest.approx(losses(runs["base"], "grad_norm"), rel=1e-3), name


def test_bfloat16_model_and_autocast_follow_the_same_curve(recipe):
    plain = {"adapter": {"lora_dropout": 0.0}, "eval": {"before": False}}
    short = {"max_steps": 5, "logging_steps": 1, "learning_rate": 0.05}
    exact = losses(fine_tune(recipe(out="f32", training=short, **plain)))
    stored = fine_tune(recipe(out="bf16", training=short, model={"dtype": "bfloat16"}, **plain))
    cast = fine_tune(recipe(out="cast", training={"bf16": True, **short}, **plain))
    assert exact[-1] < exact[0] - 0.05, "where nothing is learned there is no curve to follow"
    assert losses(stored) == pytest.approx(exact, abs=3e-3)
    assert losses(cast) == pytest.approx(exact, abs=3e-3)
    assert {tensor.dtype for tensor in weights(stored).values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods(recipe, method):
    wanted = recipe(
        adapter={"method": method, "target_modules": None}, training={"learning_rate": 1e-3, "max_steps": 4}
    )
    run = fine_tune(wanted)
    assert summary(run)["method"] == method
    assert (run / "model" / "model.safetensors").is_file() == (method == "full")
    assert (run / "adapter_model.safetensors").is_file() == (method == "lora")
    if method == "full":
        fine_tune(wanted, resume=True)


def make_trainer(recipe, tmp_path, **settings):
    tokenizer, model = make_tokenizer(), make_llama()
    chosen = recipe(**settings)
    adapt(model, chosen.adapter)
    made = tokenize_rows(_dataset(24), range(1, 25), chosen.data, tokenizer)
    args = arguments.make_arguments(chosen, tmp_path / "ck")
    data = Prepared(made, made, [])
    return LabelTrainer(model, args, tokenizer, text.collate(model, tokenizer, data), data, chosen.adapter)


@pytest.mark.parametrize("ratio", [1, 3])
def test_magnitudes_never_decay_and_learn_at_their_own_rate(recipe, tmp_path, ratio):
    trainer = make_trainer(recipe, tmp_path, training={"weight_decay": 0.1}, adapter={"magnitude_lr_ratio": ratio})
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert seen.keys() == {name for name, _ in trainable(trainer.model)}
    for name, (decay, rate) in seen.items():
        magnitude = name.endswith("lora_magnitude_vector")
        assert (decay, rate) == ((0.0, pytest.approx(ratio * 1e-2)) if magnitude else (0.1, 1e-2)), name


def all_kinds(recipe, tmp_path, **adapter):
    """A trainer of linear layers, an embedding and a module saved whole, with their biases none."""
    targets = {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "magnitude_modules": ["o_proj"],
    }
    return make_trainer(
        recipe,
        tmp_path,
        training={"weight_decay": 0.1, "warmup_steps": 4, "max_steps": 12, "lr_scheduler_type": "linear"},
        adapter=targets | adapter,
    )


def kind_of(name):
    endings = {"lora_magnitude_vector": "m", "lora_B": "B", "lora_embedding_A": "E", "lora_embedding_B": "E"}
    return endings.get(name.rpartition(".")[2], "rest")


@pytest.mark.parametrize("embedding", [None, 1e-6])
@pytest.mark.parametrize(("magnitude", "plus"), [(1, 1), (3, 1), (1, 16), (3, 16), (16, 16)])
def test_learning_rates_by_kind_through_the_schedule(recipe, tmp_path, magnitude, plus, embedding):
    trainer = all_kinds(
        recipe,
        tmp_path,
        magnitude_lr_ratio=magnitude,
        loraplus_lr_ratio=plus,
        loraplus_lr_embedding=embedding,
    )
    trainer.create_optimizer_and_scheduler(12)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    grouped = [names[id(p)] for g in trainer.optimizer.param_groups for p in g["params"]]
    # every trained parameter in one group, and in no other
    assert sorted(grouped) == sorted(name for name, _ in trainable(trainer.model))
    assert {kind_of(name) for name in grouped} == {"m", "B", "E", "rest"}
    full = {"m": 1e-2 * magnitude, "B": 1e-2 * plus, "E": embedding or 1e-2, "rest": 1e-2}
    for step, share in enumerate([0, 0.25, 0.5, 0.75, 1, 7 / 8, 6 / 8]):
        for group in trainer.optimizer.param_groups:
            for name in (names[id(p)] for p in group["params"]):
                assert group["lr"] == pytest.approx(share * full[kind_of(name)]), (step, name)
                assert group["weight_decay"] == (0.0 if kind_of(name) == "m" else 0.1), name
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_parameter_groups_are_the_trainers(recipe, tmp_path):
    trainer = all_kinds(recipe, tmp_path, magnitude_lr_ratio=3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-6)
    options = lambda groups: {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    ours = doralib.parameter_groups(trainer.model, 1e-2, weight_decay=0.1)
    assert options(ours) == options(trainer.create_optimizer().param_groups)
    assert sum(len(group["params"]) for group in ours) == len(trainable(trainer.model))
    torch.optim.AdamW(ours)


def test_rates_move_b_as_peft_moves_it(recipe, tmp_path):
    """One step of plain gradient descent: every parameter goes as far as its rate says, B as far as in PEFT's LoRA+."""
    from peft.optimizers import create_loraplus_optimizer

    trainer = all_kinds(recipe, tmp_path, loraplus_lr_ratio=16, magnitude_lr_ratio=2)
    groups = doralib.parameter_groups(trainer.model, 1e-2)
    theirs = create_loraplus_optimizer(trainer.model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16)
    rate = lambda groups: {p: g["lr"] for g in groups for p in g["params"]}
    ours, theirs = rate(groups), rate(theirs.param_groups)
    for name, p in trainable(trainer.model):
        if kind_of(name) in ("B", "rest"):
            assert ours[p] == theirs[p], name


def test_a_checkpoint_knows_where_a_random_start_began(recipe, tmp_path):
    settings = {"adapter": {"init_lora_weights": "pissa_niter_1", "r": 4}}
    trainer = make_trainer(recipe, tmp_path, **settings)
    move(trainer.model)
    trainer._save(str(tmp_path))
    other = make_trainer(recipe, tmp_path, **settings)
    layer, its = (t.model.model.layers[0].self_attn.q_proj for t in (trainer, other))
    with torch.no_grad():
        its.start_A.add_(1)
    other._load_from_checkpoint(str(tmp_path))
    assert torch.equal(its.start_A, layer.start_A)
    ids = torch.randint(3, 400, (2, 9))
    assert torch.equal(other.model.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_validation_loss_is_a_mean_over_labels(recipe, tmp_path, size):
    # as many labels as the text has words: a mean over rows or batches is another number
    trainer = make_trainer(
        recipe, tmp_path, training={"per_device_eval_batch_size": size}, data={"prompt": None, "target": "text"}
    )
    total = count = 0.0
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logp = nnf.log_softmax(trainer.model(ids).logits[0, :-1].double(), -1)
        at = labels[1:] != -100
        total -= logp[at, labels[1:][at]].sum().item()
        count += at.sum().item()
    state = torch.get_rng_state()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state())


def test_nan_stops_at_once_and_keeps_the_last_good_checkpoint(recipe, tmp_path):
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Q")["input_ids"]] = torch.nan
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    lines = [*rows(30), {"text": "Q", "label": "positive"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    wanted = recipe(
        model={"path": str(tmp_path / "broken"), "allow_nonfinite": True},
        data={"train": str(tmp_path / "rows.jsonl")},
        training={"save_steps": 1, "per_device_train_batch_size": 2},
        seed=3,
    )
    with pytest.raises(LossNotFinite, match=r"became nan at step \d+; .*\n.*learning_rate") as caught:
        fine_tune(wanted)
    assert caught.value.exit_status == 1
    run = Path(wanted.out)
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    last = checkpointing.find_newest(run / "checkpoints")
    assert checkpointing.step_of(last) == step - 1 > 0
    assert str(last) in str(caught.value)
    assert all(torch.isfinite(t).all() for t in load_file(last / "adapter.safetensors").values())
    assert summary(run)["status"] == "nan"
    assert not (run / "adapter_model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(recipe, tmp_path):
    trainer = make_trainer(recipe, tmp_path)
    next(iter(trainable(trainer.model)))[1].data[0] = torch.inf
    with pytest.raises(LossNotFinite, match=r"1 weights, first '.*lora_A', hold NaN"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list((tmp_path / "ck").iterdir())


def test_full_disk_leaves_no_half_checkpoint(recipe):
    wanted = recipe(training={"max_steps": 6})
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Path(wanted.out)

    def fill_up():
        wait_for(lambda: (run / "checkpoints" / "checkpoint-3" / "whole.json").is_file())
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, size[1]))

    thread = threading.Thread(target=fill_up)
    thread.start()
    try:
        with pytest.raises(
            DoraError, match=r"checkpoint-\d+ could not be written.*\n.*checkpoint-3; make room.*--resume"
        ):
            fine_tune(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        thread.join()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
    fine_tune(wanted, resume=True)
    assert summary(run)["status"] == "finished"


def test_early_stopping_keeps_the_best(recipe):
    # a falling loss taken for the worse makes the first evaluation the best, whatever the model
    pace = {"max_steps": 40, "eval_steps": 2, "save_steps": 2, "early_stopping_patience": 2}
    odd = {"metric_for_best_model": "loss", "greater_is_better": True}
    run = fine_tune(recipe(data={"validation": 0.2}, training=pace | odd))
    curve = losses(run, "eval_loss", "eval")
    assert curve == sorted(curve, reverse=True)
    assert len(curve) == 3
    assert (summary(run)["steps"], summary(run)["best_step"], summary(run)["status"]) == (6, 2, "finished")
    kept = load_file(run / "checkpoints" / "checkpoint-2" / "adapter.safetensors")
    last = load_file(run / "checkpoints" / "checkpoint-6" / "adapter.safetensors")
    ours = weights(run)["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert torch.equal(ours, kept["model.layers.0.mlp.down_proj.lora_B"])
    assert not torch.equal(ours, last["model.layers.0.mlp.down_proj.lora_B"])


def test_a_training_that_diverged_says_so_at_its_end(recipe, monkeypatch, caplog):
    told = Divergence(7, 9.0, 2.0)
    monkeypatch.setattr("doralib.training.job.find_divergence", lambda record: told if len(record.train) == 2 else None)
    with caplog.at_level("WARNING", "doralib"):
        train(recipe(training={"max_steps": 2, "logging_steps": 1}))
    assert [each.message for each in caplog.records] == [str(told)]


def test_tasks_are_scored_before_and_after(recipe, data_file, tmp_path):
    task = {"kind": "classification", "data": str(data_file), "prompt": "Review: {text}\nSentiment:", "answer": "label"}
    task["labels"] = {"positive": " positive", "negative": " negative"}
    (tmp_path / "sentiment.yaml").write_text(yaml.safe_dump(task))
    wanted = recipe(eval={"tasks": [str(tmp_path / "sentiment.yaml")], "limit": 20})
    results = json.loads((fine_tune(wanted) / "results.json").read_text())
    assert set(results) == {"before", "after", "change"}
    assert results["after"]["sentiment"]["n"] == 20


@pytest.mark.parametrize("asked", ["tensorboard", "all"])
def test_tensorboard_if_asked(recipe, asked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fine_tune(recipe(training={"report_to": asked, "max_steps": 5, "logging_steps": 1}))
    assert len([*run.rglob("events.out.*")]) == len([*(run / "tensorboard").iterdir()]) == 1
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_everything_wrong_is_told_before_the_model_is_loaded(recipe, data_file, tmp_path):
    wanted = recipe(
        model={"path": "no/such-model-anywhere"},
        data={"train": str(data_file), "prompt": "{txt}"},
        training={"learning_rat": 1, "max_steps": "many", "output_dir": "x", "early_stopping_patience": 2},
        eval={"tasks": ["no-such-task"]},
    )
    with pytest.raises(UsageError) as caught:
        fine_tune(wanted)
    for said in (
        "training.learning_rat: TrainingArguments has no such field; did you mean 'learning_rate'?",
        "training.max_steps: ",
        "training.output_dir cannot be set: a run's folder is the recipe's `out`",
        "training.early_stopping_patience needs rows to measure on: set data.validation",
        "has no column 'txt'; did you mean 'text'?",
        "no-such-task",
    ):
        assert said in str(caught.value)
    assert "such-model" not in str(caught.value)
    assert not Path(wanted.out).exists()
    with pytest.raises(UsageError, match=r"training: .*adamm"):
        fine_tune(recipe(training={"optim": "adamm"}))


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"save_total_limit": -1}, "save_total_limit must be at least 1, got -1"),
        ({"logging_steps": -5}, "logging_steps must be above 0, got -5"),
        ({"save_steps": 0}, "save_steps must be above 0"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor must be below 1, got 2"),
        ({"label_smoothing_factor": -0.5}, "label_smoothing_factor must be at least 0, got -0.5"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be below 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0"),
        ({"train_sampling_strategy": "lenght"}, "train_sampling_strategy must be one of random, sequential"),
        ({"metric_for_best_model": "accuracy"}, "an evaluation measures the loss alone, not 'accuracy'"),
        ({"report_to": "foo"}, "foo is not supported"),
        ({"report_to": "wandb"}, "wandb to be installed"),
        ({"optim_args": "foo"}, "training: optim, optim_args: "),
        ({"lr_scheduler_kwargs": {"a": 1}}, r"training: lr_scheduler_type, lr_scheduler_kwargs: .*'a'"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 99}, "do not fill one batch of 99"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_training_value_that_the_run_would_fail_at_is_told_in_words(recipe, training, said):
    with pytest.raises(UsageError, match=said):
        fine_tune(recipe(training=training, eval={"before": False}))


def test_numbers_that_yaml_reads_as_text(recipe):
    checked = arguments.check_arguments(recipe(training={"learning_rate": "1e-3", "max_steps": "7"}))
    assert (checked["learning_rate"], checked["max_steps"]) == (1e-3, 7)


def test_an_existing_folder_is_safe(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    adapter = (run / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"exists \(finished, newest checkpoint at step 12\).*--overwrite"):
        fine_tune(recipe())
    with pytest.raises(UsageError, match=r"these differ from .*: adapter.r, training.max_steps"):
        fine_tune(recipe(adapter={"r": 4}, training={"max_steps": 13}), resume=True)
    with pytest.raises(UsageError, match="give one of them"):
        fine_tune(recipe(), resume=True, overwrite=True)
    # a mistake that shows only with the model must not cost the old run either
    with pytest.raises(UsageError, match="q_prj"):
        fine_tune(recipe(adapter={"target_modules": ["q_prj"]}), overwrite=True)
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    fine_tune(recipe(training={"max_steps": 3}), overwrite=True)
    assert summary(run)["steps"] == 3
    with pytest.raises(UsageError, match=r"there is no run at"):
        fine_tune(recipe(out="elsewhere"), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is no run of doralib"):
        fine_tune(recipe(out="mine"), overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        fine_tune(recipe(out="mine/thesis.tex"))


def test_unusable_data_leave_nothing_behind(recipe, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": "", "label": ""}\n' * 3)
    wanted = recipe(data={"train": str(tmp_path / "blank.jsonl")})
    with pytest.raises(UsageError, match=r"(?s)the data set is empty:.*of 3 rows: 3 left out, empty"):
        fine_tune(wanted)
    assert not Path(wanted.out).exists()


def test_recipes_are_read_and_overridden(tmp_path):
    assert "sentiment" in packaged_recipes()
    made = read_recipe("sentiment", ["training.max_steps=3", "adapter.target_modules=[q_proj]", "out=there"])
    assert made.training["max_steps"] == 3
    assert made.adapter.target_modules == ("q_proj",)
    assert made.out == "there"
    with pytest.raises(UsageError, match=r"no recipe 'sentimnt'; did you mean 'sentiment'"):
        read_recipe("sentimnt", [])
    with pytest.raises(UsageError, match=r"adaptr: there is no such setting; did you mean 'adapter'"):
        read_recipe("sentiment", ["adaptr.r=3"])
    with pytest.raises(UsageError, match=r"is no setting; write group.key=value"):
        read_recipe("sentiment", ["adapter.r"])
    with pytest.raises(UsageError, match=r"out is 'runs/sentiment' and has no settings"):
        read_recipe("sentiment", ["out.x=1"])
    (tmp_path / "r.yaml").write_text("model: {path: x")
    with pytest.raises(UsageError, match="is not YAML"):
        read_recipe(str(tmp_path / "r.yaml"), [])
    (tmp_path / "r.yaml").write_text("just words")
    with pytest.raises(UsageError, match="is no recipe"):
        read_recipe(str(tmp_path / "r.yaml"), [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Review: {text}", "Review: {text}"),
        ("Review: {text}\nSentiment:", "Review: {text}\nSentiment:"),
        ("one\ntwo", "one\ntwo"),
        ("/a/b: c", "/a/b: c"),
        ("a: b: c", "a: b: c"),
        ("%x", "%x"),
        ("# {text}", "# {text}"),
        ("Tag it #{label} # {text}", "Tag it #{label} # {text}"),
        ("- {text}", "- {text}"),
        ('"a\\nb"', "a\nb"),
        ("{a: 1}", "{a: 1}"),
        ("1.0e-3", "1.0e-3"),
        ("null", None),
    ],
)
def test_a_bare_text_on_the_command_line_stays_as_it_is(text, value):
    values = {}
    reading.override(values, f"data.prompt={text}")
    assert values == {"data": {"prompt": value}}


@pytest.mark.parametrize(
    ("text", "value"), [("{a: 1}", {"a": 1}), ("[q_proj, 2]", ["q_proj", 2]), ("1.0e-3", 1e-3), ("true", True)]
)
def test_what_is_no_text_on_the_command_line_is_yaml(text, value):
    values = {}
    reading.override(values, f"training.x={text}")
    assert values == {"training": {"x": value}}


def test_what_was_cut_short_does_not_push_out_a_whole_checkpoint(tmp_path):
    for step in (3, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter.safetensors").touch()
        if step != 6:  # killed while it was written; the resumed run is stopped at 4
            checkpointing.seal(folder)
    checkpointing.prune(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_torchs_own_words_for_a_full_disk(tmp_path):
    with (
        pytest.raises(DoraError, match=r"could not be written.*iostream"),
        checkpointing.new_checkpoint(tmp_path / "checkpoint-1"),
    ):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="shapes"), checkpointing.new_checkpoint(tmp_path / "checkpoint-1"):
        raise RuntimeError("shapes differ")


def test_a_recipe_in_a_folder_has_the_folders_name(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_FOLDER", tmp_path)
    (tmp_path / "qdora").mkdir()
    (tmp_path / "qdora" / "llama.yaml").write_text("model: {path: m}\ndata: {train: t}\nout: there")
    assert read_recipe("qdora/llama", []).out == "there"
    with pytest.raises(UsageError, match="did you mean 'qdora/llama'"):
        read_recipe("qdora/lama", [])


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_whole(name):
    recipe = read_recipe(name, [])
    assert arguments.check_arguments(recipe).keys() == recipe.training.keys()


def test_every_training_argument_has_a_kind_that_can_be_checked(recipe):
    fields = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    plain = {k: v for k, v in fields.items() if k not in arguments.OWNED and isinstance(v, str | int | float | bool)}
    assert arguments.check_arguments(recipe(training=plain)).keys() >= plain.keys()


def test_order_follows_from_seed_and_epoch():
    lengths = [3 + (i * 7) % 50 for i in range(103)]
    order = lambda epoch, seed=1, batch=8: _order(SeededSampler(lengths, batch, seed), epoch)
    assert sorted(order(0)) == list(range(103))
    assert order(0) == order(0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9
    groups = [[lengths[i] for i in order(2)[start : start + 8]] for start in range(0, 96, 8)]
    assert max(max(group) - min(group) for group in groups) <= 5
    assert max(groups[0]) == max(lengths)
    assert sorted(order(0, batch=None)) == list(range(103))


def _order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_bare_no_in_yaml_is_a_strategy(tmp_path):
    recipe = Recipe(
        model={"path": "m"}, data={"train": "t"}, training={"eval_strategy": False, "save_strategy": False}, out="o"
    )
    args = arguments.make_arguments(recipe, tmp_path)
    assert (args.eval_strategy, args.save_strategy) == ("no", "no")


def test_layers_trained_in_vain_are_named_after_the_first_backward_pass(recipe, monkeypatch, caplog):
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    with caplog.at_level("WARNING", "doralib"):
        fine_tune(recipe(adapter={"target_modules": ["q_proj", "up_proj"]}, training={"max_steps": 2, "save_steps": 9}))
    (told,) = [each.message for each in caplog.records if "trained in vain" in each.message]
    assert "2 trained in vain: these got no gradient in the first backward pass" in told
    for i in range(2):
        assert f"model.layers.{i}.mlp.up_proj: unused: nothing called it in this step" in told


def test_nothing_is_said_of_a_run_that_trains_all_it_adapts(recipe, caplog):
    with caplog.at_level("WARNING", "doralib"):
        fine_tune(recipe(training={"max_steps": 2, "save_steps": 9}))
    assert not caplog.records
