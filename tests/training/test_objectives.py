"""Objectives beyond labels: TRL's losses on our layers, the model with its adapter off as reference, the run."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from adapted import move
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

import doralib
from doralib.adapters.registry import trainable
from doralib.data.detect import look_at
from doralib.data.preferences import find_form, prepare_answers
from doralib.data.rows import read_dataset
from doralib.errors import DoraError, UsageError
from doralib.recipe import DataSettings, Recipe
from doralib.training import job
from doralib.training.job.check import check_job
from doralib.training.job.load import load_job
from doralib.training.job.optimize import make_trainer as trainer_of
from doralib.training.recipe_file import read_recipe
from doralib.training.rewards import find_rewards, number
from doralib.training.trainer import AdapterTrainer

PAIRS = [
    {"prompt": f"film {i}", "chosen": f" brilliant, {i} wonder", "rejected": " dull" * (1 + i % 3)} for i in range(8)
]
JUDGED = [{"prompt": f"a film {i}", "completion": f" brilliant {i}", "label": i % 3 > 0} for i in range(8)]
PROMPTS = [{"prompt": f"numbers {i} and", "answer": str(i)} for i in range(8)]
ROWS = {"dpo": PAIRS, "orpo": PAIRS, "kto": JUDGED, "grpo": PROMPTS}
KINDS = list(ROWS)
BETA = 0.3


def reward(completions, answer, **_):
    """Answers differ in length, so no group has equal rewards for long."""
    return [len(text) % 7 + float(wanted in text) for text, wanted in zip(completions, answer, strict=True)]


@pytest.fixture
def recipe(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def by_length(completions, answer, **_):\n    return [len(text) % 7 + float(w in text) "
        "for text, w in zip(completions, answer)]\n"
    )

    def make(kind, rows=None, out="run", data=None, adapter=None, **training):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[kind] if rows is None else rows)))
        grpo = {"num_generations": 2, "max_completion_length": 6} if kind == "grpo" else {}
        return Recipe(
            model={"path": str(tiny_llama_folder)},
            data={"train": str(path), "max_length": 64, **(data or {})},
            adapter={"r": 2, "target_modules": ["q_proj", "down_proj"], **(adapter or {})},
            objective={"kind": kind, "rewards": ["my_rewards.by_length"] if kind == "grpo" else []},
            training={
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_steps": 2,
                "learning_rate": 0.01,
                "beta": BETA,
                **grpo,
                **training,
            },
            out=str(tmp_path / out),
        )

    return make


def make_trainer(recipe):
    trainer = trainer_of(load_job(check_job(recipe, resume=False, overwrite=False), None))
    move(trainer.model)
    return trainer, AutoModelForCausalLM.from_pretrained(recipe.model.path).eval()


def log_probs(model, ids, answers):
    """Of each row's answer, summed in float64, and the number of its tokens."""
    each = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (each * answers[:, 1:]).sum(1), answers[:, 1:].sum(1)


def logs_of(model, base, batch, prefix=""):
    """Log-ratios to the base model of the answers in a batch of TRL."""
    ids, answers = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    return log_probs(model, ids, answers)[0] - log_probs(base, ids, answers)[0].detach()


def dpo(model, base, batch):
    good, bad = logs_of(model, base, batch).chunk(2)
    return -torch.log(torch.sigmoid(BETA * (good - bad))).mean()


def kto(model, base, batch):
    far = logs_of(model, base, batch, "KL_").mean().clamp(min=0).detach()
    ratio, good = logs_of(model, base, batch), batch["label"]
    return (1 - torch.sigmoid(BETA * torch.where(good, ratio - far, far - ratio))).mean()


def orpo(model, _, batch):
    means, nll = [], None
    for side in ("chosen", "rejected"):
        ids = batch[f"{side}_input_ids"]
        total, count = log_probs(model, ids, (batch[f"{side}_labels"] != -100).long())
        means.append((total / count).exp())
        if nll is None:
            whole, tokens = log_probs(model, ids, batch["chosen_attention_mask"])
            nll = -whole.sum() / tokens.sum()
    odds = [p / (1 - p) for p in means]
    return nll - BETA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))).mean()


