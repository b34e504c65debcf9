"""The layout as tests: imports point one way, public names, no torch for help, every optional package in its place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import doralib

SOURCE = Path(doralib.__file__).parent
# a module imports only from rows above its own; a folder is one row, inside which files may import each other
ROWS = [
    {"errors", "console"},
    {"problems"},
    {"config", "functional", "metrics", "markup", "templates"},
    {"kernels", "files", "state", "encoding", "charts", "quantised", "requantised"},
    {"dense", "sharded"},
    {"bases", "checkpoints", "formats", "rows", "styles", "runs", "gguf", "starts"} | {"folding", "stored_experts"},
    {"fitting", "scoring", "generation"},
    {"packed"},
    {"base_weights"},
    {"adapters", "streaming"},
    {"layers", "merging", "lowrank", "data", "tasks", "plots"} | {"report_results", "report_use", "peft"},
    {"experts"},
    {"switched"},
    {"convolutions", "embeddings", "fused_layers", "magnitudes", "bank", "targets", "task_files", "report"},
    {"live"},
    {"wrapping", "dequantised", "held"},
    {"inject", "evaluation"},
    {"several", "combination", "hotswap", "unmerge"},
    {"models", "groups"},
    {"verify"},
    {"recipes", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, row in enumerate(ROWS) for name in row}
# an optional package is imported in these files only
OPTIONAL = {
    "triton": {"kernels/triton.py"},
    "matplotlib": {"plots.py"},
    "bitsandbytes": set(),
    "peft": {"bench"},
}


def files():
    return [p for p in sorted(SOURCE.rglob("*.py")) if p.name != "__init__.py"]


def home(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """Names of our modules that a file imports, at any depth."""
    package = list(path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            yield from [parts[0]] if parts else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("doralib"):
            yield [*node.module.split("."), node.names[0].name][1]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    own = home(path)
    assert own in LEVEL, f"{own} has no row"
    for target in imports(path):
        if target == own or target.startswith("__"):
            continue
        assert LEVEL[target] < LEVEL[own], f"{own} must not import {target}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_optional_packages_are_imported_in_their_places(path):
    place = str(path.relative_to(SOURCE))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            allowed = OPTIONAL.get(name.split(".")[0])
            assert allowed is None or any(place.startswith(p) for p in allowed), f"{place} must not import {name}"


def test_no_file_is_long():
    for path in files():
        assert len(path.read_text().splitlines()) <= 400, f"{path} is over 400 lines"


def test_public_names():
    assert doralib.__all__ == sorted(doralib.__all__)
    for name in doralib.__all__:
        assert getattr(doralib, name).__module__.startswith("doralib.")
    with pytest.raises(AttributeError):
        doralib.no_such_name  # noqa: B018
    # a submodule of a public function's name would replace it once imported
    assert not {p.stem for p in SOURCE.glob("*.py")} & set(doralib.__all__)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_doralib_peft_needs_no_import_of_its_own():
    done = run("import doralib; doralib.peft.accelerate; assert 'peft' in dir(doralib)")
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom doralib import cli\n"
        "try: cli.app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "eval", "generate", "merge", "convert", "inspect", "targets", "demo", "bench"):
        assert verb in done.stdout


def test_the_core_needs_no_transformers():
    """The layers, the files and merging: torch, safetensors and pydantic alone."""
    modules = "inject, several, combination, hotswap, unmerge, merging, formats, layers, functional"
    heavy = "{'transformers', 'datasets'} & set(sys.modules)"
    code = f"import sys\nfrom doralib import {modules}\nsys.exit(', '.join({heavy}) or 0)"
    assert run(code).returncode == 0


def test_import_adds_little_to_torch():
    """Counted in modules, not seconds: what `import doralib` brings in besides torch."""
    code = "import torch, sys\nbefore = set(sys.modules)\nimport doralib, doralib.inject\n"
    done = run(code + "print(len(set(sys.modules) - before))")
    assert int(done.stdout) < 150, done.stdout
