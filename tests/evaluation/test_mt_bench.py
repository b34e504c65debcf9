"""MT-Bench: two turns in the model's template, FastChat's files, a judge behind a server that fails in every way."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from doralib.errors import DoraError, UsageError
from doralib.evaluation.generation import answer_each
from doralib.evaluation.json_lines import append_lines
from doralib.evaluation.mt_bench import judge as judging
from doralib.evaluation.mt_bench.answers import Answering, answer_questions
from doralib.evaluation.mt_bench.judge import Judge, Verdict, find_rating, find_winner
from doralib.evaluation.mt_bench.questions import (
    read_answers,
    read_judge_prompts,
    read_judgments,
    read_questions,
)
from doralib.evaluation.mt_bench.scores import score_categories

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the movie {question_2}", "a dull film"]},
    {"question_id": 111, "category": "math", "turns": ["numbers 0 1 2", "numbers 3 4"]},
]
SINGLE = "[Q]{question}[A]{answer}"
BOTH = "{question_1}|{answer_1}|{question_2}|{answer_2}"
PAIR, PAIRS = "{question}|{answer_a}|{answer_b}", "{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}"
TEMPLATES = {
    "single-v1": SINGLE,
    "single-math-v1": SINGLE + "[R]{ref_answer_1}",
    "single-v1-multi-turn": BOTH,
    "single-math-v1-multi-turn": BOTH + "|{ref_answer_1}|{ref_answer_2}",
    "pair-v2": PAIR,
    "pair-math-v1": PAIR + "|{ref_answer_1}",
    "pair-v2-multi-turn": PAIRS,
    "pair-math-v1-multi-turn": PAIRS + "|{ref_answer_2}",
}
ANSWERS = {81: ["one {question}", "two"], 111: ["three", "four"]}
OTHERS = {81: ["eins", "zwei"], 111: ["drei", "vier"]}


@pytest.fixture
def file(tmp_path):
    """FastChat's three files, short."""
    lines = lambda name, values: (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    lines("question.jsonl", QUESTIONS)
    lines("reference_answer.jsonl", [{"question_id": 111, "choices": [{"turns": ["Area is 3", "5pi"]}]}])
    prompts = [{"name": name, "system_prompt": f"be {name}", "prompt_template": t} for name, t in TEMPLATES.items()]
    lines("judge_prompts.jsonl", prompts)
    return tmp_path / "question.jsonl"


@pytest.fixture
def server():
    """A server that speaks the protocol: each request gets the next of `replies`, else "[[7]]"."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.asked.append((self.path, self.headers.get("Authorization"), body))
            reply = running.replies.pop(0) if running.replies else "[[7]]"
            if reply == "cut":
                self.connection.close()
                return
            status, text = reply if isinstance(reply, tuple) else (200, None)
            if text is None:
                text = json.dumps({"choices": [{"message": {"content": reply}}]})
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.replies = [], []
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    yield running
    running.shutdown()
    running.server_close()


def judge_of(server):
    return Judge(server.url, "judge-1", "secret", first_wait=0.001)


# answers


def test_two_turns_in_the_models_own_template(tiny, file, tmp_path):
    model, tokenizer = tiny
    questions = read_questions(file)
    out = tmp_path / "answers.jsonl"
    answers = answer_questions(Answering(model, tokenizer, "me", max_new_tokens=6), questions, out)
    one, two = answers[111]
    prompt = "<|im_start|>user\nnumbers 0 1 2<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert answer_each(model, tokenizer, [ids], max_new_tokens=6, batch_size=1)[0].text.strip() == one
    prompt += f"{one}<|im_end|>\n<|im_start|>user\nnumbers 3 4<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert answer_each(model, tokenizer, [ids], max_new_tokens=6, batch_size=1)[0].text.strip() == two
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 111]
    assert set(lines[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert lines[1]["choices"] == [{"index": 0, "turns": [one, two]}]
    # killed in the middle of a line: what is whole stays, the rest is answered again
    whole = out.read_text()
    out.write_text(whole[: whole.index("\n") + 30])
    again = answer_questions(Answering(model, tokenizer, "me", max_new_tokens=6), questions, out)
    assert again == answers
    assert list(read_answers(out)) == [81, 111]
    file.write_text(json.dumps({**QUESTIONS[0], "turns": ["the movie " * 400, ""]}) + "\n")
    questions = read_questions(file)
    with pytest.raises(UsageError, match="takes 256"):
        answer_questions(Answering(model, tokenizer, "me"), questions, tmp_path / "long.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "valid dictionary"),
        ("{}", "question_id: Field required"),
        ('{"question_id": 1, "choices": []}', "choices: .*at least 1 item"),
        ('{"question_id": 1, "choices": [{"turns": "no"}]}', "choices.0.turns: .*valid list"),
        ("[" * 5000 + "]" * 5000, "nested deeper"),
    ],
)
def test_a_damaged_answer_file_is_refused_by_its_line(tmp_path, line, said):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{line}\n" + '{"question_id": 2, "choices": [{"turns": ["a", "b"]}]}\n')
    with pytest.raises(DoraError, match=f"line 1.*{said}"):
        read_answers(path)


def test_a_damaged_judgment_file_is_refused_by_its_line(tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text('{"question_id": 2, "turn": 1, "score": "high"}\n')
    with pytest.raises(DoraError, match=r"line 1: score: .*valid number"):
        read_judgments(path)
    path.write_text('{"question_id": 2, "turn": 1, "score": 7}\n')
    assert read_judgments(path)[2, 1]["score"] == 7
    with pytest.raises(DoraError, match="g1_winner: Field required"):
        read_judgments(path, pairs=True)


def test_a_reference_that_is_missing_is_named(file):
    (file.parent / "reference_answer.jsonl").write_text(
        json.dumps({"question_id": 1, "choices": [{"turns": []}]}) + "\n"
    )
    with pytest.raises(DoraError, match="no answer to question 111"):
        read_questions(file)


# prompts and scores


def test_the_judges_prompts(file):
    questions, prompts = read_questions(file), read_judge_prompts(file)
    asked = judging.make_single(questions, ANSWERS, prompts)
    assert [(each.question.id, each.turn, each.prompt.name) for each in asked] == [
        (81, 1, "single-v1"),
        (81, 2, "single-v1-multi-turn"),
        (111, 1, "single-math-v1"),
        (111, 2, "single-math-v1-multi-turn"),
    ]
    # braces in what people and models wrote are no places to fill
    assert asked[0].text == "[Q]the movie {question_2}[A]one {question}"
    assert asked[1].text == "the movie {question_2}|one {question}|a dull film|two"
    assert asked[2].text == "[Q]numbers 0 1 2[A]three[R]Area is 3"
    assert asked[3].text == "numbers 0 1 2|three|numbers 3 4|four|Area is 3|5pi"
    pairs = judging.make_pairs(questions, ANSWERS, OTHERS, prompts)
    swapped = judging.make_pairs(questions, OTHERS, ANSWERS, prompts)
    assert pairs[2].text == "numbers 0 1 2|three|drei|Area is 3"
    assert swapped[3].text == "numbers 3 4|drei|vier|three|four|5pi"


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("good. Rating: [[8]]", 8),
        ("Rating: [[7.5]] out of [[10]]", 7.5),
        ("Rating: [6]", 6),
        ("[1] is cited. Rating: [[5]]", 5),
        ("8 of 10", None),
        ("[[eight]]", None),
        ("", None),
    ],
)
def test_ratings_as_fastchat_finds_them(said, rating):
    assert find_rating(said) == rating


def test_winners_as_fastchat_finds_them():
    assert [find_winner(said) for said in ("so [[A]]", "[[B]]", "[[C]]", "A wins")] == ["A", "B", "tie", None]


def test_scores_by_category(file):
    verdicts = [Verdict(81, 1, 8.0), Verdict(81, 2, None), Verdict(111, 1, 2.0), Verdict(111, 2, 5.0)]
    found = {each.category: each for each in score_categories(read_questions(file), verdicts)}
    assert (found["writing"].both, found["writing"].second, found["writing"].unscored) == (8.0, None, 1)
    assert (found["math"].first, found["math"].second, found["math"].both) == (2.0, 5.0, 3.5)
    assert (found["average"].both, found["average"].unscored) == (5.0, 1)


# the server


def test_every_fault_is_tried_again(file, server, tmp_path):
    """429, 500, a cut connection, a reply without JSON or choices: asked again; a judgment without a score is kept."""
    asked = judging.make_single(read_questions(file), ANSWERS, read_judge_prompts(file))
    server.replies = [
        (429, "slow down"),
        (500, "oops"),
        "cut",
        (200, "<html>"),
        (200, "{}"),
        "fine [[9]]",
        "no rating",
        "[[3]]",
    ]
    out = tmp_path / "judged.jsonl"
    verdicts = judging.judge_single(judge_of(server), asked, out, name="me")
    assert [verdict.score for verdict in verdicts] == [9, None, 3, 7]
    assert len(server.asked) == 9
    path, key, body = server.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge-1", 0)
    assert body["messages"] == [
        {"role": "system", "content": "be single-v1"},
        {"role": "user", "content": asked[0].text},
    ]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["question_id"], line["turn"], line["score"]) for line in lines] == [
        (81, 1, 9),
        (81, 2, -1),
        (111, 1, 3),
        (111, 2, 7),
    ]
    assert lines[0]["judge"] == ["judge-1", "single-v1"]
    assert judging.judge_single(judge_of(server), asked, out, name="me") == verdicts
    assert len(server.asked) == 9


def test_a_judge_that_stays_away_loses_nothing(file, server, tmp_path):
    asked = judging.make_single(read_questions(file), ANSWERS, read_judge_prompts(file))
    out = tmp_path / "judged.jsonl"
    server.replies = ["[[4]]"] + [(503, "busy")] * 6
    with pytest.raises(DoraError, match=r"(?s)status 503: busy.*the same command goes on"):
        judging.judge_single(judge_of(server), asked, out, name="me")
    assert len(read_judgments(out)) == 1
    server.replies = [(401, "bad key")]
    before = len(server.asked)
    with pytest.raises(DoraError, match="status 401: bad key"):
        judging.judge_single(judge_of(server), asked, out, name="me")
    assert len(server.asked) == before + 1  # a wrong key is not tried again
    assert [verdict.score for verdict in judging.judge_single(judge_of(server), asked, out, name="me")] == [4, 7, 7, 7]
    with pytest.raises(requests.RequestException):
        requests.post("http://127.0.0.1:9/v1", timeout=1)


def test_pairs_are_asked_in_both_orders(file, server, tmp_path):
    questions, prompts = read_questions(file), read_judge_prompts(file)
    pairs = judging.make_pairs(questions, ANSWERS, OTHERS, prompts)
    swapped = judging.make_pairs(questions, OTHERS, ANSWERS, prompts)
    #                both say me     the first place    a tie and me       lost
    server.replies = ["[[A]]", "[[B]]", "[[A]]", "[[A]]", "[[C]]", "[[B]]", "[[B]]", "[[A]]"]
    out = tmp_path / "pairs.jsonl"
    verdicts = judging.judge_pairs(judge_of(server), pairs, swapped, out, names=("me", "other"))
    assert [verdict.score for verdict in verdicts] == [1, 0.5, 1, 0]
    assert [(line["g1_winner"], line["g2_winner"]) for line in read_judgments(out, pairs=True).values()] == [
        ("me", "me"),
        ("me", "other"),
        ("tie", "me"),
        ("other", "other"),
    ]
    out.unlink()
    server.replies = ["neither", "[[A]]"]
    first = judging.judge_pairs(judge_of(server), pairs[:1], swapped[:1], out, names=("me", "other"))
    assert first[0].score is None


# the command


def test_the_command(run, server, file, tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    out = tmp_path / "out"
    ask = ("eval", tiny_llama_folder, "--mt-bench", file, "--out", out, "--max-new-tokens", "4")
    status, shown, err = run(*ask)
    assert (status, "no judge" in shown) == (0, True), err
    answers = out / "model_answer" / "model.jsonl"
    assert len(read_answers(answers)) == 2
    judge = (*ask, "--judge-url", server.url, "--judge-model", "org/judge")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # nobody is there to agree
    status, shown, err = run(*judge, "--judge-price", "2,10")
    assert status == 2
    assert "4 judgments: about" in shown
    assert "dollars" in shown
    assert "nothing was sent" in err
    assert server.asked == []
    status, shown, err = run(*judge, "--yes")
    assert status == 0, err
    assert server.asked[0][1] == "Bearer from the environment"
    assert len(read_judgments(out / "model_judgment" / "org_judge_single_model.jsonl")) == 4
    assert json.loads((out / "scores_single.json").read_text()) == {"writing": 7, "math": 7, "average": 7}
    assert (out / "radar_single.png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other.jsonl"
    for question in QUESTIONS:
        append_lines(other, [{"question_id": question["question_id"], "choices": [{"turns": ["x", "y"]}]}])
    server.replies = ["[[A]]", "[[B]]"] * 4
    status, shown, err = run(*judge, "--yes", "--against", other)
    assert status == 0, err
    assert json.loads((out / "scores_pair.json").read_text())["average"] == 1
    status, _, err = run("eval", tiny_llama_folder, "--tasks", "boolq", "--judge-url", "http://x", "--yes")
    assert (status, "--judge-url, --yes: goes with --mt-bench" in err) == (2, True), err
    for wrong, told in (
        (("--judge-url", "http://x"), "go together"),
        (("--tasks", "boolq"), "--tasks and --mt-bench do not go together"),
        (("--published", "sentiment"), "--published: goes with --tasks"),
        (("--against", other), "by a judge"),
    ):
        status, _, err = run(*ask, *wrong)
        assert (status, told in err) == (2, True), err