def grpo(model, base, batch):
    """Of answers that the model has just made: the ratio is 1, and has a gradient; the mean is DAPO's."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logs = []
    for each in (model, base):
        found = each(input_ids=ids, attention_mask=seen).logits.double().log_softmax(-1)
        logs.append(found[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -batch["completion_ids"].shape[1] :])
    ratio = (logs[0] - logs[0].detach()).exp()
    apart = logs[1].detach() - logs[0]
    each = -ratio * batch["advantages"][:, None].double() + BETA * ratio * (apart.exp() - apart - 1)
    return (each * batch["completion_mask"]).sum() / batch["num_items_in_batch"]


@pytest.mark.parametrize("formula", [dpo, kto, orpo, grpo], ids=lambda f: f.__name__)
def test_the_loss_is_the_papers(recipe, formula):
    trainer, base = make_trainer(recipe(formula.__name__))
    trainer.model.train()
    # outside of its training loop the trainer has not been told
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if formula is grpo:
        assert batch["advantages"].abs().max() > 0
    found, made = [], (lambda: trainer.compute_loss(trainer.model, batch), lambda: formula(trainer.model, base, batch))
    for loss in (each() for each in made):
        loss.backward()
        found.append([loss.double(), *(p.grad.double() for _, p in trainable(trainer.model))])
        trainer.model.zero_grad()
    # of float32's sums over 400 logits and 20 tokens
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(want.abs().max().item(), 0.01))
    assert all(gradient.abs().max() > 1e-5 for gradient in found[1][1:])


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("more", [{}, {"bias": "all"}, {"use_rslora": True, "modules_to_save": ["norm"]}])
def test_the_reference_is_the_base_bit_for_bit(recipe, kind, more):
    trainer, base = make_trainer(recipe(kind, adapter=more))
    for _, p in trainable(trainer.model):
        p.data += 0.1 * torch.randn_like(p)
    add_fused_lm_head(base, temperature=getattr(trainer, "temperature", 1.0))
    given = {"input_ids": torch.arange(3, 27).view(2, 12), "labels": torch.arange(3, 27).view(2, 12)}
    ours = trainer.ref_model(**given, fused_lm_head=True).log_probs
    assert torch.equal(ours, base(**given, fused_lm_head=True).log_probs)
    assert not torch.equal(ours, trainer.model(**given, fused_lm_head=True).log_probs)
    assert not ours.requires_grad


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_of_full_training_is_a_copy(recipe, kind):
    trainer, base = make_trainer(recipe(kind, adapter={"method": "full", "target_modules": ["q_proj"]}))
    for _, p in trainable(trainer.model):
        p.data += 0.1
    add_fused_lm_head(base)
    given = {"input_ids": torch.arange(3, 27).view(2, 12), "labels": torch.arange(3, 27).view(2, 12)}
    assert torch.equal(
        trainer.ref_model(**given, fused_lm_head=True).log_probs, base(**given, fused_lm_head=True).log_probs
    )


def lines(run, kind="train"):
    clock = ("seconds", "tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in found if line["kind"] == kind]


SHOWN = {"dpo": "rewards/margins", "orpo": "rewards/margins", "kto": "rewards/margins", "grpo": "reward"}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_the_same_run(recipe, kind, tmp_path, monkeypatch):
    """Three epochs, logged every third step and saved every second, so that a log spans the kill."""
    times = {"max_steps": 6, "logging_steps": 3, "per_device_eval_batch_size": 4}
    whole = job.train(recipe(kind, out="whole", data={"validation": 0.5}, **times))
    left, step = [4], AdapterTrainer.training_step

    def stop(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            job.train(recipe(kind, out="cut", data={"validation": 0.5}, **times))
    cut = job.train(recipe(kind, out="cut", data={"validation": 0.5}, **times), resume=True)
    assert lines(whole) == lines(cut)
    assert lines(whole, "eval") == lines(cut, "eval")
    assert all(SHOWN[kind] in line for line in lines(cut))
    one, other = (load_file(run / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    summary = json.loads((cut / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["tokens"] > 0
    titles = {"reward": "Reward", "rewards/margins": "Margin"}
    assert titles[SHOWN[kind]] in (cut / "report.html").read_text()
    # no card of TRL's among the checkpoints
    assert {path.name for path in (cut / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize(
    "kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS if kind != "dpo")]
)
def test_doralib_and_peft_load_what_was_trained(recipe, kind, monkeypatch):
    made = recipe(kind)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("statistics are sent"))
    run = job.train(made)
    load = lambda: AutoModelForCausalLM.from_pretrained(made.model.path).eval()
    ids = torch.arange(3, 27).view(2, 12)
    ours = doralib.load_adapter(load(), run)(ids).logits
    theirs = peft.PeftModel.from_pretrained(load(), run).eval()(ids).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, load()(ids).logits)


def test_the_model_is_as_it_was_after_training(recipe, monkeypatch):
    """It is scored and asked after TRL's forward is off again."""
    seen = []
    for place in (job, job.scores):
        monkeypatch.setattr(place, "sample", lambda job, when: seen.append("forward" in job.model.__dict__))
    job.train(recipe("dpo"))
    assert seen == [False, False]


