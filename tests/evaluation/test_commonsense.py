"""LLM-Adapters' eight tasks: prompts to the byte, its way of finding an answer, the faster way, the published rows."""

import json
from itertools import product

import pytest

from doralib.cli.eval import COMMONSENSE, published_table
from doralib.errors import UsageError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.metrics import Score
from doralib.evaluation.result import TaskResult
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks, packaged_tasks
from doralib.training.recipe_file import packaged_recipes

ANSWERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": tuple(f"answer{i}" for i in range(1, 6)),
    "hellaswag": tuple(f"ending{i}" for i in range(1, 5)),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": tuple(f"answer{i}" for i in range(1, 6)),
    "ARC-Challenge": tuple(f"answer{i}" for i in range(1, 6)),
    "openbookqa": tuple(f"answer{i}" for i in range(1, 6)),
}
OFFICIAL = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                Is it?\n\nAnswer format\n\n"
    "                ### Response:\n                "
)
CLEAN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nIs it?\n\nAnswer format\n\n### Response:\n"
)


@pytest.fixture
def folder(tmp_path):
    """LLM-Adapters' folder `dataset`, a few rows in each."""
    for name, answers in ANSWERS.items():
        (tmp_path / name).mkdir()
        rows = [
            {"instruction": "Is it?\n\nAnswer format", "input": "", "output": f"the correct answer is {a}", "answer": a}
            for a in answers
        ]
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(("form", "clean"), product(("", "-likelihood"), (False, True)))
def test_a_group_on_a_folder(folder, form, clean):
    suffix = "-clean" * clean + form
    tasks = load_tasks([f"llm-adapters{suffix}={folder}"])
    assert [task.name for task in tasks] == [f"{name}{suffix}" for name in ANSWERS]
    for task, (_, answers) in zip(tasks, ANSWERS.items(), strict=True):
        examples = read_examples(task)
        assert [example.answer for example in examples] == list(answers)
        assert {example.prompt for example in examples} == {CLEAN if clean else OFFICIAL}
        if form:
            assert examples[0].options == tuple(f"the correct answer is {answer}" for answer in answers)
            assert [example.truth for example in examples] == list(range(len(answers)))
        else:
            assert (task.kind, task.num_beams, task.max_new_tokens) == ("regex", 4, 32)


# what models wrote behind the prompt, and what LLM-Adapters' scripts make of it: the text after the last
# "### Response:" of prompt and output together, stripped, and the first match in it
RECORDED = [
    ("boolq", "the correct answer is true", "true"),
    ("boolq", "the correct answer is false or true", "false"),
    ("boolq", "untrue", "true"),
    ("boolq", "True", ""),
    ("boolq", "", ""),
    ("piqa", " solution2\n\n### Instruction:\nsolution1", "solution2"),
    ("piqa", "solution2\n\n### Response:\nsolution1", "solution1"),
    ("piqa", "solution2\n\n### Response:\n", ""),
    ("piqa", "solution3", ""),
    ("ARC-Easy", "the correct answer is answer5", "answer5"),
    ("ARC-Easy", "the correct answer is answer12", "answer1"),
    ("social_i_qa", "answer6answer2", "answer2"),
    ("hellaswag", "ending5 ending4", "ending4"),
    ("winogrande", "option1/option2", "option1"),
    ("openbookqa", "answer 1", ""),
]


@pytest.mark.parametrize(("name", "output", "answer"), RECORDED)
def test_answers_are_found_as_the_official_code_finds_them(name, output, answer):
    (task,) = load_tasks([name])
    assert task.predicted(output) == answer


def test_every_task_of_the_package_loads(folder):
    for name in packaged_tasks():
        # FinLoRA's are in test_finlora.py, those of numbers in test_orca_math.py and test_objectives.py, POPE's in
        # checkpoints/test_llava.py, LLaVA's in test_llava_evaluations.py, VALUE's in training/test_image_text.py
        elsewhere = "/" in name or name in (
            "commonsense",
            "gsm",
            "gsm-seen",
            "llava",
            "orca-math",
            "pope",
            "sums",
            "value",
        )
        for task in () if elsewhere else load_tasks([f"{name}={folder}"]):
            assert read_examples(task)
    (one,) = load_tasks([f"commonsense={folder / 'piqa' / 'test.json'}"])
    assert one.predicted(read_examples(one)[1].answer) == "solution2"


def test_wrong_data_for_a_group(folder, tmp_path):
    with pytest.raises(UsageError, match="8 tasks: its data is a folder"):
        load_tasks([f"llm-adapters={folder / 'boolq' / 'test.json'}"])
    with pytest.raises(UsageError, match="boolq=PATH"):
        read_examples(load_tasks(["boolq"])[0])
    (folder / "boolq" / "test.json").unlink()
    with pytest.raises(UsageError, match=r"task boolq: data: .*boolq/test\.json"):
        read_examples(load_tasks([f"boolq={folder}"])[0])


def test_the_choice_is_the_likeliest_sentence(tiny, folder):
    (task,) = load_tasks([f"boolq-likelihood={folder}"])
    result = evaluate(*tiny, [task])[task.name]
    assert result.n == 2
    assert result.right in ("01", "10")  # the two rows ask the same
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json())), folder) == result


# beside the published row


def make_result(name, value):
    return TaskResult(name, "regex", 10, {"accuracy": Score(value, 0, 1)}, None, (), 0, 1.0)


def shown(table):
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_beside_the_published_row():
    published = [packaged_recipes()["commonsense/llama-7b-dora-r32"]]
    some = {f"{name}-likelihood": make_result(name, 0.8) for name in ("boolq", "ARC-Easy")}
    assert shown(published_table(some, published, "t")) == [
        ["boolq", "80.0", "69.7", "+10.3"],
        ["ARC-Easy", "80.0", "81.9", "-1.9"],
        ["average of these 2", "80.0", "75.8", "+4.2"],
    ]
    every = {name: make_result(name, 0.8) for name in COMMONSENSE}
    assert shown(published_table(every, published, "t"))[-1] == ["average", "80.0", "78.4", "+1.6"]
    assert ANSWERS.keys() == COMMONSENSE


# stopped and resumed


def test_an_evaluation_goes_on_task_by_task(run, tiny_llama_folder, folder, tmp_path, monkeypatch):
    from doralib.evaluation import evaluate as module

    out = tmp_path / "scores.json"
    ask = ("eval", tiny_llama_folder, "--tasks", f"boolq-likelihood={folder},piqa-likelihood={folder}", "--out", out)
    evaluated, whole = [], module.evaluate

    def stop_at_second(*args, **kwargs):
        evaluated.append(args[2][0].name)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", stop_at_second)
    assert run(*ask)[0] == 130
    first = json.loads(out.read_text())["after"]
    assert list(first) == ["boolq-likelihood"]
    status, shown, _ = run(*ask, "--resume", "--published", "commonsense/llama-7b-dora-r16")
    assert status == 0
    assert evaluated == ["boolq-likelihood", "piqa-likelihood", "piqa-likelihood"]
    after = json.loads(out.read_text())["after"]
    assert list(after) == ["boolq-likelihood", "piqa-likelihood"]
    assert after["boolq-likelihood"] == first["boolq-likelihood"]
    assert "boolq-likelihood" in shown
    assert "82.6" in shown
    status, _, err = run(*ask, "--resume", "--limit", "1")
    assert status == 2
    assert "limit None and not 1" in err
    assert run(*ask, "--resume", "--published", "commonsense/llama3-8b-lora-r16")[0] == 2
