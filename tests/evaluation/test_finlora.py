"""FinLoRA's tasks: answers and scores as its own scripts find them, BERTScore, the published rows beside."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from doralib.cli.eval import published_table
from doralib.errors import DoraError, UsageError
from doralib.evaluation import kinds
from doralib.evaluation.bertscore import load_encoder
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.metrics import Score, label_scores, mean_score
from doralib.evaluation.result import TaskResult
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks, packaged_tasks
from doralib.families import Variant
from doralib.training.recipe_file import packaged_recipes

ALL = [name for name in packaged_tasks() if name.startswith("finlora/") and name != "finlora/sentiment"]
NAMES = [name for name in ALL if not name.endswith("-likelihood")]
LIKELIHOOD = [name for name in ALL if name.endswith("-likelihood")]
TEXTS = ("finlora/xbrl_term", "finlora/financebench")

# what models wrote, the right answers, and what FinLoRA's test_dataset.py (commit 7e1cf828, with scikit-learn's F1)
# makes of all of them together: rightness, accuracy, weighted F1
SENTIMENT = [
    ("positive", "positive", 1),
    (" Positive.\n", "positive", 1),
    ("negative", "positive", 0),
    ("negative, not positive", "positive", 0),
    ("NEUTRAL", "neutral", 1),
    ("I cannot say", "neutral", 0),
    ("", "negative", 0),
    ("unpositively negative", "negative", 0),
    ("negative Answer: positive", "positive", 1),
    ("neutral", "negative", 0),
    ("negative.", "negative", 1),
    ("Neg", "negative", 0),
]
SEVEN = [
    ("mildly positive", "mildly positive", 1),
    ("positive", "mildly positive", 0),
    ("moderately negative outlook", "moderately negative", 1),
    ("the tone is neutral to mildly negative", "mildly negative", 0),
    ("Strong positive", "strong positive", 1),
    ("strongly positive", "strong positive", 0),
    ("neutral", "neutral", 1),
]
TAGS = [
    ("RevenueA, RevenueB,Cash", "RevenueA,RevenueB,Cash", (1, 1, 1)),
    ("RevenueA,RevenueB,Cash,Debt,Debt", "RevenueA,Cash,Cash,Debt", (1, 0, 1, 1)),
    ("Cash", "Cash,Debt", (1, 0)),
    ("", "Debt", (0,)),
    ("Debt\nCash, Debt", "Debt,Cash", (1, 0)),
    ("cash flow, debts", "Cash,Debt", (1, 1)),
]
NUMBERS = [
    ("3.0", "3.0", 1),
    ("23.0", "3.0", 1),
    ("$1,832.00", "1832.0", 0),
    ("The value is 15.5", "15.5", 1),
    ("0.3", "3.0", 0),
]
SCORES = {
    "tfns": (SENTIMENT, 5 / 12, 0.5148809523809524),
    "nwgi": (SEVEN, 4 / 7, 2 / 3),
    "finer": (TAGS, 10 / 14, 0.7714285714285714),
    "formula": (NUMBERS, 3 / 5, 0.68),
}


def write_rows(path, targets):
    rows = [{"context": f"Q{i}\nAnswer: ", "target": target} for i, target in enumerate(targets)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score_outputs(monkeypatch, path, name, written):
    """The result of a model that writes these texts."""
    monkeypatch.setattr(kinds, "answer_examples", lambda *_: (list(written), 0))
    (task,) = load_tasks([f"finlora/{name}={path}"])
    return evaluate(torch.nn.Linear(1, 1), None, [task])[task.name]


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_finloras_own_scripts(name, tmp_path, monkeypatch):
    rows, accuracy, f1 = SCORES[name]
    data = write_rows(tmp_path / "x.jsonl", [target for _, target, _ in rows])
    result = score_outputs(monkeypatch, data, name, [text for text, _, _ in rows])
    right = np.hstack([each for _, _, each in rows])
    assert result.right == "".join(map(str, right))
    assert result.n == len(right)
    assert result.metrics["accuracy"].value == pytest.approx(accuracy, abs=1e-12)
    assert result.metrics["weighted_f1"].value == pytest.approx(f1, abs=1e-12)
    assert result.metrics["weighted_f1"].low < f1 < result.metrics["weighted_f1"].high
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json())), tmp_path) == result


def test_a_wrong_text_is_no_label_to_f1(tmp_path, monkeypatch):
    """FinLoRA's quirk, by which its F1 is above its accuracy: a wrong label counts against itself if it is alone."""
    data = write_rows(tmp_path / "x.jsonl", ["positive", "negative", "neutral"])
    alone, followed = (
        score_outputs(monkeypatch, data, "fpb", ["positive", f"positive{end}", "neutral"]) for end in ("", ".")
    )
    assert alone.metrics["accuracy"] == followed.metrics["accuracy"]
    assert alone.metrics["weighted_f1"].value == pytest.approx((2 / 3 + 1) / 3)
    assert followed.metrics["weighted_f1"].value == pytest.approx((1 + 1) / 3)
    assert [wrong["predicted"] for wrong in followed.wrong] == ["positive"]