def test_everything_wrong_is_told_at_once(recipe):
    wrong = recipe(
        "grpo",
        [{"promt": "a", "anwser": "1"}, {"promt": "b", "anwser": "2"}],
        beta=0.1,
        use_vllm=True,
        max_length=5,
        num_generation=4,
    ).model_dump()
    wrong = Recipe(**wrong | {"objective": {"kind": "grpo", "rewards": ["number", "nubmer", "no_such.thing"]}})
    with pytest.raises(UsageError) as caught:
        job.train(wrong)
    for part in (
        "no column of prompts",
        "no reward 'nubmer'; did you mean 'number'?",
        "No module named 'no_such'",
        "training.use_vllm cannot be set",
        "GRPOConfig has no such field; did you mean 'num_generations'?",
    ):
        assert part in str(caught.value)


def test_a_reward_says_which_column_it_lacks(recipe):
    wrong = recipe("grpo", [{"prompt": "a", "anwser": "1"}])
    with pytest.raises(UsageError, match=r"by_length reads the column 'answer', which .* lacks; did you mean 'anwser'"):
        job.train(wrong)


@pytest.mark.parametrize(
    ("kind", "columns", "said"),
    [
        ("dpo", ["prompt", "choosen", "rejekted"], ["'chosen'; did you mean 'choosen'", "'rejected'; did you mean"]),
        ("kto", ["prompt", "text"], ["no column 'completion'", "no column 'label'"]),
        ("orpo", ["a", "b"], ["no column 'chosen'", "no column 'rejected'", "no column of prompts", "of rows: a, b"]),
        ("grpo", ["answer"], ["no column of prompts"]),
    ],
)
def test_columns_that_are_missing(kind, columns, said):
    with pytest.raises(UsageError) as caught:
        find_form(DataSettings(train="t"), kind, columns, {}, "rows")
    assert all(part in str(caught.value) for part in said)


