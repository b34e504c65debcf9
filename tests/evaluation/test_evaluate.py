"""Tasks: what is read, what is refused, and scores that do not depend on how they were batched."""

import json
import math

import pytest
import torch
from torch.nn.functional import log_softmax

from doralib.cli.console import console
from doralib.cli.eval import results_table, wrong_answers
from doralib.data.templates import columns_in
from doralib.errors import DoraError, UsageError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.example import fill
from doralib.evaluation.generation import generate
from doralib.evaluation.likelihood import LikelihoodRequest, log_likelihoods, option_requests, text_requests
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task import ChoiceTask, ClassificationTask
from doralib.evaluation.task_file import load_tasks
from doralib.evaluation.task_generated import RegexTask

ROWS = [
    {"text": "the movie was wonderful", "label": "positive", "stars": 5},
    {"text": "a dull film, a terrible waste of an evening", "label": "negative", "stars": 1},
    {"text": "numbers 0 1 2 3 4 5 6 7 8 9", "label": "negative", "stars": 2},
    {"text": "brilliant {actors}", "label": "positive", "stars": 4},
] * 5
SENTIMENT = {
    "kind": "classification",
    "prompt": "Review: {text}\nSentiment:",
    "labels": [" positive", " negative"],
    "answer": "label",
}


@pytest.fixture
def task(tmp_path):
    """Writes rows and a task file; returns the task."""

    def write(settings, rows=ROWS, name="made"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # JSON is YAML
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": f"{name}.jsonl"} | settings))
        return load_tasks([str(tmp_path / f"{name}.yaml")])[0]

    return write


def naive(model, request):
    """One request alone, every logit, written to be read."""
    with torch.no_grad():
        logp_TV = log_softmax(model(torch.tensor([request.tokens])).logits[0].double(), dim=-1)
    return sum(float(logp_TV[at - 1, request.tokens[at]]) for at in range(request.start, len(request.tokens)))


def draw_requests(vocabulary, seed=0, count=60):
    """Random lengths, with many common beginnings and some requests twice."""
    g = torch.Generator().manual_seed(seed)
    stems = [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in (1, 3, 8, 21)]
    made = []
    for _ in range(count):
        stem = stems[int(torch.randint(0, 4, (), generator=g))]
        tail = torch.randint(3, 6, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
        made.append(LikelihoodRequest((*stem, *tail), int(torch.randint(1, len(stem) + 1, (), generator=g))))
    return made


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_likelihoods_are_those_of_each_text_alone(tiny, batch_size):
    requests = draw_requests(400)
    done = []
    got = log_likelihoods(tiny[0], requests, batch_size=batch_size, tick=done.append)
    assert got == pytest.approx([naive(tiny[0], request) for request in requests], abs=1e-4)
    assert sum(done) == pytest.approx(1)


def test_long_texts_pass_through_the_head_in_pieces(tiny, monkeypatch):
    monkeypatch.setattr("doralib.evaluation.likelihood._LOGITS_AT_ONCE", 5)
    monkeypatch.setattr("doralib.evaluation.likelihood._TOKENS_AT_ONCE", 30)
    requests = draw_requests(400, seed=1)
    got = log_likelihoods(tiny[0], requests, batch_size=16)
    assert got == pytest.approx([naive(tiny[0], request) for request in requests], abs=1e-4)


def test_a_model_that_caps_its_logits_is_scored_by_its_own_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=90,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=2.0,
            initializer_range=1.0,
        )
    ).eval()
    requests = draw_requests(90)
    got = log_likelihoods(model, requests, batch_size=7)
    assert got == pytest.approx([naive(model, request) for request in requests], abs=1e-4)


def test_labels_of_one_token_share_one_forward_and_one_row_of_the_head(tiny, task):
    model, _ = tiny
    inputs, heads = [], []
    model.model.register_forward_hook(
        lambda _, args, kwargs, out: inputs.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(out.shape[-2]))
    result = evaluate(*tiny, [task(SENTIMENT, ROWS[:4])], batch_size=2)["made"]
    assert result.n == 4
    # the first two forwards compare the model's own logits with ours
    assert [shape[0] for shape in inputs[2:]] == [2, 2]
    assert heads[2:] == [2, 2]


