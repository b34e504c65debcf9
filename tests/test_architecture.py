"""The house as tests: imports run one way, public names, no torch for help, every optional package in its place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import doralib

SOURCE = Path(doralib.__file__).parent
# a file imports from its own room and from the rooms of the rows above; what is in no row is the ground
ROWS = [
    {"kernels", "quantization", "formats", "data", "runs"},
    {"layers"},
    {"adapters", "peft"},
    {"checkpoints", "evaluation"},
    {"training"},
    {"experiments"},
    {"cli"},
]
LEVEL = {room: level for level, row in enumerate(ROWS, 1) for room in row}
# the two doors open onto every room: the public names, each found when it is first used, and `python -m doralib`
DOORS = {"doralib", "doralib.__main__"}
# a package that not all of the house needs is imported in these files only
OPTIONAL = {
    "triton": {"kernels/triton.py"},
    "matplotlib": {"runs/plots.py"},
    "bitsandbytes": set(),
    "peft": {"experiments/bench"},
    "trl": {"training/objectives.py"},
    "reasoning_gym": {"data/problems.py"},
    "PIL": {
        *("checkpoints/vision.py", "cli/features.py", "data/pictures.py", "data/captioned.py", "data/frames.py"),
        *("data/videos.py", "evaluation/pictures.py", "training/diffusion/", "cli/demo_scenes.py"),
    },
    "sacrebleu": set(),
    "soundfile": set(),
    "soxr": set(),
    "jiwer": set(),
    "openpyxl": set(),
    "diffusers": {"training/diffusion/"},
    "prodigyopt": {"training/optimizers.py"},
    "psutil": {"process.py"},
    "scipy": {"experiments/statistics.py", "data/forecaster.py"},
    "pandas": {"data/series.py", "evaluation/forecast.py"},
    "utilsforecast": {"evaluation/forecast.py"},
    "lm_eval": {"evaluation/harness.py"},
    "optuna": set(),
    "submitit": {"experiments/compare/launch.py"},
    "ray": {"experiments/compare/launch.py"},
    "rich": {"cli/"},  # all printing is there
}


def name_of(path: Path, source: Path = SOURCE) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: dict[str, Path], source: Path = SOURCE) -> Iterator[str]:
    """Our modules that a file imports, at any depth: in functions too."""
    package = name_of(path, source).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - (node.level - 1)] if node.level else []
        home = ".".join([*base, *([node.module] if node.module else [])])
        if home in modules:
            inside = {f"{home}.{alias.name}" for alias in node.names}
            yield from (one if one in modules else home for one in sorted(inside))


def graph(source: Path = SOURCE) -> dict[str, set[str]]:
    modules = {name_of(path, source): path for path in sorted(source.rglob("*.py"))}
    return {name: set(imports(path, modules, source)) - {name} for name, path in modules.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def uphill(found: dict[str, set[str]]) -> list[str]:
    """Imports from a room of the same row, or of a row below."""
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        if name not in DOORS
        for other in others - DOORS
        if room(other) != room(name) and LEVEL.get(room(other), 0) >= max(LEVEL.get(room(name), 0), 1)
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    inside = {name: others - DOORS for name, others in found.items() if name not in DOORS}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_a_row():
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()} == LEVEL.keys() - {"peft"}


def test_imports_run_one_way():
    assert uphill(graph()) == []


def test_no_circle():
    assert circle(graph()) == []


def test_the_rules_see_imports_of_every_form(tmp_path):
    for folder in ("kernels", "layers"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "kernels" / "norm.py").write_text("def f():\n    from ..layers.linear import g\n")
    (tmp_path / "kernels" / "cache.py").write_text("from . import eager\n")
    (tmp_path / "kernels" / "eager.py").write_text("def f():\n    from .cache import h\n")
    (tmp_path / "layers" / "linear.py").write_text(f"import {tmp_path.name}.kernels.norm\n")
    found = graph(tmp_path)
    assert uphill(found) == [f"{tmp_path.name}.kernels.norm imports {tmp_path.name}.layers.linear"]
    assert circle(found)
    assert circle({**found, f"{tmp_path.name}.kernels.norm": set()})
    assert not circle({**found, f"{tmp_path.name}.kernels.norm": set(), f"{tmp_path.name}.kernels.eager": set()})


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_packages_are_imported_in_their_places(path):
    place = str(path.relative_to(SOURCE))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            allowed = OPTIONAL.get(name.split(".")[0])
            assert allowed is None or any(place.startswith(p) for p in allowed), f"{place} must not import {name}"


def test_recipes_are_yaml_and_nothing_else():
    assert {path.suffix for path in (SOURCE / "recipes").rglob("*") if path.is_file()} == {".yaml"}


def test_public_names():
    assert doralib.__all__ == sorted(doralib.__all__)
    for name in doralib.__all__:
        assert getattr(doralib, name).__module__.startswith("doralib.")
    with pytest.raises(AttributeError):
        doralib.no_such_name  # noqa: B018
    # a submodule of a public function's name would replace it once imported
    assert not {p.stem for p in SOURCE.iterdir()} & set(doralib.__all__)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_doralib_peft_needs_no_import_of_its_own():
    done = run("import doralib; doralib.peft.accelerate; assert 'peft' in dir(doralib)")
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom doralib.cli import main\n"
        "try: main.app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    for verb in (
        "train",
        "plan",
        "data",
        "eval",
        "generate",
        "merge",
        "convert",
        "inspect",
        "targets",
        "demo",
        "bench",
        "recipes",
        "compare",
        "analyze",
    ):
        assert verb in done.stdout


def test_the_core_needs_no_transformers():
    """The layers, the files and merging: torch, safetensors and pydantic alone."""
    names = ["functional", *(f"adapters.{name}" for name in ("adapt", "multiple", "combine", "hotswap", "merge"))]
    names += ["checkpoints.merge", "formats.files", "layers.linear"]
    heavy = "{'transformers', 'datasets'} & set(sys.modules)"
    code = f"import sys\nimport {', '.join(f'doralib.{name}' for name in names)}\nsys.exit(', '.join({heavy}) or 0)"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_import_adds_little_to_torch():
    """Counted in modules, not seconds: what `import doralib` brings in besides torch."""
    code = "import torch, sys\nbefore = set(sys.modules)\nimport doralib, doralib.adapters.adapt\n"
    done = run(code + "print(len(set(sys.modules) - before))")
    # formats among them: an adapted model saves itself
    assert int(done.stdout) < 180, done.stdout
