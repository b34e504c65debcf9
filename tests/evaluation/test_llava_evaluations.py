"""LLaVA-1.5's evaluations against what LLaVA's own scripts made of the same files (commit c121f04)."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pictures are read by pillow")
from llava_folder import LETTER, SHORT, make_evaluations
from seeing_models import make_llava

from doralib.errors import DoraError, UsageError
from doralib.evaluation.json_lines import append_lines
from doralib.evaluation.llava.answers import AnswerFolder
from doralib.evaluation.llava.files import AnswerFile
from doralib.evaluation.llava.made_elsewhere import rate_answer_file
from doralib.evaluation.llava.questions import make_key, read_asked
from doralib.evaluation.llava.scores import rate_answers, read_letter
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks
from doralib.evaluation.vqa import normalize_written

SHARED = Path(os.environ.get("DORALIB_POPE", "/work/shared/data/pope"))
SAID = {
    "gqa": ["No.", "Woman", "a dress"],
    "textvqa": ["Phone.", "It's Red"],
    "pope": [
        *("Yes", "No, there is not", "No", "Yes. There is no cup"),
        *("yes", "no", "Yes", "no"),
        *("There is not", "no", "A car.", "I see no cup"),
    ],
    "sqa": ["A", "B) Paris", "The answer is C."],
    "vqav2": ["The red, and two", "couldnt"],
    "vizwiz": ["Unanswerable"],
    "mmbench": ["A", "D. four"],
}
# printed by eval_pope, eval_textvqa and eval_science_qa; GQA's by hand, of what convert_gqa_for_eval wrote
OFFICIAL = {
    "gqa": {"accuracy": 2 / 3, "binary_accuracy": 1, "open_accuracy": 0.5},
    "textvqa": {"vqa_accuracy": 0.65},
    "pope": {
        "f1": (0.5 + 1 + 2 / 3) / 3,
        "adversarial_f1": 0.5,
        "random_f1": 1,
        "popular_f1": 2 / 3,
        "accuracy": (0.5 + 1 + 0.75) / 3,
    },
    "sqa": {"image_accuracy": 1, "accuracy": 2 / 3},
}
# what LLaVA's EvalAIAnswerProcessor makes of them
WRITTEN = {
    "The red, and two": "red and 2",
    "couldnt": "couldn't",
    "it's red.": "it 's red",
    "1,000 men/women": "1000 men women",
    "What? dont": "what don't",
    "t-shirt / jeans": "t shirt jeans",
    "somebody'd": "somebodyd",
    "...": "",
    "." * 40: "." * 8,
    "O'clock": "o'clock",
    "Unanswerable\n": "unanswerable",
    "11:30 a.m.": "11:30 am",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_evaluations(tmp_path_factory.mktemp("eval"))


def write_answers(folder, name, path, said=None):
    (task,) = load_tasks([f"llava/{name}={folder}"])
    AnswerFile(path, name).append(read_asked(name, task.folder), said or SAID[name], "llava-v1.5-7b")
    return task


@pytest.mark.parametrize("name", OFFICIAL)
def test_scores_are_those_of_llavas_scripts(name, folder, tmp_path):
    task = write_answers(folder, name, tmp_path / "answers.jsonl")
    result = rate_answer_file(task, tmp_path / "answers.jsonl")
    assert {metric: score.value for metric, score in result.metrics.items()} == pytest.approx(OFFICIAL[name])
    assert all(score.low <= score.value <= score.high for score in result.metrics.values())
    assert result.n == len(SAID[name]) == len(result.right)


@pytest.mark.parametrize(("text", "written"), WRITTEN.items())
def test_answers_are_sent_in_the_servers_form(text, written):
    assert normalize_written(text) == written


def test_letters_are_read_as_in_llavas_script():
    said = {"C": "C", "E": "", "B. Paris": "B", "B.": "", "(B)": "", "The answer is A. The answer is B.": "", "": ""}
    said |= {"So. The answer is B.": "B", "The answer is D.": "", "AB": ""}
    assert {text: read_letter(text, 3) for text in said} == said


def test_prompts_are_llavas_to_the_letter(folder):
    tasks = load_tasks([f"llava={folder}"])
    assert [(task.name, task.max_new_tokens) for task in tasks][3:5] == [("llava/sqa", 1024), ("llava/vqav2", 128)]
    asked = {task.benchmark: read_examples(task) for task in tasks}
    assert [each.prompt for each in asked["textvqa"]] == [
        f"what is the brand of this phone?\nReference OCR token: NOKIA, 12\n{SHORT}",
        f"What color is it?\n{SHORT}",
    ]
    context = "Context: N/A\nQuestion: Which is a state?\nOptions: (A) Ohio (B) Paris"
    assert [(each.prompt, len(each.pictures)) for each in asked["sqa"][:2]] == [
        (f"{context}\n{LETTER}", 1),
        (f"{context}\n{LETTER}", 0),
    ]
    # beside an answer the picture's place is told, by which LLaVA's script knows what had one
    assert [each.question.told for each in asked["sqa"][:2]] == [
        f"<image>\n{context}\n{LETTER}",
        f"{context}\n{LETTER}",
    ]
    table = [
        'Some prior\nknowledge\nWhich is "heavier"?\nA. a cat\nB. a dog',
        "What is it?\nA. one\nB. two\nC. three\nD. four",
    ]
    assert [each.question.told for each in asked["mmbench"]] == table
    assert [each.prompt for each in asked["mmbench"]] == [f"{text}\n{LETTER}" for text in table]
    assert all(each.pictures[0].data for each in asked["mmbench"])


def test_files_for_servers(folder, tmp_path):
    for name in ("gqa", "vqav2", "vizwiz"):
        task = write_answers(folder, name, tmp_path / "made" / f"{name}.jsonl")
        result = rate_answer_file(task, tmp_path / "made" / f"{name}.jsonl", kept=AnswerFolder(tmp_path, "x"))
        assert (not result.metrics) == (name != "gqa")
    read = lambda name: json.loads((tmp_path / f"{name}_upload.json").read_text())
    # as convert_gqa_for_eval, convert_vqav2_for_submission and convert_vizwiz_for_submission wrote them
    assert read("gqa") == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "201640614", "prediction": "woman"},
        {"questionId": "202225914", "prediction": "a dress"},
    ]
    assert read("vqav2") == [
        {"question_id": 262144005, "answer": "red and 2"},
        {"question_id": 262144006, "answer": "couldn't"},
        {"question_id": 262144007, "answer": ""},
    ]
    assert read("vizwiz") == [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]
    with pytest.raises(UsageError, match="a server scores the answers"):
        rate_answer_file(task, tmp_path / "made" / "vizwiz.jsonl")


def test_mmbenchs_workbook(folder, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    # a workbook cannot hold what a model that is not trained may write
    task = write_answers(folder, "mmbench", tmp_path / "m.jsonl", ["A\x10\x1c", "D. four"])
    rate_answer_file(task, tmp_path / "m.jsonl", kept=AnswerFolder(tmp_path, "x"))
    sheet = openpyxl.load_workbook(tmp_path / "mmbench_upload.xlsx").active
    # as convert_mmbench_for_submission wrote it
    assert list(sheet.iter_rows(values_only=True)) == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (241, 'Which is "heavier"?', "a cat", "a dog", None, None, "A", "A", "dev"),
        (252, "What is it?", "one", "two", "three", "four", "D. four", "D", "dev"),
    ]


def test_without_openpyxl(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    task = write_answers(folder, "mmbench", tmp_path / "m.jsonl")
    with pytest.raises(UsageError, match="server of llava/mmbench needs openpyxl, which is not installed"):
        rate_answer_file(task, tmp_path / "m.jsonl", kept=AnswerFolder(tmp_path, "x"))


def test_a_file_that_lacks_answers_or_a_folder_of_another_version_is_refused(folder, tmp_path):
    (task,) = load_tasks([f"llava/gqa={folder / 'gqa'}"])  # the evaluation's own folder does as well
    asked = read_asked("gqa", task.folder)
    AnswerFile(tmp_path / "a.jsonl", "gqa").append(asked[:1], ["no"], "m")
    with pytest.raises(UsageError, match="has no answer to 2 of 3 questions of gqa: 201640614, 202225914"):
        rate_answer_file(task, tmp_path / "a.jsonl")
    assert rate_answer_file(task, tmp_path / "a.jsonl", limit=1).metrics["accuracy"].value == 1
    other = make_evaluations(tmp_path / "other")
    (other / "gqa" / "data" / "testdev_balanced_questions.json").write_text("{}")
    with pytest.raises(DoraError, match="has no answer to 3 of 3 questions; it is of another version"):
        read_examples(load_tasks([f"llava/gqa={other}"])[0])
    (other / "pope" / "val2014" / "p.jpg").unlink()
    with pytest.raises(DoraError, match="task llava/pope: of its pictures and videos 1 cannot be read"):
        read_examples(load_tasks([f"llava/pope={other}"])[0])
    (other / "sqa").mkdir()
    with pytest.raises(UsageError, match=r"no file llava_test_CQM-A.json|no file problems.json"):
        read_examples(load_tasks([f"llava/sqa={other / 'sqa'}"])[0])


def test_damaged_files_are_named(folder, tmp_path):
    other = make_evaluations(tmp_path / "other")
    damages = {
        "gqa": ("gqa/data/testdev_balanced_questions.json", '{"201307251": {"types": {}}}', "201307251.answer: Field"),
        "textvqa": ("textvqa/TextVQA_0.5.1_val.json", '{"data": [{"image_id": "a"}]}', "data.0.question: Field"),
        "sqa": ("scienceqa/problems.json", '{"4": {"choices": [], "answer": 7}}', "4.answer: Input should be less"),
        "pope": (
            "pope/coco/coco_pope_random.json",
            '{"image": "p.jpg", "text": 3, "label": "no"}',
            "line 1: text: Input",
        ),
        "vqav2": ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "[]", "line 1: Input should be"),
        "vizwiz": ("vizwiz/llava_test.jsonl", "", "holds no lines of JSON"),
        "mmbench": ("mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n1\tx\n", "has no column hint, A, B, image"),
    }
    for name, (file, text, told) in damages.items():
        (other / file).write_text(text)
        with pytest.raises(DoraError) as error:
            read_examples(load_tasks([f"llava/{name}={other}"])[0])
        assert str(other / file) in str(error.value)
        assert told in str(error.value)


def test_half_a_line_goes_and_a_whole_one_without_its_end_stays(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"a": "\u2028"}, {"a": 2}])
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    append_lines(path, [{"a": 4}])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_lines(path, [{"a": 5}])
    assert [json.loads(line)["a"] for line in path.read_text().split("\n")[:-1]] == ["\u2028", 2, 4, 5]


@pytest.mark.skipif(not SHARED.is_dir(), reason="POPE's own files are not here")
def test_popes_own_questions(tmp_path):
    names = ("adversarial", "random", "popular")
    rows = {name: list(map(json.loads, (SHARED / f"coco_pope_{name}.json").open())) for name in names}
    asked = read_asked("pope", make_evaluations(tmp_path, rows) / "pope")
    assert [len({each.id for each in asked}), asked[-1].id] == [9000, 20003000]
    found = rate_answers("pope", asked, ["yes"] * 9000, seed=0).metrics
    assert (found["f1"].value, found["accuracy"].value) == (pytest.approx(2 / 3), 0.5)
    truth = [each.answers[0] for each in asked]
    assert rate_answers("pope", asked, truth, seed=0).metrics["f1"].value == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in make_llava():
        part.save_pretrained(folder)
    return folder


def test_a_model_is_asked_its_answers_kept_and_the_rest_asked_after_a_stop(model, folder, tmp_path, run):
    for name in ("gqa", "sqa", "pope"):
        (tmp_path / f"{name}.yaml").write_text(f"like: llava/{name}\nmax_new_tokens: 4\n")
    tasks = ",".join(f"{tmp_path / name}.yaml={folder}" for name in ("gqa", "sqa", "pope"))
    kept, out = tmp_path / "answers", tmp_path / "results.json"
    status, shown, err = run("eval", model, "--tasks", tasks, "--answers", kept, "--out", out)
    assert status == 0, err
    assert "gqa_upload.json for its own script" in shown.replace("\n", "")
    lines = [json.loads(line) for line in (kept / "sqa.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["4", "5", "6"]
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    before = json.loads(out.read_text())["after"]
    # a stop after the first of GQA's answers, in the middle of the second
    gqa = kept / "gqa.jsonl"
    first, second, _ = gqa.read_text().splitlines()
    changed = json.dumps({**json.loads(first), "text": "No."})
    gqa.write_text(f"{changed}\n{second[:30]}")
    status, _, err = run("eval", model, "--tasks", tasks, "--answers", kept)
    assert (status, "there already; go on with --resume" in err.replace("\n", " ")) == (2, True)
    status, shown, err = run("eval", model, "--tasks", tasks, "--answers", kept, "--resume", "--json")
    assert status == 0, err
    assert json.loads(gqa.read_text().splitlines()[0])["text"] == "No."
    assert len(gqa.read_text().splitlines()) == 3
    after = json.loads(shown[shown.index("{\n") :])
    assert (
        before["gqa"]["metrics"]["binary_accuracy"]["value"],
        after["gqa"]["metrics"]["binary_accuracy"]["value"],
    ) == (0, 1)
    assert after["pope"]["metrics"] == before["pope"]["metrics"]
    status, _, err = run("eval", f"{model}/.", "--tasks", tasks, "--answers", kept, "--resume")
    assert (status, "has answers of" in err) == (2, True)


def test_a_file_of_answers_is_scored_beside_what_was_published(folder, tmp_path, run):
    path = tmp_path / "llava-v1.5-7b.jsonl"
    write_answers(folder, "sqa", path)
    status, shown, err = run("eval", path, "--tasks", f"llava/sqa={folder}", "--published", "llava/llava15-7b")
    assert status == 0, err
    assert "llava15-7b-dora" in shown
    assert "69.9" in shown
    assert "100.0" in shown
    for wrong, told in [
        (["--tasks", "sums"], "is a file of answers, to one of LLaVA's evaluations"),
        (["--tasks", f"llava={folder}"], "is a file of answers, to one of LLaVA's evaluations"),
        (["--tasks", f"llava/sqa={folder}", "--base", "x"], "--base: "),
        (["--tasks", f"llava/vizwiz={folder}"], "a server scores the answers"),
        (["--tasks", f"llava/gqa={folder}"], "has no answer to 3 of 3 questions of gqa"),
        (["--tasks", "sums", "--answers", tmp_path / "kept"], "none of these tasks is one of LLaVA's"),
    ]:
        status, _, err = run("eval", path, *wrong)
        assert (status, told in " ".join(err.split())) == (2, True), err
    status, _, err = run("eval", tmp_path / "none.jsonl", "--tasks", f"llava/sqa={folder}")
    assert (status, "there is no file none.jsonl" in err) == (2, True)


def test_a_recipe_cannot_score_by_a_server(folder, tmp_path, run):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n' * 4)
    given = [f"data.train={tmp_path / 'rows.jsonl'}", f"eval.tasks=[llava/vqav2={folder}]", f"out={tmp_path / 'out'}"]
    status, _, err = run("train", "demo", "model.path=nowhere", *given)
    assert (status, "a server scores the answers" in " ".join(err.split())) == (2, True), err


@pytest.mark.parametrize(
    "told",
    [
        "What is the brand?\nAnswer the question using a single word or phrase.",
        "What is the brand?\nReference OCR token: DAKOTA, DIGITAL\nAnswer the question using a single word or phrase.",
        "Reference OCR token: DAKOTA\nWhat is the brand?\nAnswer the question using a single word or phrase.",
        "OCR tokens: DAKOTA, DIGITAL. Question: What is the brand? Short answer:",
    ],
)
def test_the_question_of_textvqa_is_found_in_each_of_llavas_prompts(told):
    assert make_key("textvqa", 7, told) == ("7", "what is the brand?")