EVERY_KIND = {
    "classification": SENTIMENT,
    "long_labels": SENTIMENT | {"labels": {"positive": " a wonderful movie", "negative": " a dull waste, no 5"}},
    "choice": {
        "kind": "choice",
        "prompt": "{text} or",
        "choices": ["{label} film", "stars", "{text} {stars}"],
        "answer": "{stars}",
        "length_normalise": "tokens",
    },
    "exact_match": {"kind": "exact_match", "prompt": "text", "answer": "label", "max_new_tokens": 6},
    "regex": {
        "kind": "regex",
        "prompt": "text",
        "answer": "stars",
        "pattern": "[0-9]",
        "max_new_tokens": 9,
        "chat": True,
    },
    "perplexity": {"kind": "perplexity", "text": "{label}: {text}"},
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_batch_size_does_not_change_a_result(tiny, task, kind):
    rows = [row | {"text": row["text"] + f" {i}" * (i % 4), "stars": i % 3} for i, row in enumerate(ROWS)]
    made = task(EVERY_KIND[kind], rows)
    results = [evaluate(*tiny, [made], batch_size=size)["made"].to_json() for size in (1, 7, 64)]
    for other in results[1:]:
        assert other["confusion"] == results[0]["confusion"]
        assert other["wrong"] == results[0]["wrong"]
        for name, score in results[0]["metrics"].items():
            assert other["metrics"][name] == pytest.approx(score, rel=1e-4)
    assert results[0]["n"] == len(rows)
    assert json.loads(json.dumps(results[0])).keys() >= {
        "task",
        "kind",
        "n",
        "metrics",
        "confusion",
        "wrong",
        "seconds",
    }


def test_classification_picks_the_more_probable_label(tiny, task):
    model, tokenizer = tiny
    result = evaluate(model, tokenizer, [task(SENTIMENT)])["made"]
    counts = [[0, 0], [0, 0]]
    for row in ROWS:
        before = tokenizer(f"Review: {row['text']}\nSentiment:")["input_ids"]
        logp = [
            naive(model, LikelihoodRequest((*before, *tokenizer(label)["input_ids"]), len(before)))
            for label in SENTIMENT["labels"]
        ]
        counts[row["label"] == "negative"][logp[1] > logp[0]] += 1
    assert result.confusion == {"labels": ["positive", "negative"], "counts": counts}
    assert result.metrics["accuracy"].value == (counts[0][0] + counts[1][1]) / 20
    assert len(result.wrong) == counts[0][1] + counts[1][0]
    assert all(wrong["expected"] != wrong["predicted"] for wrong in result.wrong)
    assert all(wrong["prompt"].startswith("Review: ") for wrong in result.wrong)


def test_choices_are_compared_by_log_likelihood_over_length(tiny, task):
    model, tokenizer = tiny
    choices = ["positive", "a terrible waste of an evening", "9"]
    rows = [{"q": row["text"] + f" {i}", "choices": choices, "key": 1} for i, row in enumerate(ROWS)]
    settings = {"kind": "choice", "prompt": "q", "choices": "choices", "answer": "key"}
    bests = []
    for normalise in ("none", "tokens", "bytes"):
        best = []
        for row in rows:
            before = tokenizer(row["q"])["input_ids"]
            scores = []
            for choice in choices:
                ids = tokenizer(" " + choice)["input_ids"]
                length = {"none": 1, "tokens": len(ids), "bytes": len(choice) + 1}[normalise]
                scores.append(naive(model, LikelihoodRequest((*before, *ids), len(before))) / length)
            best.append(scores.index(max(scores)))
        result = evaluate(model, tokenizer, [task(settings | {"length_normalise": normalise}, rows)])["made"]
        assert result.metrics["accuracy"].value == pytest.approx(best.count(1) / len(rows))
        assert [wrong["predicted"] for wrong in result.wrong] == [choices[i] for i in best if i != 1][:20]
        bests.append(tuple(best))
    assert len(set(bests)) == 3, "rows on which the three lengths agree prove nothing"


@pytest.mark.parametrize(
    ("answer", "first_index", "truth"),
    [(1, 0, 1), ("1", 1, 0), ("b", 0, 1), ("C", 0, 2), (" blue", 0, 2), (2.0, 0, 2), ("3", 0, None), ("D", 0, None)],
)
def test_an_answer_is_an_index_a_letter_or_the_text(answer, first_index, truth):
    made = ChoiceTask(name="t", prompt="q", choices="c", answer="a", first_index=first_index)
    rows = [{"q": "?", "c": ["red", "green", "blue"], "a": answer}]
    if truth is None:
        with pytest.raises(DoraError, match="1 of 1 rows have an answer that cannot be given"):
            made.examples(rows)
    else:
        (example,) = made.examples(rows)
        assert (example.truth, example.options) == (truth, (" red", " green", " blue"))
        assert example.answer == ["red", "green", "blue"][truth]


def test_a_choice_whose_text_is_a_number_is_found_by_its_text():
    made = ChoiceTask(name="t", prompt="q", choices="c", answer="a")
    assert made.examples([{"q": "2+2", "c": ["3", "4", "2"], "a": "2"}])[0].truth == 2


def test_generated_answers_are_compared_after_the_pattern(tiny, task):
    texts = [row["text"] + f" {i}" for i, row in enumerate(ROWS[:6])]
    outputs = generate(*tiny, texts, max_new_tokens=8)
    rows = [
        {"q": text, "exact": out.strip() if i != 4 else "other", "first": out.strip()[0] if i != 2 else "no"}
        for i, (text, out) in enumerate(zip(texts, outputs, strict=True))
    ]
    regex = task({"kind": "regex", "prompt": "q", "answer": "first", "pattern": r"\S", "max_new_tokens": 8}, rows, "r")
    exact = task({"kind": "exact_match", "prompt": "q", "answer": "exact", "max_new_tokens": 8}, rows, "e")
    results = evaluate(*tiny, [regex, exact], batch_size=4)
    assert results["r"].metrics["accuracy"].value == pytest.approx(5 / 6)
    assert results["r"].wrong == (
        {"prompt": texts[2], "expected": "no", "predicted": outputs[2].strip()[0], "output": outputs[2]},
    )
    assert results["e"].metrics["accuracy"].value == pytest.approx(5 / 6)
    assert results["e"].wrong[0]["expected"] == "other"


@pytest.mark.parametrize(
    ("pattern", "text", "said"),
    [
        ("true|false", " the correct answer is false, not true", "false"),
        ("true|false", "True", ""),
        ("answer: (yes|no)", "so the answer: no", "no"),
        ("yes", "", ""),
    ],
)
def test_the_first_match_is_the_answer(pattern, text, said):
    assert RegexTask(name="t", prompt="q", answer="a", pattern=pattern).predicted(text) == said


def test_lowercase_compares_without_case():
    made = RegexTask(name="t", prompt="q", answer="a", pattern="true|false", lowercase=True)
    assert made.predicted("TRUE") == "true"
    assert made.examples([{"q": "", "a": True}])[0].answer == "true"


def test_perplexity_is_that_of_every_token_once(tiny, task):
    model, tokenizer = tiny
    rows = [{"text": "the movie " * n + "was wonderful é"} for n in (1, 20, 200)]
    loss = tokens = 0
    for row in rows:
        ids = [tokenizer.eos_token_id, *tokenizer(row["text"])["input_ids"]]
        for begin in range(0, len(ids) - 1, 50):
            piece = LikelihoodRequest(tuple(ids[begin : begin + 51]), 1)
            loss -= naive(model, piece)
            tokens += piece.length
    assert tokens == sum(len(tokenizer(row["text"])["input_ids"]) for row in rows)
    scores = evaluate(model, tokenizer, [task({"kind": "perplexity", "text": "text", "window": 50}, rows)])[
        "made"
    ].metrics
    assert scores["perplexity"].value == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    num_bytes = sum(len(row["text"].encode()) for row in rows)
    assert scores["bits_per_byte"].value == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize(("prompt", "limit"), [("", 5), ("the movie was", 5), ("the movie was", 2), ("", 1000)])
def test_pieces_cover_the_text_and_fit(tiny, prompt, limit):
    tokenizer = tiny[1]
    text = " a dull film, a terrible waste of an evening"
    requests, cut = text_requests(tokenizer, prompt, text, chat=False, limit=limit)
    scored = [token for request in requests for token in request.tokens[request.start :]]
    assert tokenizer.decode(scored) == text
    assert all(request.start >= 1 and len(request.tokens) - 1 <= limit for request in requests)
    assert cut == (limit == 2)


def test_options_that_melt_into_the_prompt_are_scored_from_where_they_differ(tiny):
    tokenizer = tiny[1]
    # the prompt's last space becomes part of the label's first token
    requests, _ = option_requests(tokenizer, "Sentiment: ", ["positive", "negative"], chat=False, limit=None)
    assert [tokenizer.decode(request.tokens[request.start :]) for request in requests] == [" positive", " negative"]


def test_a_long_prompt_loses_its_beginning_and_is_counted(tiny, task):
    _, tokenizer = tiny
    rows = [{"text": "the movie " * n + "the end", "label": "positive"} for n in (1, 200, 300)]
    result = evaluate(*tiny, [task(SENTIMENT, rows)])["made"]
    assert (result.cut, result.n) == (2, 3)
    prompt = f"Review: {rows[1]['text']}"
    tokens = tokenizer(prompt)["input_ids"]
    kept, cut = option_requests(tokenizer, prompt, [" a", " 1 2"], chat=False, limit=100)
    assert cut
    # the longer option has two tokens, of which the last is no input
    assert [request.tokens[: request.start] for request in kept] == [tuple(tokens[-99:])] * 2
    assert [tokenizer.decode(request.tokens[request.start :]) for request in kept] == [" a", " 1 2"]
    with pytest.raises(UsageError, match="the model takes 2 in all"):
        option_requests(tokenizer, prompt, [" 1 2 3 4"], chat=False, limit=2)


def test_a_long_prompt_is_answered_from_its_end(tiny, task):
    model, tokenizer = tiny
    rows = [{"text": "the movie " * 300 + "the end", "label": "never"}]
    settings = {"kind": "exact_match", "prompt": "text", "answer": "label", "max_new_tokens": 6}
    result = evaluate(model, tokenizer, [task(settings, rows)])["made"]
    tail = tokenizer.decode(tokenizer(rows[0]["text"])["input_ids"][-250:])
    assert result.cut == 1
    assert [wrong["output"] for wrong in result.wrong] == generate(model, tokenizer, [tail], max_new_tokens=6)
    with pytest.raises(UsageError, match="no room for a prompt"):
        evaluate(model, tokenizer, [task(settings | {"max_new_tokens": 256})])


def test_chat_scores_behind_the_template(tiny, task):
    plain = task(SENTIMENT | {"prompt": "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"}, name="plain")
    chat = task(SENTIMENT | {"prompt": "text", "chat": True}, name="chat")
    seen = []
    tiny[0].model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    evaluate(*tiny, [plain])
    half = len(seen)
    evaluate(*tiny, [chat])
    assert seen[half:] == seen[:half]


def test_modes_come_back_and_no_gradient_is_kept(tiny, task):
    model, _ = tiny
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.model.register_forward_hook(lambda module, *_: during.append((module.training, torch.is_grad_enabled())))
    evaluate(*tiny, [task(SENTIMENT)])
    assert set(during) == {(False, False)}
    assert [module.training for module in model.modules()] == modes


def test_limit_takes_the_first_rows_and_twenty_mistakes_are_shown(tiny, task):
    rows = [{"q": f"the movie {i}", "a": "never said"} for i in range(30)]
    made = task({"kind": "exact_match", "prompt": "q", "answer": "a", "max_new_tokens": 1}, rows)
    assert evaluate(*tiny, [made], limit=3)["made"].n == 3
    result = evaluate(*tiny, [made])["made"]
    assert (result.n, len(result.wrong)) == (30, 20)
    assert result.wrong[0]["prompt"] == "the movie 0"


def test_nan_is_an_error(tiny, task):
    with torch.no_grad():
        tiny[0].lm_head.weight[3] = float("nan")
    with pytest.raises(DoraError, match="NaN for 40 of 40 texts"):
        evaluate(*tiny, [task(SENTIMENT)])


def word_tokenizer(unknown=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["<eos>", "<unk>", "the", "movie", "Review", ":", "Sentiment", "positive"])
    }
    raw = Tokenizer(models.WordLevel(words, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token=unknown)


def test_labels_that_the_tokenizer_loses_are_refused(tiny, task):
    model, tokenizer = tiny
    with pytest.raises(UsageError, match=r"maps '' to nothing"):
        evaluate(model, tokenizer, [task(SENTIMENT | {"labels": {"positive": "", "negative": " negative"}})])
    unknown = task(SENTIMENT | {"labels": {"positive": " good", "negative": " bad"}})
    with pytest.raises(UsageError, match=r"maps ' good' and ' bad' to the same tokens"):
        evaluate(model, word_tokenizer("<unk>"), [unknown])


def test_results_as_a_table(tiny, task):
    results = evaluate(*tiny, [task(SENTIMENT), task({"kind": "perplexity", "text": "text"}, name="ppl")])
    with console.capture() as capture:
        console.print(results_table(results, "scores"))
    shown = capture.get()
    accuracy = results["made"].metrics["accuracy"]
    interval = f"{100 * accuracy.low:.1f} % to {100 * accuracy.high:.1f} %"
    assert f"{100 * accuracy.value:.1f} % │ {interval}" in " ".join(shown.split())
    assert all(word in shown for word in ("scores", "made", "macro f1", "perplexity", "bits per byte"))


def test_wrong_answers_are_shown_as_they_are(tiny, task):
    rows = [{"q": "a [bold]question[/bold]", "a": "[red]never"}] * 7
    made = task({"kind": "regex", "prompt": "q", "answer": "a", "pattern": "never said", "max_new_tokens": 3}, rows)
    results = evaluate(*tiny, [made, task({"kind": "perplexity", "text": "q"}, rows, "ppl")])
    with console.capture() as capture:
        console.print(wrong_answers("made", results["made"]))
    shown = capture.get()
    assert "made: 7 of 7 answers are wrong" in shown
    assert shown.count("[bold]question[/bold]") == 5
    assert "[red]never" in shown
    assert "(no answer in:" in shown
    with console.capture() as capture:
        console.print(wrong_answers("ppl", results["ppl"]))
    assert not capture.get().strip()


# what is read


def test_misspelt_names_are_reported_all_at_once():
    with pytest.raises(UsageError) as caught:
        load_tasks(["bolq", "winogrand=x.json"])
    assert "no task 'bolq'" in str(caught.value)
    assert "did you mean 'boolq'?" in str(caught.value)
    assert "did you mean 'winogrande'?" in str(caught.value)


def test_two_tasks_of_one_name_are_refused(task, tmp_path):
    task(SENTIMENT)
    with pytest.raises(UsageError, match="two tasks are called 'made'"):
        load_tasks([str(tmp_path / "made.yaml")] * 2)


def test_data_lies_beside_the_task_file_unless_given(task, tmp_path, monkeypatch):
    made = task(SENTIMENT)
    monkeypatch.chdir("/")
    assert len(read_examples(made)) == 20
    (tmp_path / "other.csv").write_text("text,label\ngood,positive\n")
    monkeypatch.chdir(tmp_path)
    (other,) = load_tasks(["made.yaml=other.csv"])
    assert [example.prompt for example in read_examples(other)] == ["Review: good\nSentiment:"]


def test_a_task_like_another(task, tmp_path):
    task(SENTIMENT | {"name": "first"})
    made = task({"like": "made.yaml", "prompt": "text"}, name="second")
    assert (made.name, made.prompt, dict(made.labels)) == (
        "second",
        "text",
        {"positive": " positive", "negative": " negative"},
    )
    with pytest.raises(UsageError, match="leads back to itself"):
        task({"like": "loop.yaml"}, name="loop")
    with pytest.raises(UsageError, match="no task 'bolq'; did you mean 'boolq'"):
        task({"like": "bolq"}, name="loop")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lables": [" a", " b"]}, "lables: there is no such setting; did you mean 'labels'?"),
        ({"kind": "clasification"}, "did you mean 'classification'?"),
        ({"kind": None}, "no kind"),
        ({"labels": [" a"]}, "at least two different labels"),
        ({"labels": [" a", "a"]}, "at least two different labels"),
        ({"prompt": "Review: {text"}, "a brace in the text is written"),
        ({"prompt": "Review: {text:>8}"}, "a column's name alone"),
        ({"prompt": "Review: {}"}, "a column's name alone"),
        ({"kind": "regex", "labels": None, "pattern": "(a"}, "not a regular expression"),
        ({"kind": "exact_match", "labels": None, "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_bad_task_file_is_explained(task, change, says):
    settings = {key: value for key, value in (SENTIMENT | change).items() if value is not None}
    with pytest.raises(UsageError) as caught:
        task(settings)
    assert says in str(caught.value)
    assert "made.yaml" in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [("a: [", "is not YAML"), ("- a", "found list"), ("", "found NoneType")])
def test_a_file_that_is_no_task_is_explained(tmp_path, text, says):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UsageError, match=says):
        load_tasks([str(tmp_path / "t.yaml")])


def test_columns_that_are_not_there_are_named(tiny, task):
    first = task(SENTIMENT | {"prompt": "{txt} {stars}", "answer": "lable"})
    second = task({"kind": "perplexity", "text": "body"}, name="second")
    with pytest.raises(UsageError) as caught:
        evaluate(*tiny, [first, second])
    for part in (
        "'txt'; did you mean 'text'?",
        "'lable'; did you mean 'label'?",
        "columns text, label, stars",
        "'body'",
    ):
        assert part in str(caught.value)


def test_rows_that_cannot_be_scored_are_counted(task):
    with pytest.raises(DoraError, match=r"2 of 3 rows have an answer.*'neutral' \(2\)") as caught:
        read_examples(task(SENTIMENT, [{"text": "a", "label": label} for label in ("positive", "neutral", "neutral")]))
    assert not isinstance(caught.value, UsageError)
    assert "allowed: positive, negative" in str(caught.value)
    with pytest.raises(DoraError, match=r"of 3 rows, a value is missing for 'text' in 1"):
        read_examples(task(SENTIMENT, [{"text": text, "label": "positive"} for text in ("a", None, "b")]))
    with pytest.raises(DoraError, match="1 of 2 texts are empty"):
        read_examples(task({"kind": "perplexity", "text": "text"}, [{"text": "a"}, {"text": " "}]))
    with pytest.raises(UsageError, match="empty"):
        read_examples(task(SENTIMENT, []))


def test_labels_by_value(task):
    labels = {"1": " bad", "5": " good"}
    rows = [{"text": "a", "label": 5}, {"text": "b", "label": 1}]
    made = read_examples(task(SENTIMENT | {"labels": labels}, rows))
    assert [(example.answer, example.options[example.truth]) for example in made] == [("5", " good"), ("1", " bad")]


@pytest.mark.parametrize(("value", "key"), [(True, "true"), (5.0, "5"), (5, "5"), (" a ", "a"), (0.5, "0.5")])
def test_values_and_labels_meet_as_plain_text(value, key):
    made = ClassificationTask(name="t", prompt="q", labels={value: " yes", "other": " no"}, answer="a")
    (example,) = made.examples([{"q": "", "a": value}])
    assert (example.answer, example.truth) == (key, 0)


def test_a_beginning_token_stands_once_whatever_the_prompt(tiny):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.bos_token = "<|im_start|>"
    for prompt in ("Sentiment:", ""):
        (plain,), _ = option_requests(tokenizer, prompt, [" positive"], chat=False, limit=None)
        assert tokenizer.decode(plain.tokens) == f"<|im_start|>{prompt} positive"
    (chat,), _ = option_requests(tokenizer, "<|im_start|>user\nx", [" positive"], chat=True, limit=None)
    assert tokenizer.decode(chat.tokens) == "<|im_start|>user\nx positive"
    (text,), _ = text_requests(tokenizer, "", "the movie", chat=False, limit=99)
    assert (tokenizer.decode(text.tokens), text.start) == ("<|im_start|>the movie", 1)


def test_templates_name_columns_and_nothing_else():
    assert columns_in("{a b} and {{c}} {d}") == ["a b", "d"]
    assert columns_in("text") == ["text"]
    assert fill("{a b} and {{c}} {d}", {"a b": "{d}", "d": 3}) == "{d} and {c} 3"
    assert columns_in("{d.__class__}") == ["d.__class__"], "an attribute is a column's name, which no row has"
