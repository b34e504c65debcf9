"""What is built for PyPI: its facts, README's links, and what stays out of a user's way."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = "https://example.org/someone/doralib"
LINKS = re.compile(r"\]\(([^)]+)\)")


def build(folder, **environment):
    """The wheel's metadata and the names of its files."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(metadata)), names


def test_readmes_links_lead_out_of_the_package(tmp_path):
    metadata, names = build(tmp_path, DORALIB_REPOSITORY=HOME)
    text = metadata.get_payload()
    links = LINKS.findall(text)
    assert f"{HOME}/blob/main/docs/train.md" in links
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"Homepage, {HOME}" in metadata.get_all("Project-URL")
    assert metadata["Author"] == "The doralib maintainers"
    assert [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))] == []
    assert "doralib/recipes/grpo-math.yaml" in names


def test_without_an_address_it_is_as_it_stands(tmp_path):
    metadata, _ = build(tmp_path, DORALIB_REPOSITORY="")
    assert "](docs/train.md)" in metadata.get_payload()
    assert metadata.get_all("Project-URL") is None


def test_pythons_are_those_that_the_script_tries():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [re.search(r":: (3\.\d+)$", each) for each in project["classifiers"]]
    versions = [found[1] for found in named if found]
    assert f"for version in {' '.join(versions)}; do" in (ROOT / "tests" / "pythons.sh").read_text()
    assert project["requires-python"] == f">={versions[0]}"


def test_the_script_says_which_pythons_it_did_not_find(tmp_path):
    """On a machine that has none: no command of that name, and pyenv's folder is empty."""
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYENV_ROOT": str(tmp_path), "HOME": str(tmp_path)}
    if any(Path(folder, "python3.11").exists() for folder in ("/usr/bin", "/bin")):
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("bash", "dirname", "env"):
            (tools / tool).symlink_to(f"/usr/bin/{tool}")
        environment["PATH"] = str(tools)
    done = subprocess.run(["bash", ROOT / "tests" / "pythons.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not on this machine, and so not tried: 3.11 3.12 3.13; failed: none" in done.stdout


def test_what_users_run_imports_no_experiment():
    """Bench, compare and analyze come with the package and load only as verbs of their own."""
    code = (
        "import sys, doralib, doralib.peft, doralib.cli.main\n"
        "from doralib.training import job\nfrom doralib.cli import train, generate, merge, eval\n"
        "doralib.adapt, doralib.load_adapter, doralib.merge\n"
        "found = [name for name in sys.modules if name.startswith('doralib.experiments')]\n"
        "heavy = {'trl', 'reasoning_gym', 'optuna'} & set(sys.modules)\n"
        "sys.exit(', '.join([*found, *heavy]) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["pyproject.toml", "hatch_build.py", "constraints.txt", "README.md", "LICENSE", "src"])
def test_the_image_gets_what_its_file_copies(file):
    copied = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert any(file in line.split()[:-1] for line in copied)
    assert f"!{file}" in (ROOT / ".dockerignore").read_text().splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.search(r"\.\[(.+?)\]", (ROOT / "Dockerfile").read_text())
    assert set(asked[1].split(",")) <= extras.keys()
