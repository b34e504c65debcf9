"""Scores in a file that grows: what is damaged is said, what is whole goes on."""

import json

import pytest

from doralib.errors import DoraError
from doralib.evaluation.metrics import Score
from doralib.evaluation.result import TaskResult
from doralib.evaluation.results_file import ResultsFile
from doralib.evaluation.task import ClassificationTask

SETTINGS = {"model": "m", "limit": None}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "good", "label": "yes"}\n')
    labels = {"yes": " yes", "no": " no"}
    return ClassificationTask(
        kind="classification", name="t", data=str(tmp_path / "t.jsonl"), prompt="{text}", labels=labels, answer="label"
    )


@pytest.fixture
def path(tmp_path, task):
    file = ResultsFile(tmp_path / "results.json", SETTINGS)
    score = {"accuracy": Score(0.5, 0.25, 0.75)}
    file.add(task, TaskResult("t", "classification", 4, score, None, ({"prompt": "a"},), 0, 1.5, "0101"))
    return file.path


def test_what_was_written_is_read(path, task):
    found = ResultsFile(path, SETTINGS).read([task])["t"]
    assert found.metrics == {"accuracy": Score(0.5, 0.25, 0.75)}
    assert (found.right, found.wrong, found.n) == ("0101", ({"prompt": "a"},), 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"after": []}, "do not fit together"),
        ({"tasks": {}}, "do not fit together"),
        ({"settings": 3}, "do not fit together"),
        ({"after": {"t": 3}}, "dictionary or an instance"),
        ({"after": {"t": {"task": "t"}}}, "Field required"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(path, task, change, said):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DoraError, match=rf"results\.json is damaged: .*{said}"):
        ResultsFile(path, SETTINGS).read([task])