def test_a_head_that_is_trained_is_refused_where_trl_passes_it_by(recipe):
    with pytest.raises(UsageError, match="leave the head out"):
        job.train(recipe("dpo", adapter={"target_modules": ["q_proj", "lm_head"]}))
    job.train(recipe("orpo", adapter={"target_modules": ["q_proj", "lm_head"]}, out="other", max_steps=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"kind": "grpo"}}, "needs objective.rewards"),
        ({"objective": {"kind": "dpo", "rewards": ["number"]}}, "for kind grpo, not dpo"),
        ({"objective": {"kind": "dpo"}, "model": {"path": "m", "kind": "classify"}}, "not model.kind classify"),
        ({"objective": {"kind": "dpo"}, "data": {"train": "t", "packing": True}}, "data.packing is not for"),
    ],
)
def test_settings_that_cannot_be(change, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        Recipe(**{"model": {"path": "m"}, "data": {"train": "t"}, "out": "o", **change})


def test_without_trl_it_says_what_to_install(recipe, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    with pytest.raises(UsageError, match=r"pip install 'doralib\[rl\]'"):
        job.train(recipe("dpo"))


SAY = lambda role, text: {"role": role, "content": text}
TALK = "<|im_start|>user\nGood?<|im_end|>\n<|im_start|>assistant\n"
LAYOUTS = {
    "texts": ({"prompt": "Good?", "chosen": " Yes", "rejected": " No"}, "Good?", " Yes<|im_end|>"),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "Good?"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        TALK,
        "Yes<|im_end|>\n",
    ),
    "TRL, messages": (
        {"prompt": [SAY("user", "Good?")], "chosen": [SAY("assistant", "Yes")], "rejected": [SAY("assistant", "No")]},
        TALK,
        "Yes<|im_end|>\n",
    ),
    "TRL, without a prompt": (
        {
            "chosen": [SAY("user", "Good?"), SAY("assistant", "Yes")],
            "rejected": [SAY("user", "Good?"), SAY("assistant", "No")],
        },
        TALK,
        "Yes<|im_end|>\n",
    ),
    "UltraFeedback": (
        {
            "prompt": "Good?",
            "chosen": [SAY("user", "Good?"), SAY("assistant", "Yes")],
            "rejected": [SAY("user", "Good?"), SAY("assistant", "No")],
        },
        TALK,
        "Yes<|im_end|>\n",
    ),
    "HH": (
        {"chosen": "Human: Good? Assistant: Yes", "rejected": "Human: Good? Assistant: Yet no"},
        "Human: Good? Assistant:",
        " Yes<|im_end|>",
    ),
    "Orca": (
        {"system": "Be short.", "question": "Good?", "chosen": "Yes", "rejected": "No"},
        "<|im_start|>system\nBe short.<|im_end|>\n" + TALK,
        "Yes<|im_end|>\n",
    ),
    "Alpaca": (
        {"instruction": "Say it.", "input": "", "chosen": "Yes", "rejected": "No"},
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay it.\n\n### Response:\n",
        "Yes<|im_end|>",
    ),
}


def read_rows(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset(str(path), "data.train")


def prepare(tmp_path, rows, kind, folder, **settings):
    found, chosen = read_rows(tmp_path, rows), DataSettings(train="t", **settings)
    form = find_form(chosen, kind, found.column_names, look_at(found), "rows")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made, _ = prepare_answers(kind, found, range(1, len(found) + 1), form, chosen, tokenizer)
    return made, tokenizer


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_in_every_usual_layout(name, tmp_path, tiny_llama_folder):
    row, prompt, chosen = LAYOUTS[name]
    settings = {"style": "chat"} if name == "Orca" else {}
    made, tokenizer = prepare(tmp_path, [row], "dpo", tiny_llama_folder, **settings)
    got = made.rows[0]
    assert tokenizer.decode(got["prompt_ids"]) == prompt
    assert tokenizer.decode(got["chosen_ids"]) == chosen
    rejected = tokenizer.decode(got["rejected_ids"])
    assert rejected.strip().removesuffix("<|im_end|>").strip().lower().endswith("no")
    judged, _ = prepare(tmp_path, [row], "kto", tiny_llama_folder, **settings)
    assert [(tokenizer.decode(each["completion_ids"]), each["label"]) for each in judged.rows] == [
        (chosen, True),
        (rejected, False),
    ]


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": "Good?", "completion": "Yes", "label": True}, True),
        ({"prompt": [SAY("user", "Good?")], "completion": [SAY("assistant", "Yes")], "label": 0}, False),
        ({"messages": [SAY("user", "Good?"), SAY("assistant", "Yes")], "kto_tag": "true"}, True),
    ],
)
def test_judged_answers_in_every_usual_layout(row, label, tmp_path, tiny_llama_folder):
    made, tokenizer = prepare(tmp_path, [row], "kto", tiny_llama_folder)
    assert made.rows[0]["label"] is label
    assert "Good?" in tokenizer.decode(made.rows[0]["prompt_ids"])
    assert tokenizer.decode(made.rows[0]["completion_ids"]).strip() == "Yes<|im_end|>"


def test_prompts_keep_the_columns_of_their_rewards(tmp_path, tiny_llama_folder):
    rows = [{"question": "1 + 1?", "answer": 2, "level": "easy"}]
    plain, _ = prepare(tmp_path, rows, "grpo", tiny_llama_folder, prompt="Q: {question}")
    assert {k: plain.rows[0][k] for k in ("prompt", "answer", "level")} == {
        "prompt": "Q: 1 + 1?",
        "answer": 2,
        "level": "easy",
    }
    chat, _ = prepare(tmp_path, rows, "grpo", tiny_llama_folder, prompt="{question}", style="chat")
    assert chat.rows[0]["prompt"] == [SAY("user", "1 + 1?")]


def test_columns_of_several_kinds_become_texts(tmp_path, tiny_llama_folder):
    rows = [{"prompt": "a", "answer": answer} for answer in (1, "two", [3], None)]
    made, _ = prepare(tmp_path, rows, "grpo", tiny_llama_folder)
    assert made.rows["answer"][:] == ["1", "two", "[3]", None]


