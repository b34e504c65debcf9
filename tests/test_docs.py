"""The code in README and docs runs; what they name exists; README stays short."""

import re
from pathlib import Path

import pytest
import torch
import typer

from doralib.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_raise_and_warn_nothing(code, even_llama_folder, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    exec(code, {"MODEL": str(even_llama_folder), "BATCH": torch.tensor([[5, 6, 7, 8]])})
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


VERBS = typer.main.get_command(app).commands


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_on_its_page(verb):
    page = ROOT / "docs" / f"{ {'convert': 'formats', 'targets': 'inspect'}.get(verb, verb) }.md"
    told = set(re.findall(r"--[a-z][a-z-]*", page.read_text()))
    options = {name for option in VERBS[verb].params for name in option.opts if name.startswith("--")}
    assert options - told - {"--help"} == set()


def test_the_recipe_in_the_docs_is_complete(tmp_path):
    import yaml

    from doralib.recipe import Recipe

    text = (ROOT / "docs" / "train.md").read_text()
    recipe = Recipe(**yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]))
    assert recipe.adapter.r == 16


def test_readme_is_short_and_every_figure_has_its_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    table = text.split("## Measured")[1].split("\n## ")[0]
    tables = re.split(r"\n\n(?=\*\*)", table)[1:]
    assert tables
    assert table.count("\n|---") == len(tables)
    for each in tables:
        heading = each.splitlines()[0]
        assert re.fullmatch(r"\*\*[^*]+\*\*: `(doralib|make) [^`]+`", heading), heading
