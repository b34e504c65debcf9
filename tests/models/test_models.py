"""docs/models.md is what was seen of every architecture; `make models` sees it anew."""

import importlib
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sweep():
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("sweep")
    sys.path.remove(str(HERE))


def rows(sweep):
    return json.loads(sweep.RESULTS.read_text())


def test_the_page_is_written_from_what_was_seen(sweep):
    assert sweep.PAGE.read_text() == sweep.write_page(rows(sweep))


@pytest.mark.long
def test_every_architecture_is_accounted_for(sweep):
    assert rows(sweep).keys() == sweep.tiny.list_architectures().keys()


def test_whatever_is_adapted_is_identical_at_first_loads_and_merges(sweep):
    for name, row in rows(sweep).items():
        if "not_built" in row or "adapt" in row.get("failed", {}):
            continue  # the page says why
        assert all(row[key] for key in ("identity", "loads", "merges")), name
        assert not row.get("failed", {}).keys() - {"let_peft_read"}, name
        assert row.get("peft") is not False, name
        assert not any("bypassed" in each for each in row["no_gradient"]), name


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["llama", "mamba", "wavlm", "mpt"])
def test_a_few_of_them_are_as_the_page_says(sweep, model_type):
    row = sweep.try_architecture(model_type, *sweep.tiny.list_architectures()[model_type])
    assert row == rows(sweep)[model_type]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_of_them_are_as_the_page_says(sweep):
    seen = {name: sweep.try_architecture(name, *each) for name, each in sweep.tiny.list_architectures().items()}
    assert sweep.write_page(seen) == sweep.PAGE.read_text()