def test_bad_pairs_are_counted_and_shown(tmp_path, tiny_llama_folder):
    rows = [
        {"prompt": "a", "chosen": "b c", "rejected": "d"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": "d"},
        {"prompt": "a", "chosen": "b c " * 30, "rejected": "d"},
    ]
    made, _ = prepare(tmp_path, rows, "dpo", tiny_llama_folder, max_length=20)
    assert (made.report.kept, dict(made.report.dropped)) == (
        1,
        {"with two equal answers": 1, "empty": 1, "longer than 20 tokens": 1},
    )
    assert any("row 3: nothing in 'chosen'" in line for line in made.report.lines())
    with pytest.raises(DoraError, match="bad_rows is 'error'"):
        prepare(tmp_path, rows, "dpo", tiny_llama_folder, bad_rows="error")


def test_rewards():
    texts = ["so 4 and 5", "<answer>1,234.50</answer> not 7", "none", "-3.0"]
    assert number(texts, ["5", "1234.5", "0", "-3"]) == [1, 1, 0, 1]
    assert number([[SAY("assistant", "it is 18")]], ["... #### 18"]) == [1]
    (form,) = find_rewards(["format"])
    assert form(["a <answer>1</answer>\n", "<answer>1</answer> b", "<answer>1</answer><answer>2</answer>", ""]) == [
        *(1, 0, 0, 0)
    ]


@pytest.mark.interop
def test_problems_are_made_by_their_seed():
    pytest.importorskip("reasoning_gym")
    source = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&size=5"
    made = read_dataset(source, "data.train")
    assert made.column_names == ["question", "answer", "metadata"]
    assert made[:] == read_dataset(f"{source}&seed=0", "data.train")[:]
    assert made["answer"][:] != read_dataset(f"{source}&seed=1", "data.train")["answer"][:]
    assert find_rewards(["number"])[0](made["answer"][:], made["answer"][:]) == [1] * 5
    for wrong, said in {
        "chain_sums": "no task 'chain_sums'; did you mean 'chain_sum'?",
        "chain_sum?min_term=2": "no setting 'min_term'; did you mean 'min_terms'?",
        "chain_sum?min_terms=9": "max_terms must be >= min_terms",
    }.items():
        with pytest.raises(UsageError, match=re.escape(said)):
            read_dataset(f"reasoning-gym:{wrong}", "data.train")


@pytest.mark.interop
def test_the_recipe_of_sums_trains(tiny_llama_folder, tmp_path):
    pytest.importorskip("reasoning_gym")
    fewer = ["training.max_steps=1", "training.per_device_train_batch_size=4", "training.num_generations=2"]
    more = [f"model.path={tiny_llama_folder}", f"out={tmp_path / 'run'}", "training.max_completion_length=4"]
    run = job.train(read_recipe("grpo-math", [*fewer, *more, "eval.limit=2"]))
    assert json.loads((run / "results.json").read_text())["after"]["sums"]["n"] == 2


def test_the_recipe_of_pairs_trains(tiny_llama_folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(LAYOUTS["LLaMA-Factory"][0]) + "\n" for _ in range(4)))
    fewer = ["training.max_steps=1", f"data.train={tmp_path / 'pairs.jsonl'}", "training.gradient_accumulation_steps=1"]
    run = job.train(read_recipe("dpo", [f"model.path={tiny_llama_folder}", f"out={tmp_path / 'run'}", *fewer]))
    assert "rewards/margins" in lines(run)[0]


def test_rates_of_grpo_are_not_chosen_by_its_loss(recipe, tmp_path):
    from doralib.experiments.compare.grid import Grid, check_grid

    made = recipe("grpo", data={"validation": 0.5})
    with pytest.raises(UsageError, match="says nothing of grpo"):
        check_grid(Grid(made, ("dora", "lora"), (), (0,), tmp_path / "study"))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_masters_stay_float32_on_a_quantized_base(recipe, kind, even_llama_folder):
    """TRL casts what is trained to bfloat16 there, but for magnitudes."""
    made = recipe(kind)
    model = {"path": str(even_llama_folder), "quantization": "nf4", "dtype": "float32"}
    trainer, _ = make_trainer(made.model_copy(update={"model": made.model.model_copy(update=model)}))
    assert trainer.model.is_loaded_in_4bit
    assert {p.dtype for _, p in trainable(trainer.model)} == {torch.float32}