def test_of_labels_that_begin_together_the_longest_counts(tmp_path, monkeypatch):
    """FinLoRA takes the one that comes first in a Python set, which is another one in each process."""
    data = write_rows(tmp_path / "x.jsonl", ["2.0", "2.05"])
    assert score_outputs(monkeypatch, data, "formula", ["2.05", "2.05"]).right == "01"


def test_a_target_that_is_no_label(tmp_path):
    data = write_rows(tmp_path / "x.jsonl", ["positive", "very good", "POSITIVE"])
    with pytest.raises(DoraError, match=r"1 of 3 rows .*'very good'"):
        read_examples(load_tasks([f"finlora/tfns={data}"])[0])


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_by_likelihood_the_labels_are_the_same(name, tiny, tmp_path):
    file = tmp_path / f"{name.removesuffix('-likelihood').removeprefix('finlora/')}_test.jsonl"
    (task,), (asked,) = (load_tasks([f"{each}={tmp_path}"]) for each in (name, name.removesuffix("-likelihood")))
    assert (task.kind, tuple(task.labels), task.in_folder) == ("classification", asked.labels, file.name)
    write_rows(file, list(task.labels))
    result = evaluate(*tiny, [task])[task.name]
    assert (result.n, list(result.metrics)) == (len(task.labels), ["accuracy", "macro_f1"])


def test_prompts_that_end_with_a_blank_are_told_of(tiny, tmp_path, caplog):
    """FinLoRA's contexts do, and a tokenizer joins the blank to the answer where both are one text."""
    data = write_rows(tmp_path / "x.jsonl", ["positive", "negative"])
    caplog.set_level("INFO")
    evaluate(*tiny, load_tasks([f"finlora/tfns={data}"]))
    assert "its prompts end with a blank" in caplog.text
    caplog.clear()
    data.write_text(data.read_text().replace('Answer: "', 'Answer:"'))
    evaluate(*tiny, load_tasks([f"finlora/tfns={data}"]))
    assert "blank" not in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_found_in_finloras_folder(name, tmp_path):
    (task,) = load_tasks([f"{name}={tmp_path}"])
    short = name.removeprefix("finlora/")
    batched = "_batched" if short in ("finer", "fnxl") else ""
    assert task.in_folder == f"{short}_test{batched}.jsonl"
    target = {"nwgi": "neutral", "ner": "person"}.get(short, "positive")
    write_rows(tmp_path / task.in_folder, [target])
    (example,) = read_examples(task)
    # the context alone, to the space at its end
    assert (example.prompt, example.answer) == ("Q0\nAnswer: ", target)
    assert task.kind == ("bertscore" if name in TEXTS else "first_label")
    told = {"xbrl_extract_tags": 20, "xbrl_extract_value": 20, "formula": 50, "xbrl_term": 50, "financebench": 50}
    classes = dict.fromkeys(("fpb", "fiqa", "tfns", "nwgi", "ner", "headline"), 10)
    assert task.max_new_tokens == {**told, **classes, "finer": 100, "fnxl": 100}.get(short, 30)


