"""README, docs and the site: their code runs, their recipes and commands are valid, their links and figures hold."""

import json
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import typer
import yaml

import doralib
from doralib.cli.main import app

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
VERBS = typer.main.get_command(app).commands
MODEL = "HuggingFaceTB/SmolLM2-135M"
REVIEWS = [
    {"text": f"{what} film number {i}", "label": label}
    for i in range(20)
    for what, label in (("A fine", "positive"), ("A dull", "negative"))
]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    """The fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """What a reader is told to type, one command a line."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@pytest.fixture
def hub(even_llama_folder, tmp_path, monkeypatch):
    """A cache of the hub in which the docs' model is a tiny one."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    model = cache / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(even_llama_folder, model / "snapshots" / "0")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells the only process that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_a_pages_python_runs_and_warns_nothing(page, hub, one_process, tmp_path, monkeypatch, recwarn):
    """A page is one session: a block may use what the blocks above it made."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for i, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {i}", "exec"), names)
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


def test_pages_have_code():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 12
    assert blocks(README, "python")
    assert all(MODEL in block or "name" in block for block in blocks(README, "python"))


def test_readmes_recipe_and_commands_run(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks(README, "yaml")
    assert len(recipe.splitlines()) <= 10
    Path("reviews.yaml").write_text(recipe)
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    typed = [line for line in commands(README) if line.startswith("doralib ")]
    assert [line.split()[1] for line in typed] == ["check", "train", "generate", "merge"]
    for line in typed:
        words = shlex.split(line)[1:]
        fewer = {"train": ["training.max_steps=2"], "generate": ["--max-new-tokens", "2"]}
        status, out, err = run(*words, *fewer.get(words[0], []))
        assert status == 0, f"{line}\n{out}{err}"
    assert Path("merged/config.json").exists()


@each_page
def test_yaml_is_a_recipe_a_part_of_one_or_a_task(page, tmp_path, monkeypatch):
    from doralib.evaluation.task_file import load_tasks
    from doralib.recipe import Recipe
    from doralib.training.arguments import check_arguments

    monkeypatch.chdir(tmp_path)
    whole = {"model": {"path": MODEL}, "data": {"train": "t.jsonl", "validation": 0.1}, "out": "runs/x"}
    for i, text in enumerate(blocks(page, "yaml")):
        values = yaml.safe_load(text)
        if "kind" in values:
            file = tmp_path / f"task{i}.yaml"
            file.write_text(text)
            load_tasks([str(file)])
            continue
        given = {
            key: {**whole.get(key, {}), **value} if isinstance(value, dict) else value for key, value in values.items()
        }
        check_arguments(Recipe(**{**whole, **given}))


@each_page
def test_commands_exist(page):
    for line in commands(page):
        tool, *words = line.split()
        assert tool in ("doralib", "pip", "make", "torchrun", "git", "python"), line
        if tool == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if tool == "doralib":
            assert words[0] in VERBS, line
            known = {name for option in VERBS[words[0]].params for name in (*option.opts, *option.secondary_opts)}
            used = {word.strip("[]") for word in words if word.strip("[").startswith("--")}
            assert used <= known, line


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_on_its_page(verb):
    page = (
        DOCS
        / f"{ {'convert': 'formats', 'features': 'vl-bart', 'targets': 'inspect', 'init': 'check'}.get(verb, verb) }.md"
    )
    # those of all verbs have a page of their own
    told = set(re.findall(r"--[a-z][a-z-]*", page.read_text() + (DOCS / "cli.md").read_text()))
    options = {name for option in VERBS[verb].params for name in option.opts if name.startswith("--")}
    assert options - told - {"--help"} == set()


def test_readme_names_every_verb():
    table = README.read_text().split("## Commands")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(VERBS)


def test_every_public_name_has_an_entry():
    entries = re.findall(r"^::: doralib\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(entries) == {*doralib.__all__, "peft"}


def test_every_page_is_in_the_sites_menu():
    def pages(menu):
        for entry in menu:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    menu = [*pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]
    assert sorted(menu) == sorted(page.name for page in DOCS.glob("*.md"))


def test_readme_is_short():
    assert len(README.read_text().splitlines()) < 120


def measured(page):
    """What stands between the marks."""
    return page.read_text().split("<!-- measured -->\n")[1].split("<!-- /measured -->")[0]


def test_figures_are_those_of_the_last_measurement(tmp_path):
    from doralib.experiments.bench.readme import update_pages

    readme, page = tmp_path / "README.md", tmp_path / "bench.md"
    shutil.copy(README, readme)
    shutil.copy(DOCS / "bench.md", page)
    update_pages(readme, page, ROOT / "benchmarks" / "results")
    assert measured(readme) == measured(README)
    assert measured(page) == measured(DOCS / "bench.md")


def test_every_figure_has_its_command():
    rows = [line for line in measured(README).splitlines() if line.startswith("| [")]
    tables = measured(DOCS / "bench.md").split("\n### ")[1:]
    assert len(rows) == len(tables) >= 8
    for row, table in zip(rows, tables, strict=True):
        title, _, command, *_ = table.splitlines()
        assert re.fullmatch(r"`doralib bench [^`]+`", command), title
        assert row.startswith(f"| [{title}](docs/bench.md#")
        assert row.endswith(f"| {command} |")
        assert table.count("\n|---") == 1
    assert len(measured(README).splitlines()) <= len(rows) + 5  # the tables themselves are in docs/bench.md


BANNED = {
    r"column-?wise": "one length per output row",
    r"(de|re)?quantis": "quantized, dequantize, quantize again",
    r"\b(un)?fold(s|ed|ing)?\b": "merge",
    r"\boptimis": "optimizer",
    r"[A-Z]{5} ?= ?MODEL|\(MODEL|\bBATCH\b": "a model that exists",
}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_words(page):
    text = re.sub(r"dequantise=True|length_normalise", "", page.read_text())  # names in the code
    for word, better in BANNED.items():
        found = re.search(word, text, re.IGNORECASE if word.islower() else 0)
        assert not found, f"{found[0]}: say {better}"


def test_when_dora_quotes_the_last_measurement():
    """The page's table of costs, from the goals in the benchmarks' files."""

    def ratios(bench, comparison):
        report = json.loads((ROOT / "benchmarks" / "results" / f"{bench}.json").read_text())
        found = [g["measured"] for g in report["goals"] if re.search(comparison, g["what"])]
        return f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else f"{found[0]:.2f}"

    rows = {line.split(" | ")[0]: line for line in (DOCS / "when.md").read_text().splitlines() if line.startswith("| ")}
    lora = r"ours-dora( r\d+)? / peft-lora"
    for row, told in {
        "| training step, DoRA": ratios("step", f": {lora}"),
        "| training step with dropout": ratios("step", "ours-dora-adapter / peft-lora"),
        "| training step by rank": ratios("rank", f": {lora}"),
        "| unmerged generation": ratios("generate", "ours-dora / base"),
    }.items():
        (line,) = [line for first, line in rows.items() if first.startswith(row)]
        assert told in line, row
    (line,) = [line for first, line in rows.items() if first.startswith("| memory of a step")]
    totals = [ratios("memory", f"tokens{more}, total bytes") for more in ("", ", checkpointing")]
    assert f"{totals[0]}; with gradient checkpointing {totals[1]}" in line