def test_four_sets_at_once(tmp_path):
    tasks = load_tasks([f"finlora/sentiment={tmp_path}"])
    assert [task.name for task in tasks] == [f"finlora/{name}" for name in ("fpb", "fiqa", "tfns", "nwgi")]


def test_a_real_model_is_asked(tiny, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", ["positive", "negative"])
    (task,) = load_tasks([f"finlora/tfns={data}"])
    result = evaluate(*tiny, [task])[task.name]
    assert list(result.metrics) == ["accuracy", "weighted_f1"]


# scores


def test_label_scores_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, said = rng.choice(list("abc"), 20), rng.choice(list("abcdx"), 20)
        total = 0.0
        for label in set(truth):
            hits = sum((truth == label) & (said == label))
            total += sum(truth == label) * 2 * hits / (sum(truth == label) + sum(said == label))
        found = label_scores(list(truth), list(said), 0)
        assert found["weighted_f1"].value == pytest.approx(total / 20)
        assert found["accuracy"].value == pytest.approx((truth == said).mean())
    assert label_scores(["a"] * 5, ["a"] * 5, 0)["weighted_f1"] == Score(1.0, 1.0, 1.0)


def test_mean_score():
    score = mean_score([0.0, 1.0] * 200, 0)
    assert score.value == 0.5
    assert score.low == pytest.approx(0.45, abs=0.01)
    assert mean_score([0.25], 0) == Score(0.25, 0.25, 0.25)


# BERTScore

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "value",
    "of",
    "revenue",
    "amount",
    "cost",
    "a",
    "is",
    ".",
]
WORDS += ["to", "be", ",", "not"]
PAIRS = [
    ("the value of revenue", "the amount of revenue"),
    ("amount", "cost"),
    (" The VALUE, the value. ", "a cost is not to be the value of the amount"),
    ("revenue", "revenue"),
]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT."""
    folder = tmp_path_factory.mktemp("bert")
    numbers = {word: i for i, word in enumerate(WORDS)}
    BertTokenizerFast(vocab=numbers, model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def plain_bertscore(encoder, text, reference):
    """Each text alone, word by word."""

    def units(text):
        ids = encoder.tokenizer(text.strip(), return_tensors="pt")["input_ids"]
        states = encoder.model(ids, output_hidden_states=True).hidden_states[encoder.layer][0]
        return [state / state.norm() for state in states.detach().double()]

    one, other = units(text), units(reference)
    precision = np.mean([max(float(a @ b) for b in other) for a in one[1:-1]])
    recall = np.mean([max(float(a @ b) for a in one) for b in other[1:-1]])
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_bertscore_is_the_plain_formula(encoder_folder, layer):
    encoder = load_encoder(str(encoder_folder), layer, "scorer")
    found = encoder.compare(*zip(*PAIRS, strict=True))
    for each, pair in zip(found, PAIRS, strict=True):
        assert (each.precision, each.recall, each.f1) == pytest.approx(plain_bertscore(encoder, *pair), abs=1e-6)
    assert found[3].f1 == pytest.approx(1.0, abs=1e-6)
    assert found[0].f1 < 0.999
    assert encoder.compare(["", "the"], ["the", ""])[0].f1 == 0.0


@pytest.mark.interop
def test_bertscore_is_that_of_the_package(encoder_folder):
    bert_score = pytest.importorskip("bert_score", reason="bert-score is not installed")
    scorer = bert_score.BERTScorer(model_type=str(encoder_folder), num_layers=2)
    theirs = torch.stack(scorer.score(*map(list, zip(*PAIRS, strict=True)))).T
    ours = load_encoder(str(encoder_folder), 2, "scorer").compare(*zip(*PAIRS, strict=True))
    found = torch.tensor([(each.precision, each.recall, each.f1) for each in ours])
    assert torch.allclose(found, theirs, atol=1e-5)


def test_long_texts_are_cut_at_what_the_encoder_takes(encoder_folder):
    encoder = load_encoder(str(encoder_folder), 2, "scorer")
    (one,) = encoder.compare(["the value " * 40], ["the value " * 15])
    assert one.f1 == pytest.approx(1.0, abs=1e-6)


def test_a_task_with_a_scorer_of_its_own(encoder_folder, tiny, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", ["the amount of revenue", "a cost"])
    file = tmp_path / "term.yaml"
    file.write_text(f"like: finlora/xbrl_term\ndata: {data}\nscorer: {encoder_folder}\nscorer_layer: 2\n")
    (task,) = load_tasks([str(file)])
    result = evaluate(*tiny, [task])["term"]
    assert list(result.metrics) == ["bertscore_f1", "bertscore_precision", "bertscore_recall"]
    assert result.right == ""
    file.write_text(file.read_text().replace("scorer_layer: 2", "scorer_layer: 4"))
    with pytest.raises(UsageError, match=r"scorer_layer: .* has 3 layers"):
        evaluate(*tiny, load_tasks([str(file)]))
    file.write_text(f"like: finlora/xbrl_term\ndata: {data}\nscorer: {tmp_path / 'none'}\n")
    with pytest.raises(UsageError, match=r"scorer: .* cannot be loaded(.|\n)*name its folder as scorer"):
        evaluate(*tiny, load_tasks([str(file)]))


# beside the published rows


def make_result(name, **metrics):
    return TaskResult(name, "first_label", 10, {key: Score(v, 0, 1) for key, v in metrics.items()}, None, (), 0, 1.0)


def shown(table):
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_beside_all_published_rows():
    beside = [each for each in packaged_recipes().values() if each.name.startswith("finlora/sentiment")]
    table = published_table({"t": make_result("finlora/tfns", accuracy=0.8, weighted_f1=0.75)}, beside, "t")
    assert [column.header for column in table.columns][2:] == [
        f"sentiment-{m}" for m in ("lora", "qlora", "dora", "rslora")
    ]
    assert shown(table) == [
        ["tfns", "80.0", "88.0", "83.8", "59.1", "59.5"],
        ["tfns F1", "0.750", "0.932", "0.910", "0.702", "0.655"],
    ]
    both = {name: make_result(f"finlora/{name}", accuracy=0.5) for name in ("fpb", "tfns")}
    assert shown(published_table(both, beside, "t"))[-1][0] == "average of these 2"
    assert shown(published_table(both, beside, "t"))[-1][3] == f"{(84.16 + 83.84) / 2:.1f}"
    (term,) = [each for each in packaged_recipes().values() if each.name == "finlora/xbrl_term-dora"]
    scored = {"t": make_result("finlora/xbrl_term", bertscore_f1=0.5, bertscore_recall=0.1)}
    assert shown(published_table(scored, [term], "t")) == [["xbrl_term BERTScore", "0.500", "0.606", "-0.106"]]


def test_the_command_says_that_settings_are_unequal(run, tiny_llama_folder, tmp_path):
    write_rows(tmp_path / "tfns_test.jsonl", ["positive", "negative"])
    ask = ("eval", tiny_llama_folder, "--tasks", f"finlora/tfns={tmp_path}", "--published")
    status, out, _ = run(*ask, "finlora/sentiment")
    assert status == 0
    said = " ".join(out.split())
    assert "published rows compare unequal settings" in said
    assert "weighted f1" in said
    assert said.count("unequal") == 1
    status, _, err = run(*ask, "finlora/smollm2")
    assert status == 2
    assert "no result of finlora/smollm2 was published" in err
    assert run(*ask, "finlora/sentimental")[0] == 2


def test_every_published_score_belongs_to_a_task():
    scored = [each for each in packaged_recipes().values() if each.name.startswith("finlora/") and each.published]
    assert len(scored) == 32
    kinds = {"finlora/" + name.partition(" ")[0] for each in scored for name in each.published}
    assert kinds <= set(NAMES)
    assert all(isinstance(each, Variant) and any("unequal settings" in note for note in each.notes) for each in scored)
